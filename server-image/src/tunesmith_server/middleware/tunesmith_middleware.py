"""ASGI middleware that the agent puts into vLLM (`--middleware tunesmith_middleware.Middleware`).

It demands this pod's token on every route but `GET /health`, lets only the agent reach what clients do not need, makes
`model` mandatory (without one vLLM answers with the base model), counts requests and tokens per model, and refuses work
while draining. It runs inside vLLM's interpreter, so it uses the standard library only. Its state belongs to one
process: vLLM must run with one API server.

Environment, read when the module is imported, so that vLLM does not start without it:
    TUNESMITH_SERVING_KEY_FILE: file with the pool's serving keys, one a line, newest first; read again when it changes.
    TUNESMITH_POD_UID: UID of this pod. The token of its clients is the HMAC-SHA256 of it by a serving key.
    TUNESMITH_ADMIN_TOKEN_FILE: file with the token of the agent.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    Scope = MutableMapping[str, Any]
    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY_BYTES = 32 * 1024 * 1024
"""Largest request body, in bytes; 413 above it."""
MIN_TOKEN_LENGTH = 16
"""Shortest token that is taken for one, in characters."""
GENERATE = frozenset({"/v1/chat/completions", "/v1/completions"})
"""What clients may POST. These are counted and need a `model`."""
READ = frozenset({"/v1/models", "/metrics"})
"""What clients may GET."""

# Quotes inside generated text arrive escaped, so this finds the reply's own object only.
_USAGE = re.compile(rb'"usage"\s*:\s*(\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})')
_USAGE_ONLY = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_TAIL_BYTES = 4096
_REREAD_SECONDS = 2.0


def _variable(variable: str, content: str) -> str:
    value = os.environ.get(variable)
    if not value:
        raise SystemExit(
            f"The environment variable {variable} is not set. It must be {content}; set it in the engine's container."
        )
    return value


def _token(variable: str) -> bytes:
    name = _variable(variable, "the path of the file with the token")
    try:
        token = Path(name).read_bytes().strip()
    except OSError as error:
        raise SystemExit(
            f"The token file {name} of {variable} cannot be read ({error.strerror}). "
            "Check that its volume is mounted and readable by this user."
        ) from None
    if len(token) < MIN_TOKEN_LENGTH:
        raise SystemExit(
            f"The token file {name} of {variable} holds {len(token)} characters, fewer than {MIN_TOKEN_LENGTH}: "
            "write a real token into it."
        )
    return token


class _ServingTokens:
    """The tokens of this pod's clients, at most two seconds behind the file with the pool's serving keys."""

    def __init__(self) -> None:
        self._content = _token("TUNESMITH_SERVING_KEY_FILE")
        self._path = Path(os.environ["TUNESMITH_SERVING_KEY_FILE"])
        self._pod_uid = _variable("TUNESMITH_POD_UID", "the UID of this pod").encode()
        self._tokens = self._derived(self._content)
        if not self._tokens:
            raise SystemExit(f"The file {self._path} of TUNESMITH_SERVING_KEY_FILE holds no key: write one a line.")
        self._read_at = time.monotonic()

    def accept(self, token: bytes) -> bool:
        """True if the token is one of this pod's; all are compared, in constant time."""
        now = time.monotonic()
        if now - self._read_at >= _REREAD_SECONDS:
            self._read_at = now
            self._reread()
        equal = [hmac.compare_digest(token, expected) for expected in self._tokens]
        return any(equal)

    def _reread(self) -> None:
        """Follow the file; one that is missing or damaged leaves the last tokens valid."""
        try:
            content = self._path.read_bytes().strip()
        except OSError:
            return
        if content != self._content and (tokens := self._derived(content)):
            self._content, self._tokens = content, tokens

    def _derived(self, content: bytes) -> list[bytes]:
        keys = [line.strip() for line in content.splitlines() if len(line.strip()) >= MIN_TOKEN_LENGTH]
        return [hmac.new(key, self._pod_uid, hashlib.sha256).hexdigest().encode() for key in keys]


SERVING_TOKENS = _ServingTokens()
ADMIN_TOKEN = _token("TUNESMITH_ADMIN_TOKEN_FILE")


