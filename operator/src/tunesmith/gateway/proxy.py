"""The handler of the clients' port: request → hold → forward → reply.

Each step is a module: `request` authenticates the client and resolves the model, `hold` chooses the revision and the
pod and waits for them, `forward` sends the call to that pod, `reply` writes to the client. This module adds what covers
all steps of an exchange: errors, metrics, log lines and the shutdown.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING

from aiohttp import web

from tunesmith.contracts.crash import request_digest
from tunesmith.gateway import errors
from tunesmith.gateway.access_log import AccessRecord
from tunesmith.gateway.apis import API_BY_PATH, error_body, error_event, names_stored_response
from tunesmith.gateway.broadcast import wait_for_event
from tunesmith.gateway.budget import Budget
from tunesmith.gateway.connections import error_response
from tunesmith.gateway.faults import describe_error
from tunesmith.gateway.forward import OTHER_TOKEN, EngineLostError, Forwarder, NotStartedError
from tunesmith.gateway.hold import RequestHold
from tunesmith.gateway.models import MODELS_PATH, models_body, names_models
from tunesmith.gateway.reply import ANSWER_BYTES, LIMIT_HEADERS, ClientDisconnectedError, write_large
from tunesmith.gateway.request import RequestReader, request_id, require
from tunesmith.gateway.shadow import Mirrors
from tunesmith.gateway.usage import estimated_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    import aiohttp

    from tunesmith.contracts.agent import Keys
    from tunesmith.contracts.apikey import ApiKey
    from tunesmith.gateway.backends import BackendTable
    from tunesmith.gateway.catalog import Catalog
    from tunesmith.gateway.cors import Cors
    from tunesmith.gateway.crashes import CrashTable
    from tunesmith.gateway.demand import Demand
    from tunesmith.gateway.keys import KeyTable
    from tunesmith.gateway.limits import Limits
    from tunesmith.gateway.metrics import Metrics
    from tunesmith.gateway.oidc import TokenVerifier
    from tunesmith.gateway.quotas import Quotas
    from tunesmith.gateway.request import Call
    from tunesmith.gateway.tracing import RequestTrace, Tracing

LOG = logging.getLogger(__name__)

HEALTH_PATHS = frozenset({"/", "/health"})
CLIENT_CLOSED_REQUEST = 499
"""Status code in metrics and the log if the client closed the connection before the answer was complete."""
_LONGEST_METHOD = 16
_CUT_OFF_SECONDS = 5.0
"""Time limit for sending the last events of cut-off streams."""


@dataclass(slots=True)
class _Exchange:
    """A request and its progress."""

    request: web.BaseRequest
    request_id: str
    arrived: float
    key: str = ""
    call: Call | None = None
    trace: RequestTrace | None = None

    @property
    def model(self) -> str:
        """Global id of the model, for logs and metrics; empty if the request names no known model."""
        return self.call.model.id if self.call else ""

    @property
    def name(self) -> str:
        """Name of the revision that the request was sent to last, otherwise of its model, for metrics."""
        return (self.call.engine_name or self.call.model.id) if self.call else ""


class Proxy:
    """The handler of the clients' port.

    Args:
        gateway_keys: returns the gateway's keys, from which the salts of the prefix cache are derived.
        cors: answers to browsers.
        replicas: number of gateways.
        not_ready: returns the reason why the gateway is not ready for requests, or None.
    """

    def __init__(
        self,
        *,
        session: aiohttp.ClientSession,
        gateway_keys: Callable[[], Keys],
        keys: KeyTable,
        tokens: TokenVerifier | None,
        catalog: Catalog,
        backends: BackendTable,
        crashes: CrashTable,
        demand: Demand,
        metrics: Metrics,
        limits: Limits,
        quotas: Quotas,
        cors: Cors,
        replicas: int,
        record: Callable[[AccessRecord], None] | None,
        tracing: Tracing | None,
        clock: Callable[[], float],
        synced: Callable[[], bool],
        not_ready: Callable[[], str | None],
    ) -> None:
        self._catalog = catalog
        self._crashes = crashes
        self._metrics = metrics
        self._limits = limits
        self._quotas = quotas
        self._demand = demand
        self._use_of_keys = demand.key_use
        self._cors = cors
        self._record = record
        self._tracing = tracing
        self._clock = clock
        self._synced = synced
        self._not_ready = not_ready
        self._cutoffs: set[asyncio.Timeout] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.budget = Budget(limits)
        self.closing = False
        """True once the process shuts down: every answer asks its client to close the connection."""

        def closing() -> bool:
            return self.closing

        self._requests = RequestReader(
            gateway_keys, keys, tokens, catalog, limits, clock=clock, synced=synced, closing=closing
        )
        self._hold = RequestHold(catalog, backends, demand, limits, replicas=replicas, clock=clock)
        self._mirrors = Mirrors(
            session,
            backends,
            crashes,
            demand.comparisons,
            catalog.exists,
            max_in_flight_bytes=limits.max_in_flight_bytes,
            is_busy=lambda: 2 * self.budget.used > limits.max_in_flight_bytes,
            clock=clock,
        )
        self._forwarder = Forwarder(session, backends, demand, metrics, limits, clock=clock, closing=closing)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        exchange = _Exchange(request, request_id(request), self._clock())
        request[LIMIT_HEADERS] = self._cors.headers(request.headers)
        path = request.rel_url.path
        if self._tracing is not None and path not in HEALTH_PATHS:
            route = _known_path(path)
            exchange.trace = self._tracing.begin(request.method, route, request.headers, exchange.request_id)
        code: int = CLIENT_CLOSED_REQUEST
        try:
            response = await self._respond(exchange)
            code = response.status
        except errors.ApiError as error:
            code = error.status
            if code >= HTTPStatus.INTERNAL_SERVER_ERROR:
                LOG.warning("request %s for %s: %d %s", exchange.request_id, exchange.model or "-", code, error.message)
            response = await self._report(exchange, error)
        except ClientDisconnectedError:
            response = _no_response()
        finally:
            seconds = self._clock() - exchange.arrived
            self._metrics.finished(exchange.name, code, seconds)
            if exchange.call is not None and exchange.call.answered and exchange.call.api.computes:
                self._metrics.generated(exchange.name, exchange.call.usage.counts)
            if exchange.trace is not None:
                exchange.trace.finish(code, exchange.key)
            if self._record is not None and path not in HEALTH_PATHS:
                self._record(_access_record(exchange, code, seconds))
        if not response.prepared:
            response.headers.update(request.get(LIMIT_HEADERS, {}))
            if self.closing:
                response.force_close()
        return response

    async def drain(self, seconds: float) -> None:
        """Wait for running requests for at most `seconds`, then terminate the remaining ones with an error.

        Mirrored requests are cancelled immediately.
        """
        await self._mirrors.close()
        await wait_for_event(self._idle, seconds)
        if self._cutoffs:
            LOG.warning("cutting off %d requests after %g s", len(self._cutoffs), seconds)
        for cutoff in self._cutoffs:
            cutoff.reschedule(asyncio.get_running_loop().time())
        await wait_for_event(self._idle, _CUT_OFF_SECONDS)

    async def _respond(self, exchange: _Exchange) -> web.StreamResponse:
        """Answer a request, or cut it off when the process shuts down.

        Raises:
            ApiError: the answer is an error.
            ClientDisconnectedError: the client closed its connection.
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
        except (errors.ApiError, ClientDisconnectedError):
            raise
        except TimeoutError:
            if not cutoff.expired():  # the client's connection timed out
                raise ClientDisconnectedError from None
            raise (errors.cut_off() if exchange.call and exchange.call.started else errors.shutting_down()) from None
        except ConnectionError:
            raise ClientDisconnectedError from None
        except Exception as error:  # noqa: BLE001 - an internal fault; its text may contain the client's data
            LOG.error("request %s for %s: %s", exchange.request_id, exchange.model or "-", describe_error(error))  # noqa: TRY400
            raise errors.internal() from None

    async def _report(self, exchange: _Exchange, error: errors.ApiError) -> web.StreamResponse:
        """Report an error to the client: as an event once its stream has begun, otherwise as the answer."""
        events, path = exchange.call.events if exchange.call else None, exchange.request.rel_url.path
        if events is None or events.response is None:
            return error_response(error, exchange.request_id, error_body(error, path, exchange.request_id))
        try:
            return await events.fail(error_event(error, path, exchange.request_id))
        except ClientDisconnectedError:
            return _no_response()

    async def _answer(self, exchange: _Exchange) -> web.StreamResponse:
        request = exchange.request
        path = request.rel_url.path
        preflight = self._cors.preflight(request.method, request.headers)
        if preflight is not None:
            return web.Response(status=HTTPStatus.NO_CONTENT, headers=preflight)
        api = API_BY_PATH.get(path)
        if api is not None:
            require(request, "POST")
            key = await self._admit(exchange)
            with self.budget.share(key.name) as share:
                call = await self._requests.read(request, exchange.request_id, api, key, share, exchange.arrived)
                exchange.call, call.trace = call, exchange.trace
                return await self._generate_counted(call)
        if names_stored_response(path):
            await self._admit(exchange)
            raise errors.responses_not_stored()
        if names_models(path):
            require(request, "GET", "HEAD")
            return await self._models(request, await self._admit(exchange))
        if path in HEALTH_PATHS:
            require(request, "GET", "HEAD")
            reason = self._not_ready()
            if reason is not None:
                raise errors.not_ready(reason)
            return _json(b'{"status":"ok"}')
        raise errors.unknown_url(request.method, path)

    async def _admit(self, exchange: _Exchange) -> ApiKey:
        """Return the API key of a request, which counts towards the key's limit.

        Raises:
            ApiError: the request has no valid key, or the key has used up its limit.
        """
        key = await self._requests.authenticate(exchange.request)
        exchange.key = key.name
        if key.digest:  # not that of a token
            self._use_of_keys.record(key.name)
        exchange.request[LIMIT_HEADERS] |= await self._quotas.count_request(key)
        return key

    async def _generate_counted(self, call: Call) -> web.StreamResponse:
        """Generate, and count sequences and tokens towards the limits.

        Raises:
            ApiError: a limit is used up, or as `_generate`.
        """
        tokens = estimated_tokens(call.body) if call.api.computes else 0
        reservation = await self._quotas.reserve(call.key, call.model, call.body.sequences, tokens)
        generate = self._generate_mirrored if call.api.computes else self._generate
        if reservation is not None:
            call.request[LIMIT_HEADERS] |= reservation.headers
        try:
            return await generate(call)
        finally:
            self._hold.release(call)
            if reservation is not None:
                used = call.usage.counts.total if call.answered and call.api.computes else 0
                self._quotas.settle(reservation, used)

    async def _generate_mirrored(self, call: Call) -> web.StreamResponse:
        """Generate, and mirror the request afterwards if it is in the share of a shadow.

        Raises:
            ApiError: as `_generate`.
        """
        mirror = call.mirror = None if call.model.shadow is None else self._mirrors.draw(call)
        if mirror is None:
            return await self._generate(call)
        try:
            response = await self._generate(call)
        except BaseException:
            self._mirrors.release(mirror)
            raise
        self._mirrors.start(mirror)
        return response

    async def _generate(self, call: Call) -> web.StreamResponse:
        """Hold and forward a call until a pod starts it, or a second one if the engine of the first one dies."""
        refused: set[str] = set()
        pool_uid = self._catalog.pool_uid(call.model.pool)
        if pool_uid is not None and call.model.engine_names and self._crashes.has_suspects(pool_uid):
            self._check_crashes(call, pool_uid, call.model.engine_names[0])  # a refused request does not wait for a pod
        self._demand.arrive(call.model.id, call.body.sequences)
        while True:
            with call.trace.hold() if call.trace is not None else nullcontext():
                backend, engine_name = await self._hold.wait_for_pod(call, refused)
            digest, crashed_before = self._check_crashes(call, backend.pod.pool.uid, engine_name)
            try:
                with call.trace.attempt(call, backend, engine_name) if call.trace is not None else nullcontext():
                    return await self._forwarder.forward(call, backend, engine_name, digest)
            except NotStartedError as not_started:
                call.started = False
                self._metrics.not_started(not_started.reason)
                LOG.info("request %s: pod %s: %s", call.request_id, backend.pod.name, not_started.reason)
                if not_started.reason != OTHER_TOKEN:
                    refused.add(backend.pod.uid)
            except EngineLostError:
                was_sent_twice, call.lost_on = bool(call.lost_on), backend.pod.uid
                if was_sent_twice or crashed_before or not self._hold.finds_pod(call):
                    raise errors.engine_failed(call.model.id) from None
                self._metrics.not_started("engine_lost")
                LOG.info("request %s: the engine of pod %s died", call.request_id, backend.pod.name)

    def _check_crashes(self, call: Call, pool_uid: str, engine_name: str) -> tuple[str, bool]:
        """Return the digest of a call, and True if it was in flight when an engine of the pool crashed.

        Raises:
            ApiError: it was in flight at several crashes, and is refused for some time.
        """
        body = call.body.pieces(engine_name, call.cache_salt)
        digest = request_digest(call.cache_salt, call.api.path, engine_name, body)
        suspect = self._crashes.find(pool_uid, digest)
        if suspect is not None and suspect.is_refused:
            seconds = self._crashes.seconds_until_accepted(suspect)
            raise errors.crashes_engines(call.model.id, digest, suspect.crashes, seconds)
        return digest, suspect is not None

    async def _models(self, request: web.BaseRequest, key: ApiKey) -> web.StreamResponse:
        if not self._synced():
            raise errors.starting()
        body = models_body(request.rel_url.path, self._catalog, key)
        if request.method == "HEAD" or len(body) <= ANSWER_BYTES:
            return _json(body)
        with self.budget.share(key.name) as whole, self.budget.share(key.name) as share:
            whole.reserve(len(body))
            return await write_large(request, body, share, self._limits)


def _access_record(exchange: _Exchange, status: int, seconds: float) -> AccessRecord:
    call, path = exchange.call, exchange.request.rel_url.path
    return AccessRecord(
        time=datetime.now(UTC),
        request_id=exchange.request_id,
        key=exchange.key,
        method=exchange.request.method[:_LONGEST_METHOD],
        path=_known_path(path),
        model=exchange.model,
        engine_name=call.engine_name if call else "",
        pod=call.pod if call else "",
        status=status,
        stream=call is not None and call.body.stream,
        sequences=call.body.sequences if call else 0,
        seconds=seconds,
        first_byte_seconds=call.first_byte_seconds if call else None,
        tokens=call.usage.counts.total if call and call.answered and call.api.computes else None,
    )


def _known_path(path: str) -> str:
    """Return a path of the gateway, for logs and traces; empty: another one."""
    return MODELS_PATH if names_models(path) else path if path in API_BY_PATH else ""


def _no_response() -> web.Response:
    """Return a placeholder response, which aiohttp drops since the connection is closed."""
    return web.Response(status=CLIENT_CLOSED_REQUEST)


def _json(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json")
