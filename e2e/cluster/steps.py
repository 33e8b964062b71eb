"""Named steps with their elapsed time, commands that keep their output in a log, and waiting for a condition."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from e2e.cluster.layout import ClusterError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path


def report(text: str) -> None:
    """Print a line and flush it."""
    print(text, flush=True)


@contextmanager
def step(name: str) -> Iterator[None]:
    """Prints `name` with the seconds its block took; on failure report the failed step."""
    started = time.monotonic()
    try:
        yield
    except BaseException:
        print(f"  [{time.monotonic() - started:6.1f} s] {name}: failed", file=sys.stderr, flush=True)
        raise
    report(f"  [{time.monotonic() - started:6.1f} s] {name}")


def last_line(log: Path) -> str:
    """Return the last line of `log` that is not empty, shortened to 300 characters."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - 20_000))
            lines = stream.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


def run_logged(
    command: Sequence[str | Path],
    log: Path,
    what: str,
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> None:
    """Runs `command` with its output appended to `log`.

    Raises:
        ClusterError: it failed; the message contains the log's path and last line.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=environment, cwd=folder, check=False
        )
    if done.returncode:
        raise ClusterError(f"{what} failed with status {done.returncode}: {last_line(log)} (all of its output: {log})")


def output_of(
    command: Sequence[str | Path], *, stdin: bytes | None = None, environment: Mapping[str, str] | None = None
) -> str:
    """Runs `command` and returns what it printed.

    Raises:
        ClusterError: it failed; the message contains its error output.
    """
    done = subprocess.run(command, input=stdin, capture_output=True, env=environment, check=False)
    if done.returncode:
        complaint = " ".join(done.stderr.decode(errors="replace").split())[-500:]
        raise ClusterError(
            f"`{' '.join(str(part) for part in command)}` failed with status {done.returncode}: {complaint}"
        )
    return done.stdout.decode()


def wait_until(condition: Callable[[], str | None], seconds: float, interval: float = 0.2) -> None:
    """Polls `condition` until it returns None.

    Args:
        condition: returns None when it holds, otherwise what is still missing. Raises to give up at once.
        seconds: after this long the last sentence becomes the error.
        interval: seconds between polls.

    Raises:
        ClusterError: the condition did not hold in time.
    """
    deadline = time.monotonic() + seconds
    while (missing := condition()) is not None:
        if time.monotonic() > deadline:
            raise ClusterError(f"after {seconds:.0f} s {missing}")
        time.sleep(interval)
