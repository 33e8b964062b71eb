"""Work on what a job brings that may never end, and the time that it may take.

A chat template can repeat without end and a regular expression can backtrack for ever; neither can be stopped from
within, because C code holds the interpreter. So another process watches: see `watched`.
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
"""Variable with the file that both processes map."""
_SIZE = 4096
_HEAD = struct.Struct("=dH")
_open: dict[str, mmap.mmap] = {}


def create(path: Path) -> mmap.mmap:
    """Return the watching process's map of a new file."""
    path.write_bytes(b"\0" * _SIZE)
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), _SIZE)


def overdue(slot: mmap.mmap) -> str | None:
    """Return what the watched process is doing for longer than it may; None where nothing is."""
    deadline, size = _HEAD.unpack_from(slot)
    if not deadline or time.monotonic() < deadline:
        return None
    return slot[_HEAD.size : _HEAD.size + size].decode("utf-8", "replace")


@contextmanager
def limited(what: str, seconds: float = 60.0) -> Iterator[None]:
    """Announce work that may take so long and no longer; nothing where no process watches.

    Args:
        what: it is, for the sentence about its end.
        seconds: of the clock on the wall.
    """
    slot = _slot()
    if slot is None:
        yield
        return
    text = what.encode("utf-8", "replace")[: _SIZE - _HEAD.size]
    before = slot[: _HEAD.size + _HEAD.unpack_from(slot)[1]]
    slot[: _HEAD.size + len(text)] = _HEAD.pack(time.monotonic() + seconds, len(text)) + text
    try:
        yield
    finally:
        slot[: len(before)] = before


def _slot() -> mmap.mmap | None:
    path = os.environ.get(ACTIVITY)
    if path is None:
        return None
    if path not in _open:
        with open(path, "r+b") as file:  # noqa: PTH123 - as short as it gets, once
            _open[path] = mmap.mmap(file.fileno(), _SIZE)
    return _open[path]
