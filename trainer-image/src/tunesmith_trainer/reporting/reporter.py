"""Reporting in the training process: start a process per tracker, write the journal, report what was not delivered."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic.alias_generators import to_camel

from tunesmith.api.output import Tracker
from tunesmith.contracts.environment import ALLOWED_ADDRESSES
from tunesmith_trainer.errors import TrainerError
from tunesmith_trainer.reporting.journal import JOURNAL, Description, End, JournalWriter, Point
from tunesmith_trainer.reporting.worker import State, read_state

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith.api.finetunejob_status import Resolved
    from tunesmith.contracts.result import Outcome
    from tunesmith.storage.folder import Folder
    from tunesmith_trainer.reporting.curve import CurvePoint

log = logging.getLogger(__name__)

_CHECK_SECONDS = 5.0
"""Seconds between two checks of the state of a tracker's process."""
_UPLOAD_SECONDS = 60.0
"""Seconds between two copies of the event files to the store."""
_MAX_VALUE_CHARACTERS = 500
"""Maximum number of characters of a parameter, limited by MLflow."""
_RETRY_SECONDS = 5.0
"""Seconds after the last entry for a tracker that cannot be reached: it is tried once more."""
_POLL_SECONDS = 0.05
_PASSED_VARIABLES = (
    *("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "PYTHONPATH", "LD_LIBRARY_PATH"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
    ALLOWED_ADDRESSES,
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
)
"""Variables passed to a tracker's process; the store's credentials are not among them."""
_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "WANDB_ERROR_REPORTING": "false",
    "GIT_PYTHON_REFRESH": "quiet",
    "PYTHONDONTWRITEBYTECODE": "1",
}
_TIMEOUTS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
"""Short timeouts: the worker has its own retries."""


@dataclass
class _Worker:
    tracker: Tracker
    process: subprocess.Popen[bytes]
    warned: bool = False


class Reporter:
    """Reports to the trackers that were started; without trackers it does nothing.

    No method raises because of a tracker, and only `close` waits, for a bounded time.

    Args:
        settings: environment variables by tracker.
        folder: folder of the journal; None if there is nothing to report.
        events: local folder of the event files.
    """

    def __init__(
        self,
        settings: Mapping[Tracker, Mapping[str, str]] | None = None,
        folder: Path | None = None,
        events: Path | None = None,
    ) -> None:
        self._settings = settings or {}
        self._folder = folder
        self._events = events
        self._workers: list[_Worker] = []
        self._journal: JournalWriter | None = None
        self._checked = 0.0
        self._last = -1
        self._finished = threading.Event()
        self._copying: threading.Thread | None = None
        self._not_copied: str | None = None

    @property
    def wanted(self) -> bool:
        """True if there is a tracker."""
        return bool(self._settings)

    def start(
        self,
        *,
        run: str,
        name: str,
        parameters: dict[str, str],
        guarded: bool,
        store: Folder | None,
    ) -> None:
        """Start a process per tracker.

        Args:
            run: identifies the run across attempts.
            name: name of the run.
            parameters: resolved parameters by dotted path.
            guarded: True if its connections are guarded, as those of a job in a cluster.
            store: folder for a copy of the event files; None if they are already in their final location.
        """
        settings, folder, events = self._settings, self._folder, self._events
        if not settings or folder is None or events is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._journal = JournalWriter(folder / JOURNAL)
        for tracker, variables in settings.items():
            tracker_folder = folder / tracker.lower()
            tracker_folder.mkdir(exist_ok=True)
            target = events if tracker is Tracker.TENSORBOARD else tracker_folder
            description = Description(tracker, run, name, parameters, str(target), guarded)
            (folder / f"state-{tracker}.json").unlink(missing_ok=True)
            self._workers.append(_Worker(tracker, _start_worker(folder, tracker_folder, description, variables)))
        if store is not None and Tracker.TENSORBOARD in settings:
            self._copying = threading.Thread(target=self._copy, args=(store, events), name="reporting", daemon=True)
            self._copying.start()

    def add(self, point: CurvePoint, **more: float | None) -> None:
        """Add one point of the curves, with other measurements."""
        if self._journal is None:
            return
        self._last = point.step
        named = {
            "loss": point.loss,
            "evaluationLoss": point.evaluation_loss,
            "learningRate": point.learning_rate,
            "gradientNorm": point.gradient_norm,
            "tokens": point.tokens,
            "epoch": point.epoch,
            **{to_camel(name): value for name, value in more.items()},
        }
        metrics = {name: float(value) for name, value in named.items() if value is not None and math.isfinite(value)}
        with suppress(OSError):  # a full disk must not stop training here
            self._journal.append(Point(point.step, time.time(), metrics))
        if time.monotonic() - self._checked >= _CHECK_SECONDS:
            self._checked = time.monotonic()
            self._warn()

    def replay(self, curve: Iterable[CurvePoint]) -> None:
        """Add the points of earlier attempts, after what was added: a tracker gets those that it does not have."""
        last = self._last
        for point in curve:
            if point.step > last:
                self.add(point)

    def close(self, outcome: Outcome, metrics: Mapping[str, float], seconds: float) -> str | None:
        """Report the end, wait briefly for pending reports, and terminate the processes.

        Returns:
            A sentence about what was not delivered, or None.
        """
        if self._journal is None or self._folder is None:
            return None
        with suppress(OSError):
            self._journal.append(End(outcome.value, dict(metrics)))
        self._journal.close()
        self._journal = None
        deadline = time.monotonic() + seconds
        undelivered = []
        for worker in self._workers:
            state = self._await_state(worker, deadline)
            if not state.done:
                undelivered.append(
                    f"{worker.tracker} ({state.problem or f'not everything was sent within {seconds:.0f} s'})"
                )
        if self._copying is not None:
            self._finished.set()
            self._copying.join(max(1.0, deadline - time.monotonic()))
            if self._copying.is_alive() or self._not_copied is not None:
                undelivered.append(
                    f"{Tracker.TENSORBOARD} ({self._not_copied or 'the store did not accept the files in time'})"
                )
        return f"not all steps were reported to {' and '.join(undelivered)}" if undelivered else None

    def _await_state(self, worker: _Worker, deadline: float) -> State:
        """Wait for the final state of a worker; one whose tracker fails gets only a few more seconds."""
        assert self._folder is not None  # noqa: S101 - there are workers
        while worker.process.poll() is None and time.monotonic() < deadline:
            if read_state(self._folder, worker.tracker).problem is not None:
                deadline = min(deadline, time.monotonic() + _RETRY_SECONDS)
                _wait(worker.process, deadline)
                break
            time.sleep(_POLL_SECONDS)
        # Terminate its child processes as well.
        with suppress(ProcessLookupError):
            os.killpg(worker.process.pid, signal.SIGKILL)
        worker.process.wait()
        return read_state(self._folder, worker.tracker)

    def _warn(self) -> None:
        """Warn once about each tracker that has a problem."""
        assert self._folder is not None  # noqa: S101 - there are workers
        for worker in self._workers:
            problem = read_state(self._folder, worker.tracker).problem
            if problem is None and worker.process.poll() is not None:
                problem = f"its process exited with code {worker.process.returncode}"
            if problem is not None and not worker.warned:
                worker.warned = True
                log.warning("reporting to %s fails, training continues: %s", worker.tracker, problem)

    def _copy(self, store: Folder, events: Path) -> None:
        """Keep the store's folder of event files identical to the local one."""
        fresh = False
        last = False
        while not last:
            last = self._finished.wait(_UPLOAD_SECONDS)
            files = sorted(events.glob("events.out.tfevents.*"))
            try:
                if files and not fresh:
                    store.remove()  # this attempt's file includes the content of earlier attempts' files
                    fresh = True
                for file in files:
                    store.upload(file.name, file)
            except (TrainerError, OSError) as error:
                self._not_copied = str(error)
            else:
                self._not_copied = None


