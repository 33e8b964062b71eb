"""ASGI middleware that the agent installs in vLLM (`--middleware tunesmith_middleware.Middleware`).

It requires this pod's token on every route except `GET /health`, reserves the routes that clients do not need for the
agent, makes `model` mandatory (without it vLLM answers with the base model), refuses requests that a shared engine
cannot serve, counts requests and tokens per model, and refuses new work while draining. It runs inside vLLM's
interpreter, so it uses the standard library only. Its state belongs to one process: vLLM must run with one API server.

The environment is read when the module is imported, so that vLLM does not start without it:
    TUNESMITH_SERVING_KEY_FILE: file with the pool's serving keys, one per line, newest first; reread when it changes.
    TUNESMITH_POD_UID: UID of this pod. A client's token is the HMAC-SHA256 of the UID under a serving key.
    TUNESMITH_ADMIN_TOKEN_FILE: file with the agent's token.
    TUNESMITH_REQUESTS: JSON of the pool's `spec.requests`; absent: the defaults. See tunesmith_checks.Policy.
    TUNESMITH_ADAPTER_MEMORY: highest number of bytes of the engine's cache of adapters; absent: unlimited.
    TUNESMITH_SUPERVISOR, TUNESMITH_ENGINE_STARTED_AT, TUNESMITH_JOURNAL_FD: set by the supervisor.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import hmac
import importlib.metadata
import json
import os
import re
import secrets
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    from tunesmith_server.middleware import (
        tunesmith_adapters,
        tunesmith_apis,
        tunesmith_checks,
        tunesmith_journal,
        tunesmith_media,
        tunesmith_parameters,
        tunesmith_reply,
        tunesmith_tokenizer,
        tunesmith_traffic,
    )

    Scope = MutableMapping[str, Any]
    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    App = Callable[[Scope, Receive, Send], Awaitable[None]]
else:
    # Beside this file, which the agent puts on the engine's PYTHONPATH.
    import tunesmith_adapters
    import tunesmith_apis
    import tunesmith_checks
    import tunesmith_journal
    import tunesmith_media
    import tunesmith_parameters
    import tunesmith_reply
    import tunesmith_tokenizer
    import tunesmith_traffic

MAX_BODY_BYTES = 32 * 1024 * 1024
"""Largest request body, in bytes; 413 above it."""
MIN_TOKEN_LENGTH = 16
"""Length of the shortest valid token, in characters."""
POST = tunesmith_parameters.ROUTES
"""Routes to which clients may POST. Their requests are counted and need a `model`."""
_LOAD = "/v1/load_lora_adapter"
ADAPTERS = frozenset({_LOAD, "/v1/unload_lora_adapter"})
"""Routes with which the agent loads and unloads adapters."""
READ = frozenset({"/v1/models", "/metrics"})
"""Routes that clients may GET."""

_LENGTH_HEADERS = frozenset({b"content-length", b"transfer-encoding"})
_REREAD_SECONDS = 2.0
_RESTART_CODE = 75
"""Exit code known to the supervisor: the agent restarts an engine whose answers changed."""
_HUNG_CODE = 76
_DEAD_CODE = 1
_REASON_CHARACTERS = 1000
_SHADOW_PRIORITY = 1000
"""Priority of mirrored requests: vLLM computes them after all others, and preempts them first."""


def _number(variable: str) -> float:
    try:
        return float(os.environ.get(variable, "0"))
    except ValueError:
        return 0.0


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
            f"The token file {name} of {variable} contains {len(token)} characters, fewer than {MIN_TOKEN_LENGTH}: "
            "write a real token into it."
        )
    return token


class _ServingTokens:
    """Tokens of this pod's clients, at most two seconds older than the file with the pool's serving keys."""

    def __init__(self) -> None:
        self._content = _token("TUNESMITH_SERVING_KEY_FILE")
        self._path = Path(os.environ["TUNESMITH_SERVING_KEY_FILE"])
        self._pod_uid = _variable("TUNESMITH_POD_UID", "the UID of this pod").encode()
        self._tokens = self._derive(self._content)
        if not self._tokens:
            raise SystemExit(
                f"The file {self._path} of TUNESMITH_SERVING_KEY_FILE contains no keys of at least "
                f"{MIN_TOKEN_LENGTH} characters: write one key per line into it."
            )
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
        """Read the file again if it changed; if it is missing or damaged, the previous tokens stay valid."""
        try:
            content = self._path.read_bytes().strip()
        except OSError:
            return
        if content != self._content and (tokens := self._derive(content)):
            self._content, self._tokens = content, tokens

    def _derive(self, content: bytes) -> list[bytes]:
        keys = [line.strip() for line in content.splitlines() if len(line.strip()) >= MIN_TOKEN_LENGTH]
        return [hmac.new(key, self._pod_uid, hashlib.sha256).hexdigest().encode() for key in keys]


def _engine_version() -> str:
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _policy() -> tunesmith_checks.Policy:
    try:
        return tunesmith_checks.Policy.parse(os.environ.get("TUNESMITH_REQUESTS", "{}"), _engine_version())
    except ValueError as error:
        raise SystemExit(
            f"The environment variable TUNESMITH_REQUESTS cannot be used: {error}. "
            "It must be the JSON of the pool's spec.requests."
        ) from None


def _adapter_memory() -> int | None:
    text = os.environ.get("TUNESMITH_ADAPTER_MEMORY")
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise SystemExit("The environment variable TUNESMITH_ADAPTER_MEMORY must be a positive number of bytes.")
    return int(text)


SERVING_TOKENS = _ServingTokens()
ADMIN_TOKEN = _token("TUNESMITH_ADMIN_TOKEN_FILE")
POLICY = _policy()
ADAPTER_MEMORY = _adapter_memory()


class Middleware:
    """Middleware around vLLM's application.

    Its own routes, for the agent: `GET /tunesmith/state` returns `{"bootId", "supervisor", "startedAt", "draining",
    "inFlight": {model: requests}, "totals": {model: {"requests", "promptTokens", "completionTokens"}}, "canConstrain",
    "adapters": …, "traffic": …}`, see tunesmith_adapters.EngineAdapters.state, whose `seen` is the parameter
    `adapters`, and tunesmith_traffic.Traffic.state, whose `seen` is the parameter `traffic`; after
    `POST /tunesmith/drain` new work is refused; `POST /tunesmith/restart` with `{"reason", "hung"}` exits the process,
    and its supervisor starts another; `POST /tunesmith/base-names` with `{"names"}` sets further names under which the
    base model answers.
    The agent's own requests are neither checked nor counted. Errors have OpenAI's format. A refusal while draining is
    503 with code `not_started` and the header `x-tunesmith-not-started: true`: the client may retry such a request on
    another pod. An error because the engine died has the header `x-tunesmith-engine-lost: true`.

    A request with the header `x-tunesmith-shadow: true` is a mirrored one: it is counted separately, computed
    after all others, and refused like one while draining if it would have to wait for a slot.

    A client's request with the header `x-tunesmith-digest` is in the journal while the engine processes it, and stays
    in it if the engine died meanwhile.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._boot_id = secrets.token_hex(16)
        self._supervisor = os.environ.get(tunesmith_journal.SUPERVISOR, "")
        self._started_at = _number(tunesmith_journal.STARTED_AT)
        self._journal = tunesmith_journal.Journal()
        self._draining = False
        self._in_flight: dict[str, int] = {}
        self._adapters = tunesmith_adapters.EngineAdapters(ADAPTER_MEMORY, on_cpu=POLICY.on_cpu)
        self._totals: dict[str, dict[str, int]] = {}
        self._policy = POLICY
        self._traffic = tunesmith_traffic.Traffic(self._boot_id[:16])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, self._lifespan(scope, receive), send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "WebSockets are not supported"})
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
        elif method == "POST" and path in POST and not admin:
            await self._generate(scope, receive, send)
        elif method == "GET" and path in READ:
            await self._app(scope, receive, send)
        elif not admin:
            await _refuse(send, 403, "forbidden", f"{method} {path} is not open to clients of the pool.")
        else:
            await self._serve_agent(scope, receive, send)

    async def _serve_agent(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request of the agent, to a route that clients cannot use or do not need checks for."""
        path, method = _route(scope), scope["method"]
        if path == "/tunesmith/state" and method == "GET":
            await _reply(send, 200, self._state(_seen(scope, b"adapters"), _seen(scope, b"traffic")))
        elif path == "/tunesmith/drain" and method == "POST":
            self._draining = True
            await _reply(send, 200, self._state())
        elif path == "/tunesmith/base-names" and method == "POST":
            await self._set_base_names(scope, receive, send)
        elif path == "/tunesmith/restart" and method == "POST":
            await self._restart(scope, receive, send)
        elif path in ADAPTERS and method == "POST":
            await self._change_adapters(scope, receive, send)
        elif path in POST and method == "POST":
            await self._generate_for_agent(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _restart(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read_body(scope, receive)
        try:
            document = json.loads(body or b"")
            reason = str(document["reason"])[:_REASON_CHARACTERS]
        except (ValueError, KeyError, TypeError, RecursionError):
            await _refuse(send, 400, "invalid_json", "The body must be an object with a reason.")
            return
        self._draining = True
        await _reply(send, 200, self._state())
        code = _HUNG_CODE if document.get("hung") else _RESTART_CODE
        asyncio.get_running_loop().call_later(0.1, _exit, code, f"the agent restarts the engine: {reason}")

    async def _set_base_names(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Set the further names of the base model; requests that have begun are not affected."""
        body = await _read_body(scope, receive)
        try:
            names = json.loads(body or b"")["names"]
        except (ValueError, KeyError, TypeError, RecursionError):
            names = None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            await _refuse(send, 400, "invalid_json", "The body must be an object with a list of names.")
            return
        self._adapters.base_names = frozenset(names)
        await _reply(send, 200, self._state())

    def _lifespan(self, scope: Scope, receive: Receive) -> Receive:
        """Return a receive that prepares the engine before the server starts to listen."""
        guarded = _guard_shutdown(scope, receive)

        async def prepared() -> Message:
            message = await guarded()
            engine = getattr(getattr(scope.get("app"), "state", None), "engine_client", None)
            if message["type"] == "lifespan.startup" and engine is not None:
                try:
                    can_constrain = tunesmith_tokenizer.can_constrain(engine)
                    self._policy = dataclasses.replace(POLICY, can_constrain=can_constrain)
                    if POLICY.allow_media_urls:
                        tunesmith_media.guard()
                    await self._adapters.start(engine)
                except Exception as error:  # noqa: BLE001 - uvicorn would continue without the preparation
                    _exit(_DEAD_CODE, f"the engine could not be prepared: {error!r}")
            return message

        return prepared

    async def _change_adapters(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have vLLM load or unload an adapter, and record it."""
        body = await _read_body(scope, receive) or b""
        reply: list[Message] = []

        async def keep(message: Message) -> None:
            reply.append(message)

        await self._app(scope, _Client(body, receive).receive, keep)
        name = _member(body, "lora_name")
        if reply[0]["status"] == 200 and name is not None:  # noqa: PLR2004 - HTTP
            if _route(scope) == _LOAD:
                request = scope["app"].state.openai_serving_models.lora_requests[name]
                self._adapters.register(name, int(request.lora_int_id), str(request.lora_path))
            else:
                await self._adapters.unregister(name)
        for message in reply:
            await send(message)

    async def _generate_for_agent(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request of the agent; a canary is before those of clients that wait for a slot."""
        body = await _read_body(scope, receive) or b""
        client = _Client(body, receive)
        first = (_member(body, "priority") or "").startswith("-")
        try:
            async with self._adapters.use(_member(body, "model") or "", client.left, first=first) as admitted:
                if admitted:
                    await self._app(scope, client.receive, send)
        finally:
            client.forget()

    def _state(self, adapters_seen: int | None = None, traffic_seen: int | None = None) -> dict[str, Any]:
        return {
            "bootId": self._boot_id,
            "supervisor": self._supervisor,
            "startedAt": self._started_at,
            "draining": self._draining,
            "inFlight": self._in_flight,
            "totals": self._totals,
            "canConstrain": self._policy.can_constrain,
            "adapters": self._adapters.state(adapters_seen),
            "traffic": self._traffic.state(traffic_seen),
        }

    async def _generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read_body(scope, receive)
        if body is None:
            return
        if len(body) > MAX_BODY_BYTES:
            await _refuse(send, 413, "request_too_large", f"The request body has more than {MAX_BODY_BYTES} bytes.")
            return
        try:
            document = _parse(body)
        except ValueError as error:
            await _refuse(send, 400, "invalid_json", f"The request body {error}.")
            return
        route = _route(scope)
        if not _has_route(scope, route):
            message = f"The engine has no {route}: its model cannot answer this API."
            await _refuse(send, 404, "api_not_served", message, ((b"x-tunesmith-no-route", b"true"),))
            return
        refusal = tunesmith_parameters.request_refusal(route, document, self._policy)
        if refusal is not None:
            await _refuse(send, 400, refusal.code, refusal.message, param=refusal.parameter)
            return
        model = document["model"]
        # No await between the check and the count: a drain either refuses a request or waits for it.
        shadow = _header(scope, tunesmith_traffic.SHADOW_HEADER) == "true"
        if self._draining or _is_dead(scope) or (shadow and not self._adapters.has_free_slot(model)):
            await _refuse_not_started(send)
            return
        answer = tunesmith_traffic.Answer(time.monotonic())
        observer = tunesmith_reply.Reply(
            send, self._count, model, lambda: _is_dead(scope), answer, tunesmith_apis.ENVELOPES.get(route, "")
        )
        if model in self._adapters.base_names:
            document["model"] = _base_name(scope)
            observer.rename(document["model"])
        if document.get("stream"):
            _expect_stream(route, document, observer)
        if shadow:
            document["priority"] = _SHADOW_PRIORITY
        # Pass on the checked document, not the client's bytes: another parser may read those differently.
        body = json.dumps(document).encode()
        scope = {
            **scope,
            "headers": [
                *(h for h in scope["headers"] if h[0] not in _LENGTH_HEADERS),
                (b"content-length", str(len(body)).encode()),
            ],
        }
        client = _Client(body, receive)
        try:
            await self._process(scope, client, observer.send, model)
        finally:
            self._record(model, answer, shadow=shadow, left=client.has_left)

    def _record(self, model: str, answer: tunesmith_traffic.Answer, *, shadow: bool, left: bool) -> None:
        if not self._adapters.knows(model):
            return
        if self._traffic.is_full:
            self._traffic.forget_others(self._adapters.names)
        self._traffic.record(model, answer, time.monotonic(), shadow=shadow, left=left)

    async def _process(self, scope: Scope, client: _Client, send: Send, model: str) -> None:
        """Have vLLM process a checked request once its adapter has a slot; it is counted meanwhile."""
        self._in_flight[model] = self._in_flight.get(model, 0) + 1
        try:
            needs_slot = _route(scope) not in tunesmith_apis.NOT_COMPUTED
            async with self._adapters.use(model if needs_slot else "", client.left) as admitted:
                if admitted and _is_dead(scope):
                    await _refuse_not_started(send)
                elif admitted:
                    await self._compute(scope, client.receive, send, model)
        finally:
            client.forget()
            self._in_flight[model] -= 1
            if not self._in_flight[model]:
                del self._in_flight[model]

    async def _compute(self, scope: Scope, receive: Receive, send: Send, model: str) -> None:
        """Have vLLM process a request, which is in the journal meanwhile, and stays in it if the engine died."""
        slot = self._journal.begin(_header(scope, b"x-tunesmith-digest"), model)
        try:
            await self._app(scope, receive, send)
        finally:
            if not _is_dead(scope):
                self._journal.end(slot)

    def _count(self, model: str, requests: int, prompt: int, completion: int) -> None:
        # The engine answers unknown names with 404, which is not counted, so there are no more totals than models.
        total = self._totals.setdefault(model, {"requests": 0, "promptTokens": 0, "completionTokens": 0})
        total["requests"] += requests
        total["promptTokens"] += prompt
        total["completionTokens"] += completion


def _expect_stream(route: str, document: dict[str, Any], observer: tunesmith_reply.Reply) -> None:
    """Request the usage in every event of a stream, by which its tokens are counted.

    It is removed for a client that did not request it. Some APIs report it without being asked.
    """
    if route in tunesmith_apis.ENVELOPES:
        observer.expect_stream()
        return
    requested = document.get("stream_options") or {}
    observer.hide_usage(final=not requested.get("include_usage"), others=not requested.get("continuous_usage_stats"))
    document["stream_options"] = {**requested, "include_usage": True, "continuous_usage_stats": True}


def _base_name(scope: Scope) -> str:
    """Return the name under which vLLM serves the base model, which is also the one in its replies."""
    return str(scope["app"].state.openai_serving_models.base_model_paths[0].name)


def _member(body: bytes, name: str) -> str | None:
    """Return a string in the body of one of the agent's requests."""
    try:
        return str(json.loads(body)[name])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _seen(scope: Scope, part: bytes) -> int | None:
    """Return the version of a part of the state that the agent has; None if it has none."""
    found = re.search(rb"(?:^|&)%b=([0-9]{1,15})(?:&|$)" % part, scope.get("query_string", b""))
    return int(found[1]) if found else None


def _is_dead(scope: Scope) -> bool:
    """Return True if vLLM knows that the process that computes has died."""
    engine = getattr(getattr(scope.get("app"), "state", None), "engine_client", None)
    return bool(getattr(engine, "errored", False))


def _guard_shutdown(scope: Scope, receive: Receive) -> Receive:
    """Return a receive for the lifespan scope: a server that stops because its engine died must not exit with 0."""

    async def guarded() -> Message:
        message = await receive()
        if message["type"] == "lifespan.shutdown" and _is_dead(scope):
            _exit(_DEAD_CODE, "the engine died; its error is above")
        return message

    return guarded


def _exit(code: int, reason: str) -> None:
    """Exit the process immediately, with the reason as the last line of the log."""
    sys.stderr.write(f"tunesmith: {reason}\n")
    sys.stderr.flush()
    os._exit(code)


def _parse(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a body, bounded in depth and number of values.

    Raises:
        ValueError: the body is not such an object; the message continues "The request body …".
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > tunesmith_checks.MAX_VALUES:
        raise ValueError(f"has more than {tunesmith_checks.MAX_VALUES} values")
    try:
        document = json.loads(body, parse_constant=_no_number)
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeError:
        raise ValueError("has characters that are not Unicode (a lone surrogate)") from None
    except RecursionError:
        raise ValueError(f"nests deeper than {tunesmith_checks.MAX_DEPTH} levels") from None
    except ValueError:
        raise ValueError("is not JSON") from None
    if not isinstance(document, dict):
        raise ValueError("is not a JSON object")  # noqa: TRY004 - one kind of error for the caller
    if tunesmith_checks.too_deep(document):
        raise ValueError(f"nests deeper than {tunesmith_checks.MAX_DEPTH} levels")
    return document


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _route(scope: Scope) -> str:
    """Return the path as Starlette's router sees it: without the root path, if it starts with it."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if root and path.startswith(root) and path[len(root) : len(root) + 1] in {"", "/"}:
        return path[len(root) :]
    return path


def _has_route(scope: Scope, route: str) -> bool:
    """Return True if vLLM's application has a route, which depends on what its model can compute."""
    routes = getattr(scope.get("app"), "routes", None)
    return routes is None or any(getattr(other, "path", "") == route for other in routes)


def _header(scope: Scope, name: bytes) -> str:
    """Return the value of a header; empty if it is missing."""
    return next((value.decode("ascii", "replace") for key, value in scope["headers"] if key == name), "")


def _bearer(scope: Scope) -> bytes:
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(values) != 1:
        return b""
    scheme, _, token = values[0].partition(b" ")
    return bytes(token.strip()) if scheme.lower() == b"bearer" else b""


async def _read_body(scope: Scope, receive: Receive) -> bytes | None:
    """Return the body, up to MAX_BODY_BYTES and one byte; None if the client disconnected."""
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


class _Client:
    """Messages of a client whose request body was read: first that body, then the connection's end."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        self._receive = receive
        self._next: asyncio.Future[Message] | None = None
        self._has_left = False

    @property
    def has_left(self) -> bool:
        """True if the client is known to have disconnected."""
        return self._has_left or (self._next is not None and self._next.done() and not self._next.cancelled())

    async def receive(self) -> Message:
        """Return the next message."""
        if self._pending:
            return self._pending.pop()
        # A reader that gives up, as vLLM's do at the end of a reply, must not cancel the future for the next one.
        message = await (self._receive() if self._next is None else asyncio.shield(self._next))
        self._has_left = self._has_left or message["type"] == "http.disconnect"
        return message

    def left(self) -> asyncio.Future[Message]:
        """Return a future that is done when the client disconnects."""
        if self._next is None:
            self._next = asyncio.ensure_future(self._receive())
        return self._next

    def forget(self) -> None:
        """Stop waiting for the client."""
        if self._next is not None:
            self._next.cancel()


async def _refuse_not_started(send: Send) -> None:
    headers = ((b"x-tunesmith-not-started", b"true"), (b"retry-after", b"1"))
    await _refuse(
        send, 503, "not_started", "This pod is stopping and did not start the request. Send it again.", headers
    )


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
