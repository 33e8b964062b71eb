"""HTTP API of the agent, for the operator, the gateway, Prometheus and vLLM's preStop hook."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable  # noqa: TC003 - of a dataclass
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aiohttp import web
from pydantic import ValidationError

from tunesmith.contracts.agent import HEARTBEAT_SECONDS, DesiredAdapters, Keys, accepts, accepts_digest, pod_tokens
from tunesmith.contracts.crash import EXITS_PATH, EngineExit
from tunesmith.contracts.podevents import EventWriter
from tunesmith_server.desired import ImplausibleEpochError, OutdatedError

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from tunesmith_server.agent import Agent
    from tunesmith_server.metrics import Metrics

MAX_BODY_BYTES = 4 * 1024 * 1024
MAX_READERS = 64
"""Highest number of concurrent event streams: every gateway replica and the leading operator open one."""
WRITE_SECONDS = 10.0
"""Time within which a reader must accept a line; otherwise it is disconnected."""
MIN_INTERVAL_SECONDS = 0.05
"""Time within which changes are combined into one line."""
UNAUTHENTICATED_PATH = "/healthz"
DRAIN = "/drain"
EVENTS = "/v1/events"
METRICS = "/metrics"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Credentials:
    """Keys and digests with which the agent verifies tokens.

    Attributes:
        control: return the pool's control keys, for routes that change the pod.
        events: return the pool's events keys, for the stream of the pod's state.
        metrics: return the digests of the tokens of /metrics.
        pod_uid: UID of this pod.
        admin_token: shared with the engine's container, whose preStop hook drains the pod with it, and whose
            supervisor reports exits. Nothing else may drain the pod: a draining pod serves no requests until it is
            replaced.
    """

    control: Callable[[], Keys] = field(repr=False)
    events: Callable[[], Keys] = field(repr=False)
    metrics: Callable[[], Keys] = field(repr=False)
    pod_uid: str
    admin_token: str = field(repr=False)

    def admit(self, path: str, presented: str) -> bool:
        """True if the value of an Authorization header opens a route."""
        if path == METRICS:
            return accepts_digest(presented, self.metrics())
        if path in {DRAIN, EXITS_PATH}:
            return accepts(presented, (self.admin_token,))
        return accepts(presented, pod_tokens(self.events() if path == EVENTS else self.control(), self.pod_uid))


class AgentApi:
    """Routes of the agent.

    Args:
        agent: agent whose state is returned.
        metrics: metrics that `/metrics` returns.
        credentials: credentials that callers must present.
    """

    def __init__(self, agent: Agent, metrics: Metrics, credentials: Credentials) -> None:
        self._agent = agent
        self._metrics = metrics
        self._credentials = credentials
        self._readers = 0

    def application(self) -> web.Application:
        """Return the aiohttp application."""
        application = web.Application(middlewares=[self._guard], client_max_size=MAX_BODY_BYTES)
        application.add_routes(
            [
                web.get(UNAUTHENTICATED_PATH, self._healthz),
                web.put("/v1/adapters", self._put),
                web.get(EVENTS, self._events),
                web.post(DRAIN, self._drain),
                web.post(EXITS_PATH, self._record_exit),
                web.get(METRICS, self._show_metrics),
            ]
        )
        return application

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        presented = request.headers.get("Authorization", "")
        if request.path != UNAUTHENTICATED_PATH and not self._credentials.admit(request.path, presented):
            return web.json_response(
                {"error": f"The token for {request.method} of this path is missing or wrong."},
                status=401,
                headers={"WWW-Authenticate": "Bearer"},
            )
        return await handler(request)

    async def _healthz(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _put(self, request: web.Request) -> web.Response:
        try:
            wanted = DesiredAdapters.model_validate_json(await request.read())
        except ValidationError as error:
            return _invalid(error)
        names = [adapter.engine_name for adapter in wanted.adapters]
        if len(set(names)) < len(names):
            return web.json_response({"error": "adapters: an engine name appears twice in the list"}, status=400)
        try:
            await self._agent.put(wanted)
        except OutdatedError as error:
            return web.json_response({"error": str(error)}, status=409)
        except ImplausibleEpochError as error:
            return web.json_response({"error": str(error)}, status=400)
        return web.json_response({"epoch": wanted.epoch, "sequence": wanted.sequence})

    async def _events(self, request: web.Request) -> web.StreamResponse:
        if self._readers >= MAX_READERS:
            return web.json_response({"error": f"{MAX_READERS} streams are open already."}, status=503)
        self._readers += 1
        try:
            return await self._write_events(request)
        finally:
            self._readers -= 1

    async def _write_events(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson", "Cache-Control": "no-store"})
        state, writer = self._agent.state, EventWriter(traffic=request.query.get("traffic") == "true")
        try:
            await response.prepare(request)
            while True:
                async with asyncio.timeout(WRITE_SECONDS):
                    await response.write(writer.line(state))
                await asyncio.sleep(MIN_INTERVAL_SECONDS)
                state = await self._agent.changed(state, HEARTBEAT_SECONDS - MIN_INTERVAL_SECONDS)
        except ConnectionResetError:
            return response  # the reader has disconnected
        except TimeoutError:
            log.warning("a reader of the events did not accept a line within %g s", WRITE_SECONDS)
            if request.transport is not None:
                request.transport.abort()
            return response

    async def _drain(self, _request: web.Request) -> web.Response:
        return web.json_response({"drained": await self._agent.drain()})

    async def _record_exit(self, request: web.Request) -> web.Response:
        try:
            report = EngineExit.model_validate_json(await request.read())
        except ValidationError as error:
            log.warning("a report of the engine's supervisor is invalid: %s", error)
            return _invalid(error)
        await self._agent.record_exit(report)
        return web.json_response({})

    async def _show_metrics(self, _request: web.Request) -> web.Response:
        return web.Response(body=self._metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4"})


def _invalid(error: ValidationError) -> web.Response:
    first = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(map(str, first["loc"])) or "the body"
    return web.json_response({"error": f"{field}: {first['msg']}"}, status=400)
