"""Adapter of another FineTuneJob that a FineTuneJob starts from (spec.continueFrom.fineTuneJob)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunesmith.api.conditions import FineTuneJobCondition, find, is_true
from tunesmith.api.finetunejob_status import ContinuedFrom
from tunesmith.contracts.location import artifact_uri

if TYPE_CHECKING:
    from tunesmith.api.finetunejob import FineTuneJob


@dataclass(frozen=True)
class NotReady:
    """Reason, as a sentence, why there is no adapter to start from; `final` if there will be none."""

    message: str
    final: bool = False


def source_name(job: FineTuneJob) -> str | None:
    """Return the name of the FineTuneJob whose adapter this one starts from; None if it names none."""
    start = job.spec.continue_from
    return start.fine_tune_job.name if start is not None and start.fine_tune_job is not None else None


def start_of(job: FineTuneJob, source: FineTuneJob | None, store: str) -> ContinuedFrom | NotReady | None:
    """Return the adapter that a job starts from.

    Args:
        job: the FineTuneJob.
        source: the FineTuneJob that it names; None if it does not exist.
        store: uri of the installation's store. The location is computed, never taken from a pod's report.

    Returns:
        The adapter, or the reason why there is none yet; None if the job names no FineTuneJob.
    """
    name = source_name(job)
    if name is None:
        return None
    if source is None:
        return NotReady(
            f"waits for FineTuneJob {name}, which does not exist in namespace {job.metadata.namespace}: create it, or "
            "create this job again with another spec.continueFrom"
        )
    conditions = source.status.conditions
    failed = find(conditions, FineTuneJobCondition.FAILED)
    if failed is not None and is_true(conditions, FineTuneJobCondition.FAILED):
        return NotReady(
            f"FineTuneJob {name} of spec.continueFrom failed with {failed.reason}: create this job again with another "
            "one",
            final=True,
        )
    if not is_true(conditions, FineTuneJobCondition.COMPLETE) or source.status.artifact is None:
        return NotReady(f"waits for FineTuneJob {name}, which is {source.status.phase or 'Pending'}")
    uri = artifact_uri(store, source.metadata.namespace, name, source.metadata.uid)
    return ContinuedFrom(uri=uri, digest=source.status.artifact.digest)
