"""Supervisor of `vllm serve`, the first process of the engine's container: `python3 -m tunesmith_supervisor MODEL …`.

It starts vLLM, and starts it again as soon as it exits, because the kubelet waits longer before each restart of a
container. Before a restart all of vLLM's processes are killed, and the agent gets a report of the exit: its reason, the
last error line, and the requests that the engine was processing. A hung engine is killed. The container exits if vLLM
does not start in several attempts, with the reason as the last line of its log, which Kubernetes reports.

vLLM listens on IPv4 only unless `--host` is an IPv6 address, and exits if the machine has no IPv6, so the supervisor
sets the host. It runs in the engine's image, so it uses the standard library only.

Environment:
    TUNESMITH_AGENT_URL: URL of the agent; absent: nothing is reported.
    TUNESMITH_ADMIN_TOKEN_FILE: file with the agent's token.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from tunesmith_server.middleware import tunesmith_journal, tunesmith_output, tunesmith_reports
else:
    # Beside this file, which the agent puts on the engine's PYTHONPATH.
    import tunesmith_journal
    import tunesmith_output
    import tunesmith_reports

PAUSES = (1.0, 10.0)
"""Seconds before the next attempt after one, two, … consecutive failed starts; after one more, the container exits."""
START_SECONDS = 3600.0
"""Time in which vLLM must answer its health check."""
HEALTH_SECONDS = 1.0
"""Time between two health checks of an engine that is ready."""
START_CHECK_SECONDS = 0.25
"""Time between two health checks of an engine that is starting."""
ANSWER_SECONDS = 10.0
"""Timeout of a health check."""
HUNG_SECONDS = 120.0
"""Time without an answer to a health check after which an engine that was ready counts as hung."""
DEAD_SECONDS = 2.0
"""Time for which vLLM may still answer requests and exit after its health check reported that it is dead."""
TERMINATE_SECONDS = 5.0
"""Time for which an engine that is still starting may ignore SIGTERM."""
DEFAULT_PORT = 8000
RESTART_CODE = 75
"""Exit code of an engine that the agent restarts because its answers changed: no request is the cause."""
MAX_REQUESTS = 256
"""Requests in the report of an exit."""
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
_OUTPUT_SECONDS = 2.0


def host() -> str:
    """Return the address to listen on: `::`, which accepts IPv4 too, or `0.0.0.0` if the machine has no IPv6."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            if probe.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
                return "0.0.0.0"  # noqa: S104 - the pod's own network; every route requires a token
            probe.bind(("::", 0))
    except OSError:
        return "0.0.0.0"  # noqa: S104 - the same
    return "::"


def port(arguments: list[str]) -> int:
    """Return the port in vLLM's arguments."""
    for index, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == "--port":
            text = value or "".join(arguments[index + 1 : index + 2])
            return int(text) if text.isdecimal() else DEFAULT_PORT
    return DEFAULT_PORT


@dataclass(frozen=True)
class Exit:
    """Exit of an engine. `code`: its exit code, or minus the signal. `ready`: it had answered its health check."""

    code: int
    ready: bool
    reason: str
    error: str

    @property
    def sentence(self) -> str:
        """Reason and error."""
        return f"{self.reason}: {self.error}" if self.error else self.reason

    @property
    def container_code(self) -> int:
        """Exit code for the container; never 0."""
        return 128 - self.code if self.code < 0 else self.code or 1


class Health(threading.Thread):
    """Health checks of one engine: records that it is ready, and calls `kill` with the reason if it hangs."""

    def __init__(self, engine_port: int, kill: Callable[[str], None]) -> None:
        super().__init__(daemon=True)
        self._port = engine_port
        self._kill = kill
        self._stopped = threading.Event()
        self.ready = False

    def stop(self) -> None:
        """Stop the checks."""
        self._stopped.set()

    def run(self) -> None:
        """Check until stopped."""
        started = answered = time.monotonic()
        while not self._stopped.wait(HEALTH_SECONDS if self.ready else START_CHECK_SECONDS):
            status = self._check()
            now = time.monotonic()
            if status == 200:  # noqa: PLR2004 - HTTP
                if not self.ready:
                    _log(f"vLLM answers after {now - started:.1f} s.")
                self.ready, answered = True, now
            elif status is not None and self.ready:
                if not self._stopped.wait(DEAD_SECONDS):
                    self._kill(f"its health check returned {status}")
                return
            limit = HUNG_SECONDS if self.ready else START_SECONDS
            if now - answered >= limit:
                verb = "answered no health check" if self.ready else "did not become ready"
                self._kill(f"it {verb} for {limit:.0f} s")
                return

    def _check(self) -> int | None:
        connection = HTTPConnection("127.0.0.1", self._port, timeout=ANSWER_SECONDS)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status
        except (OSError, HTTPException):
            return None
        finally:
            connection.close()


