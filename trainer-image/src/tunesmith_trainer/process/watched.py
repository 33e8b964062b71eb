"""Run a command in a child process that is killed if it, or some work in it, takes too long."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING

from tunesmith.api.conditions import FailureReason
from tunesmith.contracts.result import ExitCode, Outcome, TrainerResult
from tunesmith_trainer.process.activity import ACTIVITY, create, current, overdue
from tunesmith_trainer.process.launch import LAUNCHED

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_POLL_SECONDS = 0.2
_CRASHES = frozenset({-signal.SIGABRT, -signal.SIGBUS, -signal.SIGFPE, -signal.SIGILL, -signal.SIGSEGV})
"""Exit codes of a process in which a library failed: on the same files it would fail again."""


def watched(command: Sequence[str], work: Path, deadline_seconds: float) -> TrainerResult:
    """Run the trainer's command and return its result, or a failure if it did not finish.

    Signals are passed on.

    Args:
        command: without `--termination-message`.
        work: folder for the result file of the child process.
        deadline_seconds: time limit for the whole command.
    """
    message, activity = work / "result.json", work / "activity"
    message.unlink(missing_ok=True)
    slot = create(activity)
    environment = {**os.environ, LAUNCHED: "1", ACTIVITY: str(activity)}
    process = subprocess.Popen(  # noqa: S603 - our own command
        [*command, "--termination-message", str(message)], env=environment, start_new_session=True
    )

    def pass_on(number: int, frame: object) -> None:  # noqa: ARG001 - a signal handler's signature
        process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    deadline = time.monotonic() + deadline_seconds
    while process.poll() is None:
        late_work = overdue(slot)
        if late_work is not None or time.monotonic() >= deadline:
            process.kill()
            process.wait()
            return _timed_out(late_work, current(slot), deadline_seconds)
        time.sleep(_POLL_SECONDS)
    result = TrainerResult.parse(message.read_text(encoding="utf-8")) if message.is_file() else None
    return result or _without_result(process.returncode, current(slot))


def _timed_out(late_work: str | None, work: str, deadline_seconds: float) -> TrainerResult:
    if late_work is None:
        return TrainerResult(
            outcome=Outcome.FAILED,
            reason=FailureReason.DEADLINE_EXCEEDED,
            message=f"the checks took longer than {deadline_seconds:.0f} s and were stopped{_at(work)}: use fewer"
            " or smaller data files, or a smaller tokenizer",
        )
    return TrainerResult(
        outcome=Outcome.FAILED,
        reason=FailureReason.INVALID_SPEC,
        message=f"{late_work} did not finish in time and was stopped: remove endless loops, and expressions whose cost"
        " grows with each repetition",
    )


def _without_result(code: int, work: str) -> TrainerResult:
    if code == -signal.SIGKILL:  # by the kernel: signals to this pod arrive here first
        return TrainerResult(
            outcome=Outcome.FAILED,
            reason=FailureReason.OUT_OF_MEMORY,
            message=f"the checks were killed{_at(work)}, most likely because they needed more memory than there is: a"
            " row, its text after the chat template, or a file of the base model is too large; split or remove it",
        )
    if code in _CRASHES:
        return TrainerResult(
            outcome=Outcome.FAILED,
            reason=FailureReason.INTERNAL_ERROR,
            message=f"the checks crashed ({signal.Signals(-code).name}){_at(work)} while they read the base model's"
            " files or the data: copy them again, or use others; the log may name the library",
        )
    return TrainerResult(
        outcome=Outcome.FAILED,
        reason=FailureReason.INTERNAL_ERROR,
        message=f"the checks exited with code {code if code >= 0 else 128 - code} without a result; see the log",
        retryable=code != ExitCode.USER_FAULT,
    )


def _at(work: str) -> str:
    return f" at {work}" if work else ""
