"""The cluster's processes on this machine, found by a mark in their environment instead of by pid files.

A pid file can be missing (killed between fork and write) or stale (the number belongs to someone else now). The
environment a process was started with cannot: whatever bears this cluster's mark is this cluster's.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from e2e.cluster.layout import ClusterError, Layout
from e2e.cluster.steps import last_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

STATE_MARK = "TUNESMITH_CLUSTER_STATE"
CONFIGURATION_MARK = "TUNESMITH_CLUSTER_CONFIGURATION"
SHOWN_SECONDS = 1.0
"""For a moment after its start the kernel shows no environment of a process."""


@dataclass(frozen=True)
class Component:
    """A program that the cluster keeps running."""

    name: str
    command: tuple[str, ...]
    """Absolute path of the program, then its arguments."""
    files: tuple[Path, ...] = ()
    """Files whose content makes a running process out of date when it changes."""

    @property
    def digest(self) -> str:
        """Of everything the running process depends on."""
        digest = hashlib.sha256("\0".join(self.command).encode())
        digest.update(os.path.realpath(self.command[0]).encode())
        for file in self.files:
            digest.update(file.read_bytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Process:
    """A live process that bears a cluster's mark."""

    pid: int
    command: tuple[str, ...]
    state: str
    configuration: str


def marked_processes() -> list[Process]:
    """Every live process of any Tunesmith cluster on this machine."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = dict(
                pair.split("=", 1)
                for pair in (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                if "=" in pair
            )
            command = tuple((entry / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0"))
        except (OSError, ProcessLookupError):
            continue  # it has exited meanwhile
        if STATE_MARK in environment and command != ("",):
            found.append(
                Process(int(entry.name), command, environment[STATE_MARK], environment.get(CONFIGURATION_MARK, ""))
            )
    return found


def running(layout: Layout, component: Component) -> Process | None:
    """The live process of `component`, whatever its configuration."""
    for process in marked_processes():
        if process.state == str(layout.state) and process.command[0] == component.command[0]:
            return process
    return None


def log_of(layout: Layout, component: Component) -> Path:
    """Where `component` writes."""
    return layout.log / f"{component.name}.log"


def ensure(layout: Layout, component: Component) -> bool:
    """Start `component`, or restart it if its configuration changed; return True if it was started."""
    process = running(layout, component)
    if process is not None and process.configuration == component.digest:
        return False
    if process is not None:
        stop([process.pid])
    layout.log.mkdir(parents=True, exist_ok=True)
    environment = {
        "PATH": f"{layout.bin}:{os.environ.get('PATH', '/usr/sbin:/usr/bin:/sbin:/bin')}",
        "HOME": "/root",
        STATE_MARK: str(layout.state),
        CONFIGURATION_MARK: component.digest,
    }
    with log_of(layout, component).open("ab") as log:
        subprocess.Popen(
            component.command,
            cwd=layout.state,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return True


def require_alive(layout: Layout, component: Component) -> None:
    """Raise ClusterError, with the last line of the log, if `component` has exited."""
    deadline = time.monotonic() + SHOWN_SECONDS
    while running(layout, component) is None:
        if time.monotonic() >= deadline:
            log = log_of(layout, component)
            raise ClusterError(f"{component.name} has exited: {last_line(log)} (its log: {log})")
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Return True if `pid` is a running process, not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def stop(pids: Iterable[int], grace: float = 10.0) -> None:
    """Terminate processes: SIGTERM, after `grace` seconds SIGKILL; returns when none is left.

    Raises:
        ClusterError: one does not end even after SIGKILL (it hangs in the kernel).
    """
    left = [pid for pid in pids if alive(pid)]
    for number, timeout in ((signal.SIGTERM, grace), (signal.SIGKILL, 10.0)):
        for pid in left:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        deadline = time.monotonic() + timeout
        while left and time.monotonic() < deadline:
            for pid in left:
                try:
                    os.waitpid(pid, os.WNOHANG)  # reaps it where it is our child
                except ChildProcessError:
                    continue
            left = [pid for pid in left if alive(pid)]
            time.sleep(0.02)
        if not left:
            return
    raise ClusterError(
        f"process {left[0]} does not end even when killed: see /proc/{left[0]}/stack, then run `down` again"
    )


def stop_all(layout: Layout, names: Sequence[str] | None = None, grace: float = 10.0) -> None:
    """Terminate this cluster's processes: those whose program is in `names`, or all. For `grace` see `stop`."""
    own = [process for process in marked_processes() if process.state == str(layout.state)]
    stop([process.pid for process in own if names is None or Path(process.command[0]).name in names], grace)
