"""The agent's HTTP API, for the operator, the gateway, Prometheus and vLLM's preStop hook."""

from __future__ import annotations

import hmac
import logging
from typing import TYPE_CHECKING

from aiohttp import web
from pydantic import ValidationError

from tunesmith.contracts.agent import HEARTBEAT_SECONDS, DesiredAdapters
from tunesmith_server.desired import OutdatedError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tunesmith_server.agent import Agent
    from tunesmith_server.metrics import Metrics

MAX_BODY_BYTES = 4 * 1024 * 1024
OPEN = "/healthz"

log = logging.getLogger(__name__)


class AgentApi:
    """The routes.

    Args:
        agent: whose state is shown.
        metrics: what `/metrics` shows.
        token: the pool's token, asked for on every route but `/healthz`.
    """

    def __init__(self, agent: Agent, metrics: Metrics, token: str) -> None:
        self._agent = agent
        self._metrics = metrics
        self._token = token.encode()

    def application(self) -> web.Application:
        """The aiohttp application."""
        application = web.Application(middlewares=[self._guard], client_max_size=MAX_BODY_BYTES)
        application.add_routes(
            [
                web.get(OPEN, self._healthz),
                web.put("/v1/adapters", self._put),
                web.get("/v1/events", self._events),
                web.post("/drain", self._drain),
                web.get("/metrics", self._show_metrics),
            ]
        )
        return application

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        allowed = scheme.lower() == "bearer" and hmac.compare_digest(token.strip().encode(), self._token)
        if request.path != OPEN and not allowed:
            return web.json_response(
                {"error": "The pool's token is missing or wrong."}, status=401, headers={"WWW-Authenticate": "Bearer"}
            )
        return await handler(request)

    async def _healthz(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _put(self, request: web.Request) -> web.Response:
        try:
            wanted = DesiredAdapters.model_validate_json(await request.read())
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"])) or "the body"
            return web.json_response({"error": f"{place}: {first['msg']}"}, status=400)
        names = [adapter.engine_name for adapter in wanted.adapters]
        if len(set(names)) < len(names):
            return web.json_response({"error": "adapters: an engine name stands in the list twice"}, status=400)
        try:
            await self._agent.put(wanted)
        except OutdatedError as error:
            return web.json_response({"error": str(error)}, status=409)
        return web.json_response({"epoch": wanted.epoch, "sequence": wanted.sequence})

    async def _events(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson", "Cache-Control": "no-store"})
        await response.prepare(request)
        state = self._agent.state
        try:
            while True:
                await response.write(state.model_dump_json(by_alias=True).encode() + b"\n")
                state = await self._agent.changed(state, HEARTBEAT_SECONDS)
        except ConnectionResetError:
            return response  # the reader is gone

    async def _drain(self, _request: web.Request) -> web.Response:
        return web.json_response({"drained": await self._agent.drain()})

    async def _show_metrics(self, _request: web.Request) -> web.Response:
        return web.Response(body=self._metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4"})
