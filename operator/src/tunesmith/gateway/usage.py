"""Tokens of a request: an estimate before it is sent, and the engine's count in its answer. Pure."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tunesmith.gateway.events import EVENT_END

if TYPE_CHECKING:
    from tunesmith.gateway.body import Body

_BYTES_PER_TOKEN = 4
"""Bytes of a prompt per token, roughly, in the tokenizers of current models."""
_TAIL_BYTES = 4096
# Quotes within a JSON string are escaped, so a model's text never matches.
_USAGE = re.compile(rb'"usage"\s*:\s*\{((?:[^{}]|\{[^{}]*\})*)\}')
_TOTAL = re.compile(rb'"total_tokens"\s*:\s*(\d{1,9})\b')
_PARTS = re.compile(
    rb'"(?:input_tokens|output_tokens|cache_creation_input_tokens|cache_read_input_tokens)"\s*:\s*(\d{1,9})\b'
)
"""Parts of the total in Anthropic's schema, which has no total."""
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')


def estimated_prompt_tokens(body: Body) -> int:
    """Return the approximate number of tokens of a body's prompts."""
    return 1 + sum(len(memoryview(raw)) for raw in body.members.values()) // _BYTES_PER_TOKEN


def estimated_tokens(body: Body) -> int:
    """Return the approximate number of tokens of a request: its prompts, and the longest answers it asks for."""
    return estimated_prompt_tokens(body) + body.sequences * (body.max_tokens or 0)


def _total(text: bytes) -> int | None:
    """Return the tokens of the last usage in a text; None if it has none."""
    found = _USAGE.findall(text)
    if not found:
        return None
    total = _TOTAL.search(found[-1])
    if total is not None:
        return int(total[1])
    parts = _PARTS.findall(found[-1])
    return sum(map(int, parts)) if parts else None


class AnswerUsage:
    """The tokens of one answer, read while it passes.

    Args:
        estimate: tokens of the prompts, for answers that end without a count.
        hide: the count was requested by the gateway, so the event that carries it is kept from the client.
    """

    def __init__(self, estimate: int, *, hide: bool) -> None:
        self._estimate = estimate
        self._hide = hide
        self._total: int | None = None
        self._events = 0
        self._bytes = 0
        self._head = b""
        self._tail = b""

    @property
    def tokens(self) -> int:
        """Tokens of prompts and answer. Without the engine's count: about one per event, or by the answer's size."""
        total = self._total
        if total is None:
            total = _total(self._tail)
        if total is None:  # the beginning of a ranking
            total = _total(self._head)
        return self._estimate + self._events + self._bytes // _BYTES_PER_TOKEN if total is None else total

    def pass_events(self, events: bytes) -> bytes:
        """Read whole events, and return those for the client."""
        self._events += events.count(b"data:")
        if b'"usage"' not in events:
            return events
        kept = []
        for event in events.split(EVENT_END):
            found = _total(event)
            if found is not None:
                self._total = found
                if self._hide and _NO_CHOICES.search(event):
                    continue
            kept.append(event)
        return EVENT_END.join(kept)

    def read_body(self, piece: bytes) -> None:
        """Read the next piece of an answer that is not a stream."""
        self._head = self._head or piece[:_TAIL_BYTES]
        self._bytes += len(piece)
        self._tail = (self._tail + piece)[-_TAIL_BYTES:] if len(piece) < _TAIL_BYTES else piece[-_TAIL_BYTES:]
