"""One request, from the client to a pod and back."""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NamedTuple

import aiohttp
import orjson
from aiohttp import web

from tunesmith.gateway import errors
from tunesmith.gateway.broadcast import within

if TYPE_CHECKING:
    from collections.abc import Callable

    from tunesmith.contracts.apikey import ApiKey
    from tunesmith.gateway.catalog import Catalog, Model
    from tunesmith.gateway.demand import Demand
    from tunesmith.gateway.keys import KeyTable
    from tunesmith.gateway.metrics import Metrics
    from tunesmith.gateway.residency import Backend, Residency

LOG = logging.getLogger(__name__)

GENERATE_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
MODELS_PATH = "/v1/models"
NOT_STARTED_HEADER = "x-tunesmith-not-started"
OTHER_TOKEN = "other_token"  # noqa: S105 - a label in metrics
"""While the installation's key is rotated: the pod accepts another of the gateway's tokens, it is tried at once."""
CLIENT_LEFT = 499
"""In metrics and the log: the client closed the connection before the answer was complete."""
_RETRY_PAUSE_SECONDS = 0.25
_REQUEST_ID_LENGTH = 64
_JSON = "application/json"
_EVENT_STREAM = "text/event-stream"
_EVENT_END = b"\n\n"


@dataclass(frozen=True, slots=True)
class Limits:
    """What the gateway takes upon itself.

    Attributes:
        hold_seconds: how long a request waits for a pod that holds its model.
        held_requests: how many requests wait at once.
        held_bytes: how many bytes of bodies wait at once.
        body_bytes: the largest body of a request.
    """

    hold_seconds: float = 10.0
    held_requests: int = 1024
    held_bytes: int = 64 * 1024 * 1024
    body_bytes: int = 4 * 1024 * 1024


