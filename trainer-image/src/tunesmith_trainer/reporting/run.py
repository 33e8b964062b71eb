"""The run of a job in its trackers: the trackers, and the run's identity across attempts."""

from __future__ import annotations

import hashlib
import os
import uuid
from typing import TYPE_CHECKING

from tunesmith.contracts.location import EVENTS_FOLDER, beside_artifact
from tunesmith.storage.folder import ONE_TRY
from tunesmith_trainer.errors import StorageUnavailableError
from tunesmith_trainer.reporting.reporter import Reporter, parameters_of
from tunesmith_trainer.reporting.settings import tracker_settings

if TYPE_CHECKING:
    from pathlib import Path

    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith.api.finetunejob_status import Resolved
    from tunesmith.api.output import Tracker
    from tunesmith.storage.folder import Folder
    from tunesmith_trainer.process.ranks import Ranks
    from tunesmith_trainer.store import Stores

RUN_FILE = "run-id"


def trackers_of(job: FineTuneJob, secrets: Path, *, local: bool) -> dict[Tracker, dict[str, str]]:
    """Return the environment variables of each tracker that the job reports to.

    Args:
        job: the FineTuneJob.
        secrets: folder with the mounted Secrets.
        local: True if the job runs outside a cluster.

    Raises:
        TrainerError: a Secret, one of its keys or a variable is missing.
    """
    wanted = (job.spec.output.reporting or []) if job.spec.output else []
    return tracker_settings(wanted, secrets, os.environ, local=local)


def reporter_of(
    job: FineTuneJob, work: Path, ranks: Ranks, *, secrets: Path, output: Path | None, local: bool
) -> Reporter:
    """Return the reporter of the job, which reports once it is started, on the first rank only.

    Args:
        job: the FineTuneJob.
        work: folder for the journal, and for the event files of a run without a local output folder.
        ranks: this process among those that train together.
        secrets: folder with the mounted Secrets.
        output: local folder for the artifact; None if it goes to a store.
        local: True if the job runs outside a cluster.

    Raises:
        TrainerError: a Secret, one of its keys or a variable is missing.
    """
    if not ranks.first:
        return Reporter()
    settings = trackers_of(job, secrets, local=local)
    return Reporter(settings, work / "reporting", (output or work) / EVENTS_FOLDER)


def begin(
    reporter: Reporter, job: FineTuneJob, resolved: Resolved, stores: Stores, target: Folder, local: Path | None
) -> None:
    """Start reporting: the run is identified across attempts by the job's uid, or in a local folder by a file in it."""
    if not reporter.wanted:
        return
    metadata = job.metadata
    store = None
    run = metadata.uid or hashlib.sha256(target.uri.encode()).hexdigest()[:32]
    if local is None:
        uri = beside_artifact(target.uri, EVENTS_FOLDER)
        store = stores.folder(uri, what="the folder of event files", missing=StorageUnavailableError)
        store = store.child(retry=ONE_TRY)
    else:
        kept = local / RUN_FILE
        if not kept.exists():
            kept.write_text(f"{uuid.uuid4().hex}\n", encoding="utf-8")
        run = kept.read_text(encoding="utf-8").strip()
    reporter.start(
        run=run,
        name=f"{metadata.namespace}/{metadata.name}",
        parameters=parameters_of(job, resolved),
        guarded=local is None,
        store=store,
    )
