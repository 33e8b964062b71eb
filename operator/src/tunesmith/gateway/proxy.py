"""The handler of the clients' port: request → hold → forward → reply."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web

from tunesmith.gateway import errors
from tunesmith.gateway.body import Body, parse
from tunesmith.gateway.broadcast import within
from tunesmith.gateway.budget import Budget
from tunesmith.gateway.connections import answer
from tunesmith.gateway.faults import described
from tunesmith.gateway.forward import OTHER_TOKEN, Forwarder, NotStartedError
from tunesmith.gateway.reply import ANSWER_BYTES, ClientLeftError, EventReply, write_large
from tunesmith.gateway.request import Call, cache_salt, presented_key, read_body, request_id, require

if TYPE_CHECKING:
    from collections.abc import Callable

    import aiohttp

    from tunesmith.contracts.agent import Keys
    from tunesmith.contracts.apikey import ApiKey
    from tunesmith.gateway.budget import Share
    from tunesmith.gateway.catalog import Catalog, Model
    from tunesmith.gateway.demand import Demand
    from tunesmith.gateway.keys import KeyTable
    from tunesmith.gateway.limits import Limits
    from tunesmith.gateway.metrics import Metrics
    from tunesmith.gateway.residency import Backend, Residency

LOG = logging.getLogger(__name__)

GENERATE_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
MODELS_PATH = "/v1/models"
HEALTH_PATHS = frozenset({"/", "/health"})
CLIENT_LEFT = 499
"""In metrics and the log: the client closed the connection before the answer was complete."""
_RETRY_PAUSE_SECONDS = 0.25
_END_SECONDS = 5.0
"""How long the last events of cut-off streams may take."""


@dataclass(slots=True)
class _Exchange:
    """A request and what has become of it."""

    request: web.BaseRequest
    request_id: str
    arrived: float
    call: Call | None = None

    @property
    def model(self) -> str:
        """The global id of the model, for logs and metrics; empty where no known model was named."""
        return self.call.model.id if self.call else ""


class Proxy:
    """The handler of the clients' port.

    Args:
        gateway_keys: return the gateway's keys, which the salts of the prefix cache derive from.
        not_ready: why the gateway should get no requests, or None.
    """

    def __init__(
        self,
        *,
        session: aiohttp.ClientSession,
        gateway_keys: Callable[[], Keys],
        keys: KeyTable,
        catalog: Catalog,
        residency: Residency,
        demand: Demand,
        metrics: Metrics,
        limits: Limits,
        clock: Callable[[], float],
        synced: Callable[[], bool],
        not_ready: Callable[[], str | None],
    ) -> None:
        self._gateway_keys = gateway_keys
        self._keys = keys
        self._catalog = catalog
        self._residency = residency
        self._demand = demand
        self._metrics = metrics
        self._limits = limits
        self._clock = clock
        self._synced = synced
        self._not_ready = not_ready
        self._held_requests = 0
        self._cutoffs: set[asyncio.Timeout] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.budget = Budget(limits)
        self.closing = False
        """The process is about to end: every answer asks its client to close the connection."""
        self._forwarder = Forwarder(
            session, residency, demand, metrics, limits, clock=clock, closing=lambda: self.closing
        )

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        exchange = _Exchange(request, request_id(request), self._clock())
        code: int = CLIENT_LEFT
        try:
            response = await self._respond(exchange)
            code = response.status
        except errors.ApiError as error:
            code = error.status
            if code >= HTTPStatus.INTERNAL_SERVER_ERROR:
                LOG.warning("request %s for %s: %d %s", exchange.request_id, exchange.model or "-", code, error.message)
            response = await self._report(exchange, error)
        except ClientLeftError:
            response = _nobody()
        finally:
            self._metrics.ended(exchange.model, code, self._clock() - exchange.arrived)
        if self.closing and not response.prepared:
            response.force_close()
        return response

    async def drain(self, seconds: float) -> None:
        """Wait for the running requests, at most so long, then end those that are left with an error."""
        await within(self._idle, seconds)
        if self._cutoffs:
            LOG.warning("%d requests are cut off after %g s", len(self._cutoffs), seconds)
        for cutoff in self._cutoffs:
            cutoff.reschedule(asyncio.get_running_loop().time())
        await within(self._idle, _END_SECONDS)

    async def _respond(self, exchange: _Exchange) -> web.StreamResponse:
        """Answer a request before the process ends.

        Raises:
            ApiError: the answer is an error.
            ClientLeftError: nobody reads the answer.
        """
        try:
            async with asyncio.timeout(None) as cutoff:
                self._cutoffs.add(cutoff)
                self._idle.clear()
                try:
                    return await self._answer(exchange)
                finally:
                    self._cutoffs.discard(cutoff)
                    if not self._cutoffs:
                        self._idle.set()
        except (errors.ApiError, ClientLeftError):
            raise
        except TimeoutError:
            if not cutoff.expired():  # the client's connection timed out
                raise ClientLeftError from None
            raise (errors.cut_off() if exchange.call and exchange.call.started else errors.ending()) from None
        except ConnectionError:
            raise ClientLeftError from None
        except Exception as error:  # noqa: BLE001 - a fault of this process; its text may hold what the client sent
            LOG.error("request %s for %s: %s", exchange.request_id, exchange.model or "-", described(error))  # noqa: TRY400
            raise errors.internal() from None

    async def _report(self, exchange: _Exchange, error: errors.ApiError) -> web.StreamResponse:
        """Tell the client of an error: as an event once its stream has begun, otherwise as the answer."""
        events = exchange.call.events if exchange.call else None
        if events is None or events.response is None:
            return answer(error, exchange.request_id)
        try:
            return await events.fail(error)
        except ClientLeftError:
            return _nobody()

    async def _answer(self, exchange: _Exchange) -> web.StreamResponse:
        request = exchange.request
        path = request.rel_url.path
        if path in GENERATE_PATHS:
            require(request, "POST")
            key = self._authenticate(request)
            with self.budget.share(key.name) as share:
                exchange.call = await self._call(exchange, key, share)
                return await self._generate(exchange.call)
        if path == MODELS_PATH or path.startswith(MODELS_PATH + "/"):
            require(request, "GET", "HEAD")
            key = self._authenticate(request)
            body = self._models(key, path.removeprefix(MODELS_PATH)[1:])
            if request.method == "HEAD" or len(body) <= ANSWER_BYTES:
                return _json(body)
            with self.budget.share(key.name) as whole, self.budget.share(key.name) as share:
                whole.grow(len(body))
                return await write_large(request, body, share, self._limits)
        if path in HEALTH_PATHS:
            require(request, "GET", "HEAD")
            reason = self._not_ready()
            if reason is not None:
                raise errors.not_ready(reason)
            return _json(b'{"status":"ok"}')
        raise errors.unknown_url(request.method, path)

    def _authenticate(self, request: web.BaseRequest) -> ApiKey:
        key = presented_key(request, self._keys)
        if key is None:
            raise errors.invalid_key() if self._synced() else errors.starting()
        return key

    async def _call(self, exchange: _Exchange, key: ApiKey, share: Share) -> Call:
        share.grow(ANSWER_BYTES)
        request, limits = exchange.request, self._limits
        body = parse(await read_body(request, share, limits), limits.sequences)
        return Call(
            request=request,
            request_id=exchange.request_id,
            key=key,
            model=self._model(body, key),
            body=body,
            share=share,
            cache_salt=cache_salt(self._gateway_keys()[0], key.home),
            events=self._events(exchange, share) if body.stream else None,
            arrived=exchange.arrived,
        )

    def _events(self, exchange: _Exchange, share: Share) -> EventReply:
        return EventReply(
            exchange.request, exchange.request_id, share, self._limits, clock=self._clock, closing=lambda: self.closing
        )

    def _model(self, body: Body, key: ApiKey) -> Model:
        try:
            return self._catalog.resolve(body.model, key)
        except errors.ApiError:
            if self._synced():
                raise
            raise errors.starting() from None

    def _models(self, key: ApiKey, name: str) -> bytes:
        if not self._synced():
            raise errors.starting()
        if name:
            # Clients send the slash of a global id as %2F or as it is.
            return orjson.dumps(_description(self._catalog.resolve(name.replace("%2F", "/").replace("%2f", "/"), key)))
        return orjson.dumps({"object": "list", "data": [_description(model) for model in self._catalog.visible(key)]})

    async def _generate(self, call: Call) -> web.StreamResponse:
        """Forward to a pod; hold the request while none holds the model."""
        deadline = call.arrived + self._limits.hold_seconds
        refused: set[str] = set()
        while True:
            changed = self._residency.changed.next()
            model = call.model
            chosen = self._pick(call, refused)
            if chosen is not None:
                backend, engine_name = chosen
                try:
                    return await self._forwarder.forward(call, backend, engine_name)
                except NotStartedError as not_started:
                    call.started = False
                    self._metrics.not_started(not_started.reason)
                    LOG.info("request %s: pod %s: %s", call.request_id, backend.pod.name, not_started.reason)
                    if not_started.reason != OTHER_TOKEN:
                        refused.add(backend.pod.uid)
                    continue
            if not model.deployed and not refused:
                raise errors.model_not_found(model.engine_names[0])
            if model.not_ready is not None:
                raise errors.model_not_ready(model.id, model.not_ready)
            left = deadline - self._clock()
            if left <= 0:
                raise errors.no_pod_ready(model.id, self._limits.hold_seconds)
            await self._hold(call, changed, min(left, _RETRY_PAUSE_SECONDS) if refused else left)
            refused.clear()
            # While a request waits, revisions come and go.
            call.model = self._catalog.resolve(call.body.model, call.key)

    def _pick(self, call: Call, refused: set[str]) -> tuple[Backend, str] | None:
        """Return a pod for the newest revision that any usable pod holds."""
        model = call.model
        if model.pool is None:
            return None
        for engine_name in model.engine_names:
            backend = self._residency.pick(
                model.pool, engine_name, is_base=model.is_base, excluded=refused, weight=call.body.sequences
            )
            if backend is not None:
                return backend, engine_name
        return None

    async def _hold(self, call: Call, changed: asyncio.Event, seconds: float) -> None:
        """Keep a request until something changes, at most so long.

        Raises:
            ApiError: too many wait already.
            ClientLeftError: the client left.
        """
        if self._held_requests >= self._limits.held_requests:
            raise errors.too_many_waiting(call.model.id)
        model, until = call.model.id, self._clock() + seconds
        self._held_requests += 1
        self._demand.add_waiting(model, call.body.sequences)
        try:
            while not changed.is_set() and (left := until - self._clock()) > 0:
                if call.events is None:
                    await within(changed, left)
                else:
                    await call.events.comment_if_due()
                    await within(changed, min(left, call.events.until_comment()))
        finally:
            self._held_requests -= 1
            self._demand.add_waiting(model, -call.body.sequences)


def _nobody() -> web.Response:
    """Return what aiohttp drops, since the connection is closed."""
    return web.Response(status=CLIENT_LEFT)


def _description(model: Model) -> dict[str, Any]:
    return {"id": model.id, "object": "model", "created": model.created, "owned_by": model.namespace}


def _json(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json")