def parameters_of(job: FineTuneJob, resolved: Resolved) -> dict[str, str]:
    """Return the manifest's settings and those that were decided for the user, by dotted path."""
    spec = job.spec.manifest()
    reported = ("baseModel", "objective", "method", "hyperparameters")
    parts: dict[str, Any] = {name: spec[name] for name in reported if name in spec}
    flat = dict(_flat({**parts, "resolved": resolved.manifest()}))
    return {
        name: text if len(text) <= _MAX_VALUE_CHARACTERS else f"{text[: _MAX_VALUE_CHARACTERS - 1]}…"
        for name, text in flat.items()
    }


def _flat(document: Mapping[str, Any], path: str = "") -> Iterable[tuple[str, str]]:
    for name, value in document.items():
        dotted = f"{path}{name}"
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{dotted}.")
        else:
            yield dotted, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _start_worker(
    folder: Path, tracker_folder: Path, description: Description, variables: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    environment = {name: os.environ[name] for name in _PASSED_VARIABLES if name in os.environ}
    environment |= {
        "WANDB_CACHE_DIR": str(tracker_folder),
        "WANDB_DATA_DIR": str(tracker_folder),
        "WANDB_CONFIG_DIR": str(tracker_folder),
    }
    process = subprocess.Popen(  # noqa: S603 - our own command
        [sys.executable, "-m", "tunesmith_trainer.reporting.worker", str(folder)],
        stdin=subprocess.PIPE,
        # Libraries log addresses, and may log keys; problems are reported without them.
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**environment, **_QUIET, **_TIMEOUTS, **variables},
        start_new_session=True,
    )
    with suppress(OSError):  # it has exited, which is detected later
        assert process.stdin is not None  # noqa: S101 - it is a pipe
        process.stdin.write(description.to_json().encode() + b"\n")
        process.stdin.close()
    return process


def _wait(process: subprocess.Popen[bytes], deadline: float) -> None:
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
