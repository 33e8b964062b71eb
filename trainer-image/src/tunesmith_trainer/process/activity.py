"""Limit the time of work on untrusted input that may never finish.

A chat template can loop forever and a regular expression can backtrack forever; neither can be interrupted from within,
because C code holds the interpreter lock. So another process watches: see `watched`.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ACTIVITY = "TUNESMITH_ACTIVITY"
"""Environment variable with the path of the file that both processes map."""
_SIZE = 4096
_HEAD = struct.Struct("=dH")
_open: dict[str, mmap.mmap] = {}


def create(path: Path) -> mmap.mmap:
    """Create a file and return the watching process's memory map of it."""
    path.write_bytes(b"\0" * _SIZE)
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), _SIZE)


def overdue(slot: mmap.mmap) -> str | None:
    """Return the description of work that exceeds its time limit; None if there is no such work."""
    deadline, _ = _HEAD.unpack_from(slot)
    return None if not deadline or time.monotonic() < deadline else current(slot)


def current(slot: mmap.mmap) -> str:
    """Return the description of the work that the watched process has announced; empty if there is none."""
    _, size = _HEAD.unpack_from(slot)
    return slot[_HEAD.size : _HEAD.size + size].decode("utf-8", "replace")


@contextmanager
def limited(description: str, seconds: float = 60.0) -> Iterator[None]:
    """Announce work with a time limit to the watching process; do nothing if no process watches.

    Args:
        description: description of the work, for the message when it exceeds the limit.
        seconds: time limit, in seconds of wall-clock time; infinite: the description only shows where a process was
            killed.
    """
    slot = _slot()
    if slot is None:
        yield
        return
    text = description.encode("utf-8", "replace")[: _SIZE - _HEAD.size]
    previous = slot[: _HEAD.size + _HEAD.unpack_from(slot)[1]]
    slot[: _HEAD.size + len(text)] = _HEAD.pack(time.monotonic() + seconds, len(text)) + text
    try:
        yield
    finally:
        slot[: len(previous)] = previous


def _slot() -> mmap.mmap | None:
    path = os.environ.get(ACTIVITY)
    if path is None:
        return None
    if path not in _open:
        with open(path, "r+b") as file:  # noqa: PTH123 - as fast as possible, and once
            _open[path] = mmap.mmap(file.fileno(), _SIZE)
    return _open[path]
