"""Run the ranks of a pod that has several GPUs, each in its own process, and return one result for all.

torchrun is not used, because it restarts ranks itself and reports only an exit code. The operator starts the attempts,
and needs the result of the rank that caused the failure. Each rank must also receive SIGTERM only once, so that it can
save a checkpoint.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pydantic import ValidationError

from tunesmith.api.conditions import FailureReason
from tunesmith.contracts.result import ExitCode, Outcome, TrainerResult, culpability

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tunesmith_trainer.process.ranks import Ranks

LAUNCHED = "TUNESMITH_LAUNCHED"
"""Set in the environment of a process whose result another process reports."""
SETTLING_SECONDS = 15.0
"""Seconds for ranks that lost a peer to notice it themselves."""
STOPPING_SECONDS = 60.0
"""Seconds between SIGTERM and SIGKILL for ranks that do not exit."""
_POLL_SECONDS = 0.1
_SET_PARENT_DEATH_SIGNAL = 1


@dataclass
class _Process:
    ranks: Ranks
    process: subprocess.Popen[bytes]
    message: Path
    exit_order: int | None = None
    """Position in the order of exits; None while it runs."""

    @property
    def code(self) -> int:
        """Exit code as in a shell: 128 plus the signal's number if a signal terminated it."""
        code = self.process.returncode
        return code if code >= 0 else 128 - code

    @property
    def result(self) -> TrainerResult | None:
        try:
            return TrainerResult.model_validate_json(self.message.read_bytes())
        except (OSError, ValidationError):
            return None


def launch(
    command: Sequence[str],
    first: Ranks,
    count: int,
    folder: Path,
    *,
    settling: float = SETTLING_SECONDS,
    stopping: float = STOPPING_SECONDS,
) -> TrainerResult:
    """Run `count` ranks and return the decisive result: that of the first rank, or of the one that failed.

    Signals are passed on to all ranks, once each. If one fails, the others get time to exit on their own, then
    receive SIGTERM, and finally SIGKILL.

    Args:
        command: the trainer's command; `--termination-message` is added.
        first: first rank to run.
        count: number of ranks.
        folder: folder for their result files.
        settling: seconds that the others get to exit on their own.
        stopping: seconds that they get after SIGTERM.
    """
    if not first.port:
        first = replace(first, port=_free_port())
    shared = {
        "LOCAL_WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // count)),
    }
    running = [
        _start(command, replace(first, rank=first.rank + number, local_rank=number), folder, shared)
        for number in range(count)
    ]

    def pass_on(number: int, frame: object) -> None:  # noqa: ARG001 - a signal handler's signature
        _send_signal(running, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    _wait(running, settling, stopping)
    return _decisive_result(running)


def die_with_launcher() -> None:
    """Have this process killed when its launcher exits: an orphaned rank would write to the next run's folders."""
    if os.environ.get(LAUNCHED):
        die_with_parent()


def die_with_parent() -> None:
    """Have this process killed when its parent exits."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def _start(command: Sequence[str], ranks: Ranks, folder: Path, shared: dict[str, str]) -> _Process:
    message = folder / f"result-{ranks.rank}.json"
    message.unlink(missing_ok=True)
    arguments = [*command, "--termination-message", str(message)]
    environment = {**os.environ, **ranks.environment(), **shared, LAUNCHED: "1"}
    # A separate session: otherwise a terminal's Ctrl-C would reach it twice, and a second signal stops at once.
    process = subprocess.Popen(arguments, env=environment, start_new_session=True)  # noqa: S603 - our own command
    return _Process(ranks, process, message)


def _wait(running: list[_Process], settling: float, stopping: float) -> None:
    exited, failed_at = 0, 0.0
    terminated = killed = False
    while any(rank.exit_order is None for rank in running):
        for rank in running:
            if rank.exit_order is None and rank.process.poll() is not None:
                rank.exit_order = exited = exited + 1
                if rank.code and not failed_at:
                    failed_at = time.monotonic()
        since = time.monotonic() - failed_at if failed_at else 0.0
        if since > settling and not terminated:
            terminated = True
            _send_signal(running, signal.SIGTERM)
        if since > settling + stopping and not killed:
            killed = True
            _send_signal(running, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)


def _send_signal(running: list[_Process], number: int) -> None:
    for rank in running:
        if rank.process.poll() is None:
            rank.process.send_signal(number)


def _decisive_result(running: list[_Process]) -> TrainerResult:
    failed = [rank for rank in running if rank.code]
    decisive = min(failed, key=lambda rank: (culpability(rank.result), rank.exit_order), default=running[0])
    if decisive.code == ExitCode.PREEMPTED:  # all were stopped, and the first rank's result has the checkpoint
        decisive = next(rank for rank in running if rank.code == ExitCode.PREEMPTED)
    result = decisive.result
    if result is not None:
        return result
    name = f"rank {decisive.ranks.rank} of {decisive.ranks.size}"
    if decisive.code == ExitCode.PREEMPTED:
        return TrainerResult(outcome=Outcome.PREEMPTED, message=f"{name} was stopped", retryable=True)
    return TrainerResult(
        outcome=Outcome.FAILED,
        reason=FailureReason.INTERNAL_ERROR,
        message=f"{name} exited with code {decisive.code} without a result; see its log",
        retryable=decisive.code != ExitCode.USER_FAULT,
    )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port: int = listener.getsockname()[1]
        return port
