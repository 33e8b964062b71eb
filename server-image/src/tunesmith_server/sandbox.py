"""Child processes for work on untrusted files, with limits on memory, processor time and silence.

Each child is forked from a small server process that has only the libraries loaded, so a start takes milliseconds. A
child that exceeds a limit is killed, and an exception reports the reason.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from multiprocessing.connection import Connection

_EXIT_SECONDS = 5.0
_MAX_MESSAGE_BYTES = 16 * 1024 * 1024


class ChildExitedError(Exception):
    """The child exited without a result. The message is a clause, such as "needed more than 256 MiB of memory"."""


@dataclass(frozen=True)
class ChildLimits:
    """Limits of a child.

    Attributes:
        memory: bytes that it may allocate after its start.
        cpu_seconds: processor time in seconds.
    """

    memory: int
    cpu_seconds: int


class Sandbox:
    """Launcher of children.

    Args:
        modules: modules that the server process loads before children are forked.
    """

    def __init__(self, modules: Iterable[str]) -> None:
        # One thread per child: the limits apply to a process, and pools of idle threads would take memory.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(modules))

    def start(self, function: Callable[..., None], arguments: tuple[Any, ...], limits: ChildLimits) -> Child:
        """Start `function(channel, *arguments)` in a child."""
        own, other = self._context.Pipe()
        process = self._context.Process(target=_run, args=(other, limits, function, arguments), daemon=True)
        process.start()
        other.close()
        return Child(process, own, limits)


class Channel:
    """Child's end of the pipe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def send(self, kind: str, value: object = None) -> None:
        """Send a message to the parent."""
        self._connection.send_bytes(json.dumps([kind, value]).encode())

    def request(self, kind: str, value: object = None) -> Any:  # noqa: ANN401 - JSON
        """Send a message to the parent and return its answer."""
        self.send(kind, value)
        return json.loads(self._connection.recv_bytes(_MAX_MESSAGE_BYTES))


class Child:
    """Handle of a child in its parent."""

    def __init__(self, process: Any, connection: Connection, limits: ChildLimits) -> None:  # noqa: ANN401 - a Process of the context
        self._process = process
        self._connection = connection
        self._limits = limits

    def receive(self, seconds: float) -> tuple[str, Any]:
        """Return the next message.

        Raises:
            ChildExitedError: the child exited, or was killed because it sent nothing for `seconds`.
        """
        try:
            if not self._connection.poll(seconds):
                self.kill()
                raise ChildExitedError(f"took more than {seconds:g} seconds")
            kind, value = json.loads(self._connection.recv_bytes(_MAX_MESSAGE_BYTES))
        except (EOFError, OSError, ValueError):
            self._process.join(_EXIT_SECONDS)
            raise ChildExitedError(self._cause()) from None
        return str(kind), value

    def answer(self, value: object = None) -> None:
        """Answer the child's question. If the child has exited, the next `receive` raises."""
        with suppress(OSError, ValueError):
            self._connection.send_bytes(json.dumps(value).encode())

    def kill(self) -> None:
        """Kill the child if it is still running. Thread-safe."""
        with suppress(OSError, ValueError, AttributeError):
            self._process.kill()

    def close(self) -> None:
        """Kill the child if it is still running, and release its resources."""
        self.kill()
        self._process.join(_EXIT_SECONDS)
        self._connection.close()

    def _cause(self) -> str:
        code = self._process.exitcode
        if code == -signal.SIGXCPU:
            return f"needed more than {self._limits.cpu_seconds} seconds of processor time"
        if code == -signal.SIGKILL:
            return "was killed, probably because memory ran out"
        if code is not None and code < 0:
            return f"was terminated by {signal.Signals(-code).name}"
        return f"exited with code {code}"


def _run(
    connection: Connection, limits: ChildLimits, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    # If memory runs out nevertheless, the kernel kills this process first, not the agent or the engine.
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    # SIGXCPU at the soft limit, SIGKILL at the hard one.
    _limit(resource.RLIMIT_CPU, limits.cpu_seconds, limits.cpu_seconds + 5)
    _limit(resource.RLIMIT_DATA, *[_allocated() + limits.memory] * 2)
    _limit(resource.RLIMIT_CORE, 0, 0)
    function(Channel(connection), *arguments)


def _limit(kind: int, soft: int, hard: int) -> None:
    _, highest = resource.getrlimit(kind)
    if highest != resource.RLIM_INFINITY:
        soft, hard = min(soft, highest), min(hard, highest)
    resource.setrlimit(kind, (soft, hard))


def _allocated() -> int:
    """Return the bytes of memory that this process has allocated, as the kernel counts them for RLIMIT_DATA."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    return 0
