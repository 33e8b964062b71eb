"""Finish a run: write its result for Kubernetes, programs and people; handle signals and hung steps."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tunesmith.api.conditions import FailureReason
from tunesmith.contracts.result import TERMINATION_MESSAGE_PATH, Outcome, TrainerResult
from tunesmith_trainer.process.confidential import clean_result
from tunesmith_trainer.process.launch import LAUNCHED
from tunesmith_trainer.process.ranks import POD_INDEX, Ranks

if TYPE_CHECKING:
    from tunesmith.storage.credentials import Scrubber
    from tunesmith_trainer.errors import InterruptedRunError
    from tunesmith_trainer.process.interruption import Interruption
    from tunesmith_trainer.process.progress import Progress

UPLOAD_SECONDS = 40.0
"""Seconds for the last checkpoint to reach the store, out of the grace period between SIGTERM and SIGKILL."""
_PEER_GRACE_SECONDS = 5.0
"""Seconds between the loss of another rank and this process's exit."""


class Termination:
    """Writes the result of the process: termination message, last line of output, exit code.

    Args:
        progress: progress of the run; its last line is the result.
        form: format of that line: text or json.
        path: path of the termination message; None: Kubernetes' default, if it exists.
        interruption: records signals.
        scrubber: removes credentials from sentences.
    """

    def __init__(
        self, progress: Progress, form: str, path: Path | None, interruption: Interruption, scrubber: Scrubber
    ) -> None:
        self._scrubber = scrubber
        self.progress = progress
        self.interruption = interruption
        self.ranks = Ranks()
        self._form = form
        default = Path(TERMINATION_MESSAGE_PATH)
        self._path = path or (default if default.exists() else None)

    def report(self, result: TrainerResult) -> None:
        """Write the termination message and the last line of the output."""
        result = self._completed(result)
        self._write_message(result)
        text = f"{result.outcome}: {result.message}"
        if result.reason is not None:
            text = f"{result.outcome} ({result.reason}): {result.message}"
        if result.artifact is not None:
            text += f"\n  artifact {result.artifact.uri}\n  digest   {result.artifact.digest}"
        if LAUNCHED not in os.environ:
            self.progress.finish(_document(result), text)

    def after_lost_peer(self, result: TrainerResult) -> TrainerResult:
        """Return the result after another rank was lost: Preempted if a signal stopped this process as well."""
        number = self.interruption.signal
        if number is not None:
            return TrainerResult(
                outcome=Outcome.PREEMPTED,
                message=f"stopped by {number.name}, and another rank exited before this step was finished",
                retryable=True,
            )
        if POD_INDEX in os.environ and LAUNCHED not in os.environ:
            # Once a pod fails, the Job controller terminates the others: the pod with the cause should be the first.
            time.sleep(_PEER_GRACE_SECONDS)
        return result

    def interrupted_result(self, error: InterruptedRunError, *, local: bool) -> TrainerResult:
        """Return the result of a run that was stopped and saved its state."""
        checkpoints = self.interruption.checkpoints
        number = self.interruption.signal
        stopped = f"stopped by {number.name}" if number is not None else "stopped with another rank"
        saved = "no checkpoint could be written"
        if checkpoints is not None and checkpoints.last is not None:
            saved = f"the checkpoint of step {checkpoints.last} is in {checkpoints.uri}"
        fix = "; run the same command again to resume" if local else ""
        return TrainerResult(
            outcome=Outcome.PREEMPTED,
            message=f"{stopped} {error}; {saved if self.ranks.first else 'rank 0 has the checkpoint'}{fix}",
            retryable=True,
        )

    def handle_signal(self, number: int, frame: object) -> None:  # noqa: ARG002 - a signal handler's signature
        """Let training finish its step and save; at any other time, or on the second signal, exit."""
        if self.interruption.record(number):
            _write_nonblocking(sys.stderr.fileno(), b"stopping after this step; a second signal stops immediately\n")
            return
        checkpoints = self.interruption.checkpoints
        if checkpoints is not None and self.interruption.signal is None:
            self.interruption.signal = signal.Signals(number)
            deadline = time.monotonic() + UPLOAD_SECONDS
            while checkpoints.pending and time.monotonic() < deadline:  # without locks, see _exit
                time.sleep(0.05)
        self._exit(
            TrainerResult(
                outcome=Outcome.PREEMPTED,
                message=f"stopped by {signal.Signals(number).name} in stage {self.progress.stage}",
                retryable=True,
            )
        )

    def stop_hung_training(self, step: int, seconds: float) -> None:
        """Terminate the process from the watchdog's thread, because the main thread does not respond."""
        self._exit(
            TrainerResult(
                outcome=Outcome.FAILED,
                reason=FailureReason.INTERNAL_ERROR,
                message=f"training hangs: no progress for {seconds:.0f} s after step {step}; the next attempt resumes"
                " from the last checkpoint. If it happens again, check the GPU and its driver",
                retryable=True,
            )
        )

    def _exit(self, result: TrainerResult) -> NoReturn:
        """Exit at once; without locks, which the interrupted code may hold."""
        result = self._completed(result)
        with contextlib.suppress(OSError):
            self._write_message(result)
            line = json.dumps(_document(result)) if self._form == "json" else f"{result.outcome}: {result.message}"
            if LAUNCHED not in os.environ:
                _write_nonblocking(sys.stdout.fileno(), f"\n{line}\n".encode())
        os._exit(result.exit_code)

    def _completed(self, result: TrainerResult) -> TrainerResult:
        return clean_result(result, self._scrubber).model_copy(
            update={"resumed_from_step": self.interruption.resumed_from_step}
        )

    def _write_message(self, result: TrainerResult) -> None:
        if self._path is not None:
            self._path.write_text(result.termination_message(), encoding="utf-8")


def _write_nonblocking(descriptor: int, data: bytes) -> None:
    """Write what fits without blocking: the process may be exiting because its reader stopped reading."""
    if select.select([], [descriptor], [], 0)[1]:
        os.write(descriptor, data[: select.PIPE_BUF])


def _document(result: TrainerResult) -> dict[str, Any]:
    artifact = result.artifact
    return {
        "outcome": result.outcome.value,
        "reason": result.reason.value if result.reason else None,
        "message": result.message,
        "artifact": {"uri": artifact.uri, "digest": artifact.digest} if artifact else None,
        "metrics": result.metrics,
    }