class _NotStarted(Exception):  # noqa: N818 - not an error: the next pod is asked
    """The pod did not take up the request; `reason` is a label in metrics."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _ClientLeft(Exception):  # noqa: N818 - not an error
    """The client closed its connection while the answer was written."""


class _Call(NamedTuple):
    """What a request asks for. The body's `model` is replaced by the engine's name of the chosen revision."""

    request: web.BaseRequest
    request_id: str
    key: ApiKey
    model: Model
    body: dict[str, Any]
    size: int
    arrived: float


class Proxy:
    """The handler of the clients' port."""

    def __init__(
        self,
        *,
        session: aiohttp.ClientSession,
        keys: KeyTable,
        catalog: Catalog,
        residency: Residency,
        demand: Demand,
        metrics: Metrics,
        limits: Limits,
        clock: Callable[[], float],
        synced: Callable[[], bool],
    ) -> None:
        self._session = session
        self._keys = keys
        self._catalog = catalog
        self._residency = residency
        self._demand = demand
        self._metrics = metrics
        self._limits = limits
        self._clock = clock
        self._synced = synced
        self._held_requests = 0
        self._held_bytes = 0
        self.closing = False
        """The process is about to end: every answer asks its client to close the connection."""

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        arrived = self._clock()
        request_id = _request_id(request)
        code, model_label = CLIENT_LEFT, ""
        response: web.StreamResponse
        try:
            call = await self._call(request, request_id, arrived)
            if isinstance(call, _Call):
                model_label = call.model.id
                response = await self._generate(call)
            else:
                response = call
            code = response.status
        except errors.ApiError as error:
            code = error.status
            if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                LOG.warning("request %s for %s: %d %s", request_id, model_label or "-", error.status, error.message)
            response = _answer(error, request_id)
        except _ClientLeft:
            # There is nobody to answer: aiohttp finds the connection closed and drops the response.
            response = web.Response(status=CLIENT_LEFT)
        except Exception:
            LOG.exception("request %s for %s", request_id, model_label or "-")
            code = HTTPStatus.INTERNAL_SERVER_ERROR
            response = _answer(errors.internal(), request_id)
        finally:
            self._metrics.ended(model_label, code, self._clock() - arrived)
        if self.closing and not response.prepared:
            response.force_close()
        return response

    async def _call(self, request: web.BaseRequest, request_id: str, arrived: float) -> _Call | web.Response:
        """What the request asks of a model, or the answer to one that asks the gateway itself."""
        path = request.rel_url.path
        if path in GENERATE_PATHS:
            _require(request, "POST")
            key = self._authenticate(request)
            body, size = await self._body(request)
            return _Call(request, request_id, key, self._model(body, key), body, size, arrived)
        if path == MODELS_PATH or path.startswith(MODELS_PATH + "/"):
            _require(request, "GET")
            return self._models(self._authenticate(request), path.removeprefix(MODELS_PATH)[1:])
        raise errors.unknown_url(request.method, path)

    def _authenticate(self, request: web.BaseRequest) -> ApiKey:
        scheme, _, presented = request.headers.get("Authorization", "").partition(" ")
        presented = presented.strip()
        if scheme.lower() != "bearer" or not presented:
            raise errors.missing_key()
        key = self._keys.find(presented)
        if key is None:
            raise errors.invalid_key() if self._synced() else errors.starting()
        return key

    async def _body(self, request: web.BaseRequest) -> tuple[dict[str, Any], int]:
        limit = self._limits.body_bytes
        if (request.content_length or 0) > limit:
            raise errors.body_too_large(limit)
        try:
            if request.headers.get("Expect", "").lower() == "100-continue":
                await _continue(request)
            data = await request.read()
        except web.HTTPRequestEntityTooLarge:
            raise errors.body_too_large(limit) from None
        try:
            body = orjson.loads(data)
        except orjson.JSONDecodeError as error:
            raise errors.body_not_json(str(error)) from None
        if not isinstance(body, dict):
            raise errors.body_not_an_object()
        return body, len(data)

    def _model(self, body: dict[str, Any], key: ApiKey) -> Model:
        name = body.get("model")
        if name is None or name == "":
            raise errors.missing_model()
        if not isinstance(name, str):
            raise errors.model_not_a_string()
        try:
            return self._catalog.resolve(name, key)
        except errors.ApiError:
            if self._synced():
                raise
            raise errors.starting() from None

    def _models(self, key: ApiKey, name: str) -> web.Response:
        if not self._synced():
            raise errors.starting()
        if name:
            # Clients send the slash of a global id as %2F or as it is.
            return _json(_described(self._catalog.resolve(name.replace("%2F", "/").replace("%2f", "/"), key)))
        return _json({"object": "list", "data": [_described(model) for model in self._catalog.visible(key)]})

    async def _generate(self, call: _Call) -> web.StreamResponse:
        """Forward to a pod; hold the request while none holds the model."""
        model = call.model
        deadline = call.arrived + self._limits.hold_seconds
        refused: set[str] = set()
        while True:
            changed = self._residency.changed.next()
            chosen = self._pick(model, refused)
            if chosen is None:
                if not model.deployed and not refused:
                    raise errors.model_not_found(model.engine_names[0])
                if model.not_ready is not None:
                    raise errors.model_not_ready(model.id, model.not_ready)
                left = deadline - self._clock()
                if left <= 0:
                    raise errors.no_pod_ready(model.id, self._limits.hold_seconds)
                with _Held(self, call):
                    await within(changed, min(left, _RETRY_PAUSE_SECONDS) if refused else left)
                refused.clear()
                # While a request waits, revisions come and go.
                model = self._catalog.resolve(call.body["model"], call.key)
                continue
            backend, engine_name = chosen
            try:
                return await self._forward(call, backend, engine_name)
            except _NotStarted as not_started:
                self._metrics.not_started(not_started.reason)
                LOG.info("request %s: pod %s: %s", call.request_id, backend.pod.name, not_started.reason)
                if not_started.reason != OTHER_TOKEN:
                    refused.add(backend.pod.uid)

    def _pick(self, model: Model, refused: set[str]) -> tuple[Backend, str] | None:
        """A pod for the newest revision that any usable pod holds."""
        if model.pool is None:
            return None
        for engine_name in model.engine_names:
            backend = self._residency.pick(model.pool, engine_name, is_base=model.is_base, excluded=refused)
            if backend is not None:
                return backend, engine_name
        return None

    async def _forward(self, call: _Call, backend: Backend, engine_name: str) -> web.StreamResponse:
        """Send the request to a pod and its answer to the client.

        Raises:
            _NotStarted: the pod did not take it up.
            ApiError: the pod took it up and failed.
        """
        body = orjson.dumps(call.body | {"model": engine_name})
        token = backend.serving_tokens.current
        headers = {"Authorization": f"Bearer {token}", "Content-Type": _JSON, "X-Request-Id": call.request_id}
        backend.in_flight += 1
        self._demand.add_running(call.model.id, 1)
        upstream: aiohttp.ClientResponse | None = None
        try:
            upstream = await self._session.post(
                backend.url(call.request.rel_url.path), data=body, headers=headers, allow_redirects=False
            )
            if upstream.status == HTTPStatus.UNAUTHORIZED and backend.serving_tokens.refused(token):
                raise _NotStarted(OTHER_TOKEN)
            await _raise_not_started(upstream)
            if upstream.content_type == _EVENT_STREAM:
                return await self._stream(call, upstream, engine_name)
            data = await upstream.read()
            if upstream.status == HTTPStatus.OK and not _names(data, engine_name):
                LOG.error("request %s: pod %s answered as another model", call.request_id, backend.pod.name)
                raise errors.wrong_model(call.model.id)
            self._metrics.first_byte(call.model.id, self._clock() - call.arrived)
            return web.Response(status=upstream.status, body=data, headers=_reply_headers(upstream, call.request_id))
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            self._residency.suspect(backend)
            raise _NotStarted("connect") from error
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            LOG.warning("request %s: pod %s: %r", call.request_id, backend.pod.name, error)
            self._residency.suspect(backend)
            raise errors.engine_failed(call.model.id) from error
        finally:
            backend.in_flight -= 1
            self._demand.add_running(call.model.id, -1)
            if upstream is not None:
                # An answer that was not read to its end is cut off: the engine then stops generating.
                upstream.release()

    async def _stream(self, call: _Call, upstream: aiohttp.ClientResponse, engine_name: str) -> web.StreamResponse:
        """Pass server-sent events on as they come, once the first one shows the right model."""
        start = b""
        while _EVENT_END not in start and (chunk := await upstream.content.readany()):
            start += chunk
        if not _event_names(start, engine_name):
            LOG.error("request %s: an engine answered as another model", call.request_id)
            raise errors.wrong_model(call.model.id)
        self._metrics.first_byte(call.model.id, self._clock() - call.arrived)
        response = web.StreamResponse(status=upstream.status, headers=_reply_headers(upstream, call.request_id))
        if self.closing:
            response.force_close()
        try:
            await response.prepare(call.request)
            await response.write(start)
            while chunk := await self._next(call, upstream):
                await response.write(chunk)
            await response.write_eof()
        except ConnectionResetError:
            raise _ClientLeft from None
        return response

    async def _next(self, call: _Call, upstream: aiohttp.ClientResponse) -> bytes:
        """The next bytes of a stream, empty at its end. A stream that breaks off ends with an event that says so.

        The status is sent by then, and OpenAI's clients raise on an event that holds an error.
        """
        try:
            return await upstream.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            LOG.warning("request %s: the answer broke off: %r", call.request_id, error)
            upstream.close()
            return b"data: " + errors.engine_failed(call.model.id).body() + _EVENT_END

    def hold(self, call: _Call) -> None:
        """Count a request that begins to wait.

        Raises:
            ApiError: too many wait already.
        """
        if self._held_requests >= self._limits.held_requests or self._held_bytes + call.size > self._limits.held_bytes:
            raise errors.too_many_waiting(call.model.id)
        self._held_requests += 1
        self._held_bytes += call.size
        self._demand.add_waiting(call.model.id, 1)

    def unhold(self, call: _Call) -> None:
        """Count a request that waits no longer."""
        self._held_requests -= 1
        self._held_bytes -= call.size
        self._demand.add_waiting(call.model.id, -1)