class Middleware:
    """The middleware around vLLM's application.

    Routes of its own, for the agent: `GET /tunesmith/state` answers `{"bootId", "draining", "inFlight": {model:
    requests}, "totals": {model: {"requests", "promptTokens", "completionTokens"}}}`; `POST /tunesmith/drain` refuses
    new work from then on. Errors have OpenAI's shape. A refusal while draining is 503 with code `not_started` and the
    header `x-tunesmith-not-started: true`: such a request may be sent again elsewhere.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._boot_id = secrets.token_hex(16)
        self._draining = False
        self._in_flight: dict[str, int] = {}
        self._totals: dict[str, dict[str, int]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Guard one connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "websockets are not served"})
        else:
            await self._http(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = _route(scope), scope["method"]
        if path == "/health" and method == "GET":
            await self._app(scope, receive, send)
            return
        token = _bearer(scope)
        admin = hmac.compare_digest(token, ADMIN_TOKEN)
        if not admin and not SERVING_TOKENS.accept(token):
            await _refuse(
                send,
                401,
                "invalid_api_key",
                "This pod's token is missing or wrong. Call the gateway, not the pod.",
                ((b"www-authenticate", b"Bearer"),),
            )
        elif method == "POST" and path in GENERATE:
            await self._generate(scope, receive, send)
        elif method == "GET" and path in READ:
            await self._app(scope, receive, send)
        elif not admin:
            await _refuse(send, 403, "forbidden", f"{method} {path} is not open to clients of the pool.")
        elif path == "/tunesmith/state" and method == "GET":
            await _reply(send, 200, self._state())
        elif path == "/tunesmith/drain" and method == "POST":
            self._draining = True
            await _reply(send, 200, self._state())
        else:
            await self._app(scope, receive, send)

    def _state(self) -> dict[str, Any]:
        return {
            "bootId": self._boot_id,
            "draining": self._draining,
            "inFlight": self._in_flight,
            "totals": self._totals,
        }

    async def _generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read_body(scope, receive)
        if body is None:
            return
        if len(body) > MAX_BODY_BYTES:
            await _refuse(send, 413, "request_too_large", f"The request body has more than {MAX_BODY_BYTES} bytes.")
            return
        try:
            document = json.loads(body)
        except (ValueError, RecursionError):
            await _refuse(send, 400, "invalid_json", "The request body is not JSON.")
            return
        model = document.get("model") if isinstance(document, dict) else None
        if not isinstance(model, str) or not model:
            await _refuse(
                send,
                400,
                "missing_model",
                "The request names no model. Set 'model' to a name that GET /v1/models lists.",
                param="model",
            )
            return
        observer = _Reply(send)
        options = document.get("stream_options")
        if document.get("stream") is True and (
            options is None or (isinstance(options, dict) and not options.get("include_usage"))
        ):
            # Tokens are counted from the usage that vLLM sends last; a client who did not ask for it does not see it.
            observer.hide_usage = True
            body = json.dumps({**document, "stream_options": {**(options or {}), "include_usage": True}}).encode()
            scope = {
                **scope,
                "headers": [
                    *(h for h in scope["headers"] if h[0] != b"content-length"),
                    (b"content-length", str(len(body)).encode()),
                ],
            }
        # No await between the check and the count: a request is either refused or waited for.
        if self._draining:
            headers = ((b"x-tunesmith-not-started", b"true"), (b"retry-after", b"1"))
            await _refuse(
                send, 503, "not_started", "This pod is stopping and did not start the request. Send it again.", headers
            )
            return
        self._in_flight[model] = self._in_flight.get(model, 0) + 1
        try:
            await self._app(scope, _replay(body, receive), observer.send)
        finally:
            self._in_flight[model] -= 1
            if not self._in_flight[model]:
                del self._in_flight[model]
            # Names that the engine does not know answer 404 and are not kept, so totals stay as few as models.
            if observer.ok:
                total = self._totals.setdefault(model, {"requests": 0, "promptTokens": 0, "completionTokens": 0})
                prompt, completion = observer.tokens()
                total["requests"] += 1
                total["promptTokens"] += prompt
                total["completionTokens"] += completion


class _Reply:
    """Passes a reply on as it comes, and keeps its end, where vLLM puts the usage."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._tail = b""
        self.ok = False
        self.hide_usage = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.ok = 200 <= message["status"] < 300  # noqa: PLR2004 - HTTP success
        elif message["type"] == "http.response.body":
            body = message.get("body", b"")
            self._tail = (
                (self._tail + body)[-max(_TAIL_BYTES, len(body)) :] if len(body) < _TAIL_BYTES else body[-_TAIL_BYTES:]
            )
            if self.hide_usage and b'"usage"' in body:
                message = {
                    **message,
                    "body": b"\n\n".join(event for event in body.split(b"\n\n") if not _is_usage_only(event)),
                }
        await self._send(message)

    def tokens(self) -> tuple[int, int]:
        """Prompt and completion tokens; zeros where the reply was cut off before its usage."""
        found = _USAGE.findall(self._tail)
        try:
            usage = json.loads(found[-1]) if found else {}
        except ValueError:
            usage = {}
        return int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)


def _is_usage_only(event: bytes) -> bool:
    return event.startswith(b"data: {") and _USAGE_ONLY.search(event) is not None and _USAGE.search(event) is not None


def _route(scope: Scope) -> str:
    """The path as Starlette's router sees it: without the root path, if it starts with it."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if root and path.startswith(root) and path[len(root) : len(root) + 1] in {"", "/"}:
        return path[len(root) :]
    return path


def _bearer(scope: Scope) -> bytes:
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(values) != 1:
        return b""
    scheme, _, token = values[0].partition(b" ")
    return bytes(token.strip()) if scheme.lower() == b"bearer" else b""


async def _read_body(scope: Scope, receive: Receive) -> bytes | None:
    """The whole body, a byte more than MAX_BODY_BYTES at most; None when the client went away."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value) > MAX_BODY_BYTES:
            return b" " * (MAX_BODY_BYTES + 1)
    parts = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts += message.get("body", b"")
        if len(parts) > MAX_BODY_BYTES:
            return bytes(parts[: MAX_BODY_BYTES + 1])
        if not message.get("more_body", False):
            return bytes(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body that was read, and then what the connection brings: its end."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


async def _refuse(
    send: Send,
    status: int,
    code: str,
    message: str,
    headers: tuple[tuple[bytes, bytes], ...] = (),
    *,
    param: str | None = None,
) -> None:
    kind = {401: "authentication_error", 403: "permission_error", 503: "service_unavailable"}.get(
        status, "invalid_request_error"
    )
    await _reply(send, status, {"error": {"message": message, "type": kind, "param": param, "code": code}}, headers)


async def _reply(
    send: Send, status: int, document: dict[str, Any], headers: tuple[tuple[bytes, bytes], ...] = ()
) -> None:
    body = json.dumps(document).encode()
    fixed = ((b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *headers]})
    await send({"type": "http.response.body", "body": body})
