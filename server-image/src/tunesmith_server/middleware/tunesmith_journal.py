"""Journal of the requests that an engine is processing, in memory that outlives the engine's process.

The supervisor creates it and passes it to vLLM as an open file; the middleware writes each request's digest and model,
and the supervisor reads what remains when the process is gone. Standard library only: both run in the engine's image.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from typing import NamedTuple

JOURNAL_FD = "TUNESMITH_JOURNAL_FD"
"""Environment variable that the supervisor sets, as the next ones: number of the open file."""
SUPERVISOR = "TUNESMITH_SUPERVISOR"
"""Identity of the supervisor, which lasts as long as the container."""
STARTED_AT = "TUNESMITH_ENGINE_STARTED_AT"
"""Start of the engine's process, in seconds since 1970."""
DIGEST = re.compile(r"[0-9a-f]{48}")
"""A request's digest, as the gateway sends it: its tenant in the first 8 digits, the body and the model in the rest."""
_TENANT_DIGITS = 8
_SLOTS = 4096
"""Requests in the journal at once; further ones are not recorded."""
_SLOT = struct.Struct("<Q48sH256s")
"""Number (0: free slot), digest, length of the model's name, model."""
_NUMBER = struct.Struct("<Q")


class RecordedRequest(NamedTuple):
    """A request that an engine was processing."""

    digest: str
    model: str


def create() -> int:
    """Return the file descriptor of an empty journal.

    Raises:
        OSError: the system has no anonymous files.
    """
    descriptor = os.memfd_create("tunesmith-journal")
    os.ftruncate(descriptor, _SLOT.size * _SLOTS)
    return descriptor


class Journal:
    """The engine's side. Without the environment variable, nothing is recorded."""

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None
        self._free = list(range(_SLOTS - 1, -1, -1))
        self._number = 0
        descriptor = os.environ.get(JOURNAL_FD, "")
        if descriptor.isdecimal():
            self._memory = mmap.mmap(int(descriptor), _SLOT.size * _SLOTS)

    def begin(self, digest: str, model: str) -> int | None:
        """Record a request; return its slot, or None if it is not recorded."""
        name = model.encode("utf-8", "replace")
        if self._memory is None or not self._free or not DIGEST.fullmatch(digest) or len(name) > 256:  # noqa: PLR2004 - see _SLOT
            return None
        slot = self._free.pop()
        self._number += 1
        # The number is written last, so that a slot is complete if it has one.
        _SLOT.pack_into(self._memory, slot * _SLOT.size, 0, digest.encode(), len(name), name)
        _NUMBER.pack_into(self._memory, slot * _SLOT.size, self._number)
        return slot

    def end(self, slot: int | None) -> None:
        """Remove a request."""
        if slot is not None and self._memory is not None:
            _NUMBER.pack_into(self._memory, slot * _SLOT.size, 0)
            self._free.append(slot)


def read(descriptor: int, limit: int) -> list[RecordedRequest]:
    """Return at most `limit` requests of a journal, the newest of each tenant first.

    Tenants take turns, so that the requests of one do not displace those of others. The engine may have written
    anything: what is not a request is skipped.
    """
    content = os.pread(descriptor, _SLOT.size * _SLOTS, 0)
    found: list[tuple[int, RecordedRequest]] = []
    for number, digest, length, name in _SLOT.iter_unpack(content[: len(content) // _SLOT.size * _SLOT.size]):
        text, model = digest.decode("ascii", "replace"), name[:length].decode("utf-8", "replace")
        if number and DIGEST.fullmatch(text) and model:
            found.append((number, RecordedRequest(text, model)))
    turns: dict[str, int] = {}
    ordered: list[tuple[int, int, RecordedRequest]] = []
    for number, request in sorted(found, reverse=True):
        tenant = request.digest[:_TENANT_DIGITS]
        turns[tenant] = turns.get(tenant, 0) + 1
        ordered.append((turns[tenant], -number, request))
    return list(dict.fromkeys(request for _, _, request in sorted(ordered)))[:limit]