class _Held:
    """A request that waits, for as long as the block runs."""

    def __init__(self, proxy: Proxy, call: _Call) -> None:
        self._proxy = proxy
        self._call = call

    def __enter__(self) -> None:
        self._proxy.hold(self._call)

    def __exit__(self, *_: object) -> None:
        self._proxy.unhold(self._call)


async def _raise_not_started(upstream: aiohttp.ClientResponse) -> None:
    """Raise for answers that say that the engine did not begin.

    A 404 is the engine's for a model it does not hold (unloaded, or restarted and empty): never another model's answer.
    401 and 403 are the pod's refusal of the gateway, not of the client.
    """
    status = upstream.status
    if status == HTTPStatus.SERVICE_UNAVAILABLE and upstream.headers.get(NOT_STARTED_HEADER) == "true":
        reason = "draining"
    elif status == HTTPStatus.NOT_FOUND:
        reason = "not_resident"
    elif status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
        reason = "token_refused"
    else:
        return
    await upstream.read()
    raise _NotStarted(reason)


def _names(data: bytes, engine_name: str) -> bool:
    """Whether a JSON answer comes from the model that was asked. The whole document is parsed only if in doubt."""
    if b'"model":"' + engine_name.encode() + b'"' in data:
        return True
    try:
        return bool(orjson.loads(data).get("model") == engine_name)
    except (orjson.JSONDecodeError, AttributeError):
        return False


