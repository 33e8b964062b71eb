"""Reply of the engine to a client: counts its tokens, and marks an error that the engine's death caused.

It runs inside vLLM's interpreter, so it uses the standard library only.
"""

from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    from tunesmith_server.middleware import tunesmith_traffic

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
_ERROR_EVENTS = (b'data: {"error"', b"event: error")
_USAGE_BYTES = 1024
_EVENT_BYTES = 4 * 1024 * 1024


class Reply:
    """Forwarder of a reply that counts its tokens from the usage that vLLM reports in it.

    A stream reports its usage in every event, so if the client disconnects, the tokens up to then are counted. Any
    other reply reports it once; if the client disconnects before, its request is counted without tokens.

    The replies of some APIs contain objects of the client before the model and its usage. Of those, the model is moved
    to the beginning, and the usage to the end, so that both are found without reading what the client sent.

    Args:
        send: sends a message to the client.
        count: called with the model, and with further requests, tokens of prompts and tokens of answers.
        model: name of the model that the client requested.
        is_dead: returns True if the engine died.
        answer: gets the course of the reply.
        envelope: member of such an API's event that contains the reply; empty: another API.
    """

    def __init__(
        self,
        send: Send,
        count: Callable[[str, int, int, int], None],
        model: str,
        is_dead: Callable[[], bool],
        answer: tunesmith_traffic.Answer,
        envelope: str = "",
    ) -> None:
        self._answer = answer
        self._send = send
        self._count = count
        self._model = model
        self._is_dead = is_dead
        self._envelope = envelope
        self._other_model = ""
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
        self._answer.stream = True

    def expect_stream(self) -> None:
        """Expect a stream that reports its usage without being asked for it."""
        self._stream = self._answer.stream = True

    def rename(self, name: str) -> None:
        """Replace a name of the base model by the name that the client requested, in the reply's member `model`."""
        self._other_model = name
        self._other_name = re.compile(_MODEL % re.escape(json.dumps(name).encode()), re.MULTILINE)

    async def send(self, message: Message) -> None:
        """Forward a message of the application.

        Raises:
            ConnectionAbortedError: the engine died before the stream's first event. Its error is not forwarded: the
                closed connection shows that the request may be sent to another pod.
        """
        if message["type"] == "http.response.start":
            self._answer.status = message["status"]
            self._ok = 200 <= message["status"] < 300  # noqa: PLR2004 - HTTP success
            if self._ok:
                self._count(self._model, 1, 0, 0)
            else:
                self._stream = False
                if message["status"] >= 500 and self._is_dead():  # noqa: PLR2004 - HTTP
                    message = {**message, "headers": [*message.get("headers", ()), _LOST_HEADER]}
        elif message["type"] == "http.response.body" and self._ok:
            message = self._read(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._answer.complete = True
        if self._ok and self._envelope:
            await self._send_ordered(message)
        elif self._ok and self._other_name is not None:
            await self._send_renamed(message, self._other_name)
        else:
            await self._send(message)

    def _read(self, message: Message) -> Message:
        """Count the tokens in a piece of a reply's body, and return the piece for the client."""
        body = message.get("body", b"")
        if self._stream:
            return {**message, "body": self._pass_events(body, last=not message.get("more_body", False))}
        if not self._envelope:
            # A usage object split over two pieces is found by prepending the end of the first to the second.
            window = self._rest + body
            self._report(window)
            self._rest = window[-_USAGE_BYTES:]
        return message

    def _pass_events(self, body: bytes, *, last: bool) -> bytes:
        """Return the bytes of a stream that may be sent now.

        Raises:
            ConnectionAbortedError: the engine died before the first event.
        """
        if not self._began:
            if self._is_dead():
                raise ConnectionAbortedError("the engine died")
            self._began = bool(body)
        # The first events of the other APIs do not wait for a token.
        if self._answer.first is None and body and (not self._envelope or b"delta" in body):
            self._answer.first = time.monotonic()
        if body.startswith(_ERROR_EVENTS):
            self._answer.failed = True
        return self._events(body, last=last)

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
            await self._send_whole(self._start, rename(self._held, 1))

    async def _send_ordered(self, message: Message) -> None:
        """Send a message of a reply whose model and usage are moved: a body as a whole."""
        if self._stream:
            await self._send(message)
            return
        if message["type"] == "http.response.start":
            self._start = message
            return
        self._held += message.get("body", b"")
        if self._start is not None and not message.get("more_body", False):
            await self._send_whole(self._start, self._ordered_body(self._held))

    async def _send_whole(self, start: Message, body: bytes) -> None:
        headers = [header for header in start.get("headers", ()) if header[0].lower() != b"content-length"]
        await self._send({**start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
        await self._send({"type": "http.response.body", "body": body})

    def _ordered_body(self, body: bytes) -> bytes:
        reply = _object(body)
        return body if reply is None else _dump(self._ordered(reply))

    def _ordered_event(self, event: bytes) -> bytes:
        """Return an event with the reply's model and usage moved; events without either are not changed."""
        head, data, text = event.rpartition(b"data: ")
        if b'"model"' not in text and b'"usage"' not in text:
            return event
        document = _object(text)
        if document is None:
            return event
        reply = document.pop(self._envelope, None)
        if isinstance(reply, dict):
            return head + data + _dump({self._envelope: self._ordered(reply), **document})
        self._count_usage(document.get("usage"))
        return event

    def _ordered(self, reply: dict[str, Any]) -> dict[str, Any]:
        """Return a reply with its model first, renamed, and its usage last; its tokens are counted."""
        usage = {name: reply.pop(name) for name in ("usage",) if name in reply}
        self._count_usage(usage.get("usage"))
        model = reply.pop("model", None)
        return {"model": self._model if model == self._other_model else model, **reply, **usage}

    def _events(self, body: bytes, *, last: bool) -> bytes:
        """Return the complete events so far, without the usage that the client did not request."""
        body, self._rest = self._rest + body, b""
        if not last and not body.endswith(b"\n\n"):
            complete, separator, rest = body.rpartition(b"\n\n")
            if len(rest) < _EVENT_BYTES:
                body, self._rest = complete + separator, rest
        if self._envelope:
            return b"\n\n".join(map(self._ordered_event, body.split(b"\n\n")))
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
        self._add(prompt, completion)
        return found

    def _count_usage(self, usage: object) -> None:
        """Count a usage in the schema of the Responses or the Messages API."""
        if isinstance(usage, dict):
            cached = sum(int(usage.get(f"cache_{what}_input_tokens") or 0) for what in ("creation", "read"))
            self._add(int(usage.get("input_tokens") or 0) + cached, int(usage.get("output_tokens") or 0))

    def _add(self, prompt: int, completion: int) -> None:
        """Count what tokens of the reply add to those already counted."""
        self._count(self._model, 0, max(0, prompt - self._prompt), max(0, completion - self._completion))
        self._prompt, self._completion = max(prompt, self._prompt), max(completion, self._completion)
        self._answer.tokens = max(self._choices.values(), default=self._completion)


def _last_usage(text: bytes) -> re.Match[bytes] | None:
    """Return the place of the last usage in a text. Most texts are events, in which it is the last member."""
    found = _USAGE.match(text, text.rfind(b",", 0, max(0, text.rfind(b'"usage"'))))
    if found is None:
        for found in _USAGE.finditer(text):  # noqa: B007 - the last one is used
            pass
    return found


def _object(text: bytes) -> dict[str, Any] | None:
    try:
        document = json.loads(text)
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def _dump(document: dict[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
