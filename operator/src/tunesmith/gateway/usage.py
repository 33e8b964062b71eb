"""Tokens of a request: an estimate before it is sent, and the engine's count in its answer. Pure."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from tunesmith.gateway.events import EVENT_END

if TYPE_CHECKING:
    from tunesmith.gateway.body import Body

_BYTES_PER_TOKEN = 4
"""Bytes of a prompt per token, roughly, in the tokenizers of current models."""
_TAIL_BYTES = 4096
# Quotes within a JSON string are escaped, so a model's text never matches.
_USAGE = re.compile(rb'"usage"\s*:\s*\{((?:[^{}]|\{[^{}]*\})*)\}')
_COUNT = re.compile(
    rb'"(prompt_tokens|completion_tokens|total_tokens|input_tokens|output_tokens|cache_creation_input_tokens'
    rb'|cache_read_input_tokens)"\s*:\s*(\d{1,9})\b'
)
_PROMPT = (b"prompt_tokens", b"input_tokens", b"cache_creation_input_tokens", b"cache_read_input_tokens")
_COMPLETION = (b"completion_tokens", b"output_tokens")
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')


def estimated_prompt_tokens(body: Body) -> int:
    """Return the approximate number of tokens of a body's prompts."""
    return 1 + sum(len(memoryview(raw)) for raw in body.members.values()) // _BYTES_PER_TOKEN


def estimated_tokens(body: Body) -> int:
    """Return the approximate number of tokens of a request: its prompts, and the longest answers it asks for."""
    return estimated_prompt_tokens(body) + body.sequences * (body.max_tokens or 0)


class TokenCounts(NamedTuple):
    """Tokens of a request's prompts, of its answer, and of both."""

    prompt: int
    completion: int
    total: int


def _read(text: bytes) -> TokenCounts | None:
    """Return the last usage in a text; None if it has none. Anthropic's schema has no total."""
    found = _USAGE.findall(text)
    counts = {name: int(count) for name, count in _COUNT.findall(found[-1])} if found else {}
    if not counts:
        return None
    prompt = sum(counts.get(name, 0) for name in _PROMPT)
    completion = sum(counts.get(name, 0) for name in _COMPLETION)
    total = counts.get(b"total_tokens", prompt + completion)
    return TokenCounts(prompt or total - completion, completion, total)


class AnswerUsage:
    """The tokens of one answer, read while it passes.

    Args:
        estimate: tokens of the prompts, for answers that end without a count.
        hide: the count was requested by the gateway, so the event that carries it is kept from the client.
    """

    def __init__(self, estimate: int, *, hide: bool) -> None:
        self._estimate = estimate
        self._hide = hide
        self._counts: TokenCounts | None = None
        self._events = 0
        self._bytes = 0
        self._head = b""
        self._tail = b""

    @property
    def counts(self) -> TokenCounts:
        """Tokens of prompts and answer. Without the engine's count: about one per event, or by the answer's size."""
        if self._counts is None:
            self._counts = _read(self._tail) or _read(self._head)  # the head of a ranking
        if self._counts is not None:
            return self._counts
        completion = self._events + self._bytes // _BYTES_PER_TOKEN
        return TokenCounts(self._estimate, completion, self._estimate + completion)

    def pass_events(self, events: bytes) -> bytes:
        """Read whole events, and return those for the client."""
        self._events += events.count(b"data:")
        if b'"usage"' not in events:
            return events
        kept = []
        for event in events.split(EVENT_END):
            found = _read(event)
            if found is not None:
                self._counts = found
                if self._hide and _NO_CHOICES.search(event):
                    continue
            kept.append(event)
        return EVENT_END.join(kept)

    def read_body(self, piece: bytes | bytearray) -> None:
        """Read the next piece of an answer that is not a stream."""
        self._head = self._head or bytes(piece[:_TAIL_BYTES])
        self._bytes += len(piece)
        self._tail = (self._tail + piece)[-_TAIL_BYTES:] if len(piece) < _TAIL_BYTES else bytes(piece[-_TAIL_BYTES:])
