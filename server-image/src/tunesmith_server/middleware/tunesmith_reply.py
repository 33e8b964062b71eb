"""Reply of the engine to a client: counts its tokens, and marks an error that the engine's death caused.

It runs inside vLLM's interpreter, so it uses the standard library only.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    Message = MutableMapping[str, Any]
    Send = Callable[[Message], Awaitable[None]]

_LOST_HEADER = (b"x-tunesmith-engine-lost", b"true")
"""Header of an error that shows that the engine died while it processed the request."""
# Quotes inside generated text are escaped, so this matches only the reply's own object.
_USAGE = re.compile(rb',\s*"usage"\s*:\s*(\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})')
_USAGE_ONLY = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_CHOICE = re.compile(rb'"choices"\s*:\s*\[\s*\{\s*"index"\s*:\s*([0-9]{1,6})')
# The member `model` of an object that begins a body or an event, after members that are neither objects nor arrays.
_MODEL = (
    rb'^((?:data: )?\s*\{(?:\s*"[^"\\]*"\s*:\s*(?:"[^"\\]*"|[-+.0-9eE]+|true|false|null)\s*,)*?\s*"model"\s*:\s*)%b'
)
_USAGE_BYTES = 1024
_EVENT_BYTES = 4 * 1024 * 1024


class Reply:
    """Forwarder of a reply that counts its tokens from the usage that vLLM reports in it.

    A stream reports its usage in every event, so if the client disconnects, the tokens up to then are counted. Any
    other reply reports it once; if the client disconnects before, its request is counted without tokens.
    """

    def __init__(
        self, send: Send, count: Callable[[str, int, int, int], None], model: str, is_dead: Callable[[], bool]
    ) -> None:
        self._send = send
        self._count = count
        self._model = model
        self._is_dead = is_dead
        self._ok = False
        self._rest = b""
        self._stream = self._began = False
        self._hide_final = self._hide_others = False
        self._prompt = self._completion = 0
        self._choices: dict[bytes, int] = {}
        self._other_name: re.Pattern[bytes] | None = None
        self._start: Message | None = None
        self._held = b""

    def hide_usage(self, *, final: bool, others: bool) -> None:
        """Expect a stream, and remove the usage from its last event (`final`), or from all others (`others`)."""
        self._stream, self._hide_final, self._hide_others = True, final, others

    def rename(self, name: str) -> None:
        """Replace a name of the base model by the name that the client requested, in the reply's member `model`."""
        self._other_name = re.compile(_MODEL % re.escape(json.dumps(name).encode()), re.MULTILINE)

    async def send(self, message: Message) -> None:
        """Forward a message of the application.

        Raises:
            ConnectionAbortedError: the engine died before the stream's first event. Its error is not forwarded: the
                closed connection shows that the request may be sent to another pod.
        """
        if message["type"] == "http.response.start":
            self._ok = 200 <= message["status"] < 300  # noqa: PLR2004 - HTTP success
            if self._ok:
                self._count(self._model, 1, 0, 0)
            else:
                self._stream = False
                if message["status"] >= 500 and self._is_dead():  # noqa: PLR2004 - HTTP
                    message = {**message, "headers": [*message.get("headers", ()), _LOST_HEADER]}
        elif message["type"] == "http.response.body" and self._ok:
            body = message.get("body", b"")
            if self._stream and not self._began:
                if self._is_dead():
                    raise ConnectionAbortedError("the engine died")
                self._began = bool(body)
            if self._stream:
                body = self._events(body, last=not message.get("more_body", False))
                message = {**message, "body": body}
            else:
                # A usage object split over two pieces is found by prepending the end of the first to the second.
                window = self._rest + body
                self._report(window)
                self._rest = window[-_USAGE_BYTES:]
        if self._other_name is not None and self._ok:
            await self._send_renamed(message, self._other_name)
        else:
            await self._send(message)

    async def _send_renamed(self, message: Message, other_name: re.Pattern[bytes]) -> None:
        """Send a message of a reply whose model is renamed: a body as a whole, since its length changes."""

        def rename(body: bytes, count: int = 0) -> bytes:
            own = json.dumps(self._model).encode()
            return other_name.sub(lambda found: bytes(found[1]) + own, body, count=count)

        if self._stream:
            await self._send({**message, "body": rename(message["body"])} if "body" in message else message)
        elif message["type"] == "http.response.start":
            self._start = message
        else:
            self._held += message.get("body", b"")
            if self._start is None or message.get("more_body", False):
                return
            body = rename(self._held, 1)
            headers = [header for header in self._start.get("headers", ()) if header[0].lower() != b"content-length"]
            await self._send({**self._start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
            await self._send({"type": "http.response.body", "body": body})

    def _events(self, body: bytes, *, last: bool) -> bytes:
        """Return the complete events so far, without the usage that the client did not request."""
        body, self._rest = self._rest + body, b""
        if not last and not body.endswith(b"\n\n"):
            complete, separator, rest = body.rpartition(b"\n\n")
            if len(rest) < _EVENT_BYTES:
                body, self._rest = complete + separator, rest
        if b'"usage"' not in body:
            return body
        events = body.split(b"\n\n")
        return b"\n\n".join(event for event in map(self._event, events) if event is not None)

    def _event(self, event: bytes) -> bytes | None:
        if not event.startswith(b"data: {") or (found := self._report(event)) is None:
            return event
        final = _USAGE_ONLY.search(event) is not None
        if final:
            return None if self._hide_final else event
        return event[: found.start()] + event[found.end() :] if self._hide_others else event

    def _report(self, text: bytes) -> re.Match[bytes] | None:
        """Count the tokens that the last usage in a text adds to those already counted; return the usage's place."""
        found = _last_usage(text)
        if found is None:
            return None
        try:
            usage = json.loads(found[1])
        except ValueError:
            return None
        prompt, completion = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        if (choice := _CHOICE.search(text)) and self._stream:  # its event reports the tokens of this choice
            self._choices[choice[1]] = completion
            completion = sum(self._choices.values())
        self._count(self._model, 0, max(0, prompt - self._prompt), max(0, completion - self._completion))
        self._prompt, self._completion = max(prompt, self._prompt), max(completion, self._completion)
        return found


def _last_usage(text: bytes) -> re.Match[bytes] | None:
    """Return the place of the last usage in a text. Most texts are events, in which it is the last member."""
    found = _USAGE.match(text, text.rfind(b",", 0, max(0, text.rfind(b'"usage"'))))
    if found is None:
        for found in _USAGE.finditer(text):  # noqa: B007 - the last one is used
            pass
    return found