class Supervisor:
    """Supervisor of one command.

    Args:
        command: the command that starts the engine.
        engine_port: port of its health check.
        reports: sends the reports of exits.
    """

    def __init__(self, command: list[str], engine_port: int, reports: tunesmith_reports.Reports) -> None:
        self._command = command
        self._port = engine_port
        self._reports = reports
        self._id = secrets.token_hex(8)
        self._process: subprocess.Popen[bytes] | None = None
        self._health: Health | None = None
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._killed_for = ""

    def run(self) -> int:
        """Run the engine until SIGTERM or until it does not start; return the exit code of the container."""
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)  # orphans of the engine become children of this process
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._terminate())
        failed_starts = 0
        while True:
            ended = self._run_once()
            if self._stopping.is_set():
                return 0
            failed_starts = 0 if ended.ready else failed_starts + 1
            if failed_starts > len(PAUSES):
                _log(f"vLLM did not start in {failed_starts} attempts ({ended.reason}){_after(ended.error)}")
                return ended.container_code
            _log(f"vLLM stopped ({ended.reason}) and is started again{_after(ended.error)}")
            if failed_starts and self._stopping.wait(PAUSES[failed_starts - 1]):
                return 0

    def _run_once(self) -> Exit:
        """Start the engine, and return its exit once none of its processes is left."""
        # The agent compares it with what the engine reports, which has it from its environment.
        started, out_of_memory = round(time.time(), 3), _out_of_memory_kills()
        journal, output = _journal(), tunesmith_output.Output()
        self._start(journal, output, started)
        process = self._process
        assert process is not None  # noqa: S101 - for the type checker
        health = self._health = Health(self._port, self._kill)
        health.start()
        code = _wait_for(process)
        health.stop()
        now = time.monotonic()
        with self._lock:
            self._process = None
            killed_for, self._killed_for = self._killed_for, ""
        # What the engine shares with the supervisor is read once nothing can write it any more.
        _kill_all()
        output.finish(_OUTPUT_SECONDS)
        reason = killed_for or _reason(code)
        if _out_of_memory_kills() > out_of_memory:
            reason += ", out of memory"
        error = output.error(now) or ("" if code < 0 else output.last_line())
        requests = [] if journal is None else tunesmith_journal.read(journal, MAX_REQUESTS)
        if journal is not None:
            os.close(journal)
        if os.getpid() == 1:
            _remove_shared_memory()
        ended = Exit(code, health.ready, reason, error)
        if not self._stopping.is_set():
            is_crash = code != RESTART_CODE
            self._reports.send(
                {
                    "id": secrets.token_hex(8),
                    "startedAt": started,
                    "at": time.time(),
                    "wasReady": health.ready,
                    "isCrash": is_crash,
                    "reason": ended.sentence,
                    "requests": [request._asdict() for request in requests] if is_crash else [],
                }
            )
        return ended

    def _start(self, journal: int | None, output: tunesmith_output.Output, started: float) -> None:
        environment = {
            **os.environ,
            tunesmith_journal.STARTED_AT: f"{started:.3f}",
            tunesmith_journal.SUPERVISOR: self._id,
        }
        if journal is not None:
            environment[tunesmith_journal.JOURNAL_FD] = str(journal)
        try:
            process = subprocess.Popen(  # noqa: S603 - the engine's own program
                self._command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=() if journal is None else (journal,),
            )
        except OSError as error:
            raise SystemExit(
                f"{self._command[0]} cannot be started ({error.strerror}): the engine's image must contain it."
            ) from None
        for stream, target in ((process.stdout, 1), (process.stderr, 2)):
            assert stream is not None  # noqa: S101 - for the type checker
            output.copy(os.dup(stream.fileno()), target)
            stream.close()
        with self._lock:
            self._process = process
        if self._stopping.is_set():
            self._terminate()

    def _terminate(self) -> None:
        """Forward SIGTERM; an engine that is still starting ignores it, and is killed."""
        self._stopping.set()
        process, health = self._process, self._health
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)
        if health is None or not health.ready:
            timer = threading.Timer(TERMINATE_SECONDS, self._kill, ("it was terminated during its start",))
            timer.daemon = True
            timer.start()

    def _kill(self, reason: str) -> None:
        with self._lock:
            if self._process is not None and not self._killed_for:
                self._killed_for = reason
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._process.pid, signal.SIGKILL)


def _wait_for(process: subprocess.Popen[bytes]) -> int:
    """Return the exit code of a child, or minus its signal, and reap all other processes that end meanwhile."""
    while True:
        pid, status = os.wait()
        if pid == process.pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode


def _kill_all() -> None:
    """Kill and reap all descendants; those of a dead process become children of this one."""
    while True:
        for pid in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.wait()
        except ChildProcessError:
            return


class _Stat(NamedTuple):
    pid: int
    parent: int


def _children() -> list[int]:
    return [stat.pid for stat in map(_stat, Path("/proc").glob("[0-9]*/stat")) if stat.parent == os.getpid()]


def _stat(path: Path) -> _Stat:
    try:
        # The command in parentheses may contain anything.
        return _Stat(int(path.parent.name), int(path.read_text().rpartition(")")[2].split()[1]))
    except (OSError, ValueError, IndexError):
        return _Stat(0, -1)


def _journal() -> int | None:
    try:
        return tunesmith_journal.create()
    except OSError as error:
        _log(f"the requests in the engine are not recorded: {error.strerror}")
        return None


def _reason(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _out_of_memory_kills() -> int:
    """Return the number of processes of this container that were killed because it ran out of memory; 0 if unknown."""
    for path in ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"):
        with contextlib.suppress(OSError, ValueError):
            for line in Path(path).read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
    return 0


def _remove_shared_memory() -> None:
    """Remove what killed processes left in the container's /dev/shm, which counts as its memory."""
    for path in Path("/dev/shm").glob("*"):  # noqa: S108 - the container's own
        with contextlib.suppress(OSError):
            path.unlink()


def _after(error: str) -> str:
    return f": {error}" if error else "."


def _log(message: str) -> None:
    sys.stderr.write(f"tunesmith: {message}\n")
    sys.stderr.flush()


def main(arguments: list[str]) -> int:
    """Run `vllm serve` with arguments."""
    command = ["vllm", "serve", *arguments, "--host", host()]
    return Supervisor(command, port(arguments), tunesmith_reports.Reports()).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
