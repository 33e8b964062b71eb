"""Inspection of engines' answers in transit: the model that they name, and the end of a server-sent event. Pure."""

from __future__ import annotations

import re
from typing import Any

import orjson

MAX_HELD_BYTES = 64 * 1024
"""Bytes of an answer that are withheld until they show the right model, or until an event is complete."""
EVENT_END = b"\n\n"
COMMENT = b": keep-alive\n\n"
_STRING = rb'"(?:[^"\\]|\\.)*+"'
# The member `model` of the outermost object, after members that are neither objects nor arrays.
_MODEL = re.compile(
    rb"\s*\{(?:\s*+" + _STRING + rb"\s*+:\s*+(?:" + _STRING + rb"|[-+.0-9eE]++|true|false|null)\s*+,)*?"
    rb'\s*+"model"\s*+:\s*+(' + _STRING + rb")"
)


_ENVELOPE = re.compile(rb'\s*+\{(?:\s*+"type"\s*+:\s*+' + _STRING + rb'\s*+,)?+\s*+"([a-z]+)"\s*+:')
"""Beginning of an event up to the object that it contains."""


class WrongModelError(Exception):
    """The answer does not show that it comes from the requested model."""


def names_model(start: bytes | bytearray, engine_name: str, *, complete: bool, envelope: str = "") -> bool | None:
    """Return True if a JSON answer comes from the model, False if not, None if `start` does not show it yet.

    Args:
        start: the answer, or its beginning.
        engine_name: name of the model in the engine.
        complete: `start` is the whole answer.
        envelope: member of an event that contains the answer; empty: `start` is the answer.
    """
    if envelope:
        begin = _ENVELOPE.match(start)
        found = _MODEL.match(start, begin.end()) if begin is not None and begin[1].decode() == envelope else None
    else:
        found = _MODEL.match(start)
    if found is not None:
        return bool(_loads(found.group(1)) == engine_name)
    if not complete:
        return None if len(start) < MAX_HELD_BYTES else False
    document = _loads(start)
    if envelope:
        document = document.get(envelope) if isinstance(document, dict) else None
    return isinstance(document, dict) and document.get("model") == engine_name


def is_error(data: bytes | bytearray) -> bool:
    """Return True for a JSON object with an `error`."""
    document = _loads(data)
    return isinstance(document, dict) and bool(document.get("error"))


def _loads(data: bytes | bytearray) -> Any:  # noqa: ANN401 - any JSON value
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return None


def _last_event_end(data: bytearray, start: int) -> int:
    """Return the offset after the last empty line at or after `start`, or 0."""
    return max(
        (found + len(end) for end in (EVENT_END, b"\r\n\r\n", b"\r\r") if (found := data.rfind(end, start)) >= 0),
        default=0,
    )


class EventStream:
    """The events of one answer. Events are passed whole, so that comments can be inserted between them.

    Comments and empty events pass immediately; the first event with data passes once it names the model, reports an
    error or ends the stream.
    """

    def __init__(self, engine_name: str, envelope: str = "") -> None:
        self._engine_name = engine_name
        self._envelope = envelope
        self._held = bytearray()
        self.named = False
        """True once an event with data has passed."""
        self.between_events = True
        """True if the bytes passed so far end with a whole event."""

    def feed(self, chunk: bytes) -> bytes:
        """Return the bytes that may pass after this chunk.

        Raises:
            WrongModelError: the first event names another model, or no model within `MAX_HELD_BYTES` bytes.
        """
        held = self._held
        if self.named and self.between_events and not held and chunk.endswith(EVENT_END):
            return chunk
        # An event's end may be split across chunks, so the search begins three bytes before this one.
        start = max(0, len(held) - 3)
        held += chunk
        end = _last_event_end(held, start)
        if end:
            if not self.named:
                self._check(bytes(held[:end]), complete=True)
            ready = bytes(held[:end])
            del held[:end]
            self.between_events = True
            return ready
        if len(held) <= MAX_HELD_BYTES:
            return b""
        if not self.named:
            self._check(bytes(held), complete=False)
        ready = bytes(held)
        held.clear()
        self.between_events = False
        return ready

    def end(self) -> bytes:
        """Return the remaining bytes at the end of the stream.

        Raises:
            WrongModelError: the first event does not name the right model.
        """
        if self._held and not self.named:
            self._check(bytes(self._held), complete=True)
        ready = bytes(self._held)
        self._held.clear()
        return ready

    def _check(self, events: bytes, *, complete: bool) -> None:
        lines = events.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for number, line in enumerate(lines):
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if not data:
                continue
            whole_line = complete or number < len(lines) - 1
            names = names_model(data, self._engine_name, complete=whole_line, envelope=self._envelope)
            if data == b"[DONE]" or names or is_error(data):
                self.named = True
                return
            raise WrongModelError
        if not complete:
            raise WrongModelError
