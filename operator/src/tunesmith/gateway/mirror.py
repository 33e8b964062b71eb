"""A request that is to be mirrored to a shadow, and the answer that its client gets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tunesmith.gateway.catalog import PoolKey

MAX_ANSWER_BYTES = 256 * 1024
"""Longest answer that is compared, in bytes."""


@dataclass(slots=True)
class Mirror:
    """A request that is to be mirrored, and the answer that its client gets.

    Attributes:
        shadow: engine name of the shadow.
        sequences: number of sequences that its engine generates.
        size: reserved bytes.
    """

    shadow: str
    pool: PoolKey
    path: str
    stream: bool
    tenant_salt: str
    request_id: str
    sequences: int
    pieces: list[bytes | memoryview]
    size: int
    _answer: list[bytes] = field(default_factory=list)
    _answer_bytes: int = 0

    def read(self, piece: bytes | bytearray) -> None:
        """Read the next piece of the client's answer."""
        self._answer_bytes += len(piece)
        if self._answer_bytes <= MAX_ANSWER_BYTES:
            self._answer.append(bytes(piece))
        else:
            self._answer.clear()

    @property
    def answer(self) -> bytes | None:
        """The client's answer; None if it is too long to be compared."""
        return b"".join(self._answer) if self._answer_bytes <= MAX_ANSWER_BYTES else None