def _event_names(start: bytes, engine_name: str) -> bool:
    """As `_names`, of the first server-sent event; one that tells an error or ends the stream names no model."""
    for line in start.split(b"\n"):
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]" or _names(data, engine_name):
            return True
        try:
            return "error" in orjson.loads(data)
        except (orjson.JSONDecodeError, TypeError):
            return False
    return not start


def _request_id(request: web.BaseRequest) -> str:
    """The client's id of the request, if it fits into a log line and a header, or a new one."""
    given = request.headers.get("X-Request-Id", "")
    if given and len(given) <= _REQUEST_ID_LENGTH and given.isascii() and given.isprintable():
        return given
    return secrets.token_hex(8)


async def _continue(request: web.BaseRequest) -> None:
    """Ask for the body: curl, above 1 MiB, and others wait for this before they send it."""
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    # The interim answer does not count as the answer's first bytes.
    request.writer.output_size = 0


def _require(request: web.BaseRequest, method: str) -> None:
    if request.method != method:
        raise errors.method_not_allowed(request.method, request.rel_url.path, method)


def _described(model: Model) -> dict[str, Any]:
    return {"id": model.id, "object": "model", "created": model.created, "owned_by": model.namespace}


def _json(document: dict[str, Any]) -> web.Response:
    return web.Response(body=orjson.dumps(document), content_type=_JSON)


def _reply_headers(upstream: aiohttp.ClientResponse, request_id: str) -> dict[str, str]:
    headers = {"X-Request-Id": request_id, "Content-Type": upstream.headers.get("Content-Type", _JSON)}
    if "Retry-After" in upstream.headers:
        headers["Retry-After"] = upstream.headers["Retry-After"]
    return headers


def _answer(error: errors.ApiError, request_id: str) -> web.Response:
    return web.Response(
        status=error.status,
        body=error.body(),
        content_type=_JSON,
        headers=error.headers | {"X-Request-Id": request_id},
    )
