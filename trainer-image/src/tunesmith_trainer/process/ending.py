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
from tunesmith_trainer.process.confidential import cleaned
from tunesmith_trainer.process.launch import LAUNCHED
from tunesmith_trainer.process.ranks import POD_INDEX, Ranks

if TYPE_CHECKING:
    from tunesmith.storage.credentials import Scrubber
    from tunesmith_trainer.errors import InterruptedRunError
    from tunesmith_trainer.process.interruption import Interruption
    from tunesmith_trainer.process.progress import Progress

UPLOAD_SECONDS = 40.0
"""Seconds for the last checkpoint to reach the store, out of the grace period between SIGTERM and SIGKILL."""
_MOURNING_SECONDS = 5.0
"""Seconds between the loss of another rank and this process's exit."""


class Ending:
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

    def tell(self, result: TrainerResult) -> None:
        """Write the termination message and the last line of the output."""
        result = self._resumed(result)
        self._write_message(result)
        text = f"{result.outcome}: {result.message}"
        if result.reason is not None:
            text = f"{result.outcome} ({result.reason}): {result.message}"
        if result.artifact is not None:
            text += f"\n  artifact {result.artifact.uri}\n  digest   {result.artifact.digest}"
        if LAUNCHED not in os.environ:
            self.progress.finish(_document(result), text)

    def left_alone(self, result: TrainerResult) -> TrainerResult:
        """Return the result after another rank was lost: that of a stop if this process was asked to stop as well."""
        number = self.interruption.signal
        if number is not None:
            return TrainerResult(
                outcome=Outcome.PREEMPTED,
                message=f"stopped by {number.name}, and another rank ended before this step did",
                retryable=True,
            )
        if POD_INDEX in os.environ and LAUNCHED not in os.environ:
            # The first pod that is seen to fail terminates the others: it should be the one with the cause.
            time.sleep(_MOURNING_SECONDS)
        return result

    def interrupted(self, error: InterruptedRunError, *, local: bool) -> TrainerResult:
        """Return the result of a run that was stopped and saved its state."""
        checkpoints = self.interruption.checkpoints
        number = self.interruption.signal
        stopped = f"stopped by {number.name}" if number is not None else "stopped with another rank"
        kept = "no checkpoint could be written"
        if checkpoints is not None and checkpoints.last is not None:
            kept = f"the checkpoint of step {checkpoints.last} is in {checkpoints.uri}"
        go_on = "; run the same command again to go on from there" if local else ""
        return TrainerResult(
            outcome=Outcome.PREEMPTED,
            message=f"{stopped} {error}; {kept if self.ranks.first else 'rank 0 has saved'}{go_on}",
            retryable=True,
        )

    def signalled(self, number: int, frame: object) -> None:  # noqa: ARG002 - a signal handler's signature
        """Let training finish its step and save; at any other time, or on the second signal, exit."""
        if self.interruption.asked(number):
            _write_at_once(sys.stderr.fileno(), b"stopping after this step; a second signal stops at once\n")
            return
        checkpoints = self.interruption.checkpoints
        if checkpoints is not None and self.interruption.signal is None:
            self.interruption.signal = signal.Signals(number)
            deadline = time.monotonic() + UPLOAD_SECONDS
            while checkpoints.pending and time.monotonic() < deadline:  # without locks, see _end
                time.sleep(0.05)
        self._end(
            TrainerResult(
                outcome=Outcome.PREEMPTED,
                message=f"stopped by {signal.Signals(number).name} in stage {self.progress.stage}",
                retryable=True,
            )
        )

    def hung(self, step: int, seconds: float) -> None:
        """Terminate the process from the watchdog's thread: the main thread does not respond."""
        self._end(
            TrainerResult(
                outcome=Outcome.FAILED,
                reason=FailureReason.INTERNAL_ERROR,
                message=f"training hangs: no sign of life for {seconds:.0f} s after step {step}; the next attempt"
                " goes on from the last checkpoint. If it happens again, look at the GPU's driver",
                retryable=True,
            )
        )

    def _end(self, result: TrainerResult) -> NoReturn:
        """Exit at once; without locks, which the interrupted code may hold."""
        result = self._resumed(result)
        with contextlib.suppress(OSError):
            self._write_message(result)
            line = json.dumps(_document(result)) if self._form == "json" else f"{result.outcome}: {result.message}"
            if LAUNCHED not in os.environ:
                _write_at_once(sys.stdout.fileno(), f"\n{line}\n".encode())
        os._exit(result.exit_code)

    def _resumed(self, result: TrainerResult) -> TrainerResult:
        return cleaned(result, self._scrubber).model_copy(
            update={"resumed_from_step": self.interruption.resumed_from_step}
        )

    def _write_message(self, result: TrainerResult) -> None:
        if self._path is not None:
            self._path.write_text(result.termination_message(), encoding="utf-8")


def _write_at_once(descriptor: int, data: bytes) -> None:
    """Write what fits without blocking: the process may be exiting because a reader has stopped reading."""
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
