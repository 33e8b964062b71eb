"""The internal port: demand for the operator, metrics, probes."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import TYPE_CHECKING

from aiohttp import web

from tunesmith.contracts.agent import METRICS_REFUSAL, accepts, demand_tokens, metrics_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from tunesmith.contracts.agent import Keys
    from tunesmith.gateway.demand import Demand
    from tunesmith.gateway.metrics import Metrics


def internal_app(
    demand: Demand,
    metrics: Metrics,
    gateway_keys: Callable[[], Keys],
    not_ready: Callable[[], str | None],
    *,
    require_token: bool,
) -> web.Application:
    """Return the application of the internal port.

    Args:
        demand: streamed by /v1/demand.
        metrics: exposed by /metrics.
        gateway_keys: returns the gateway's keys, from which the tokens of /v1/demand and /metrics are derived.
        not_ready: returns the reason why the gateway is not ready for requests, or None.
        require_token: True if /metrics requires a token.
    """

    async def stream_demand(request: web.Request) -> web.StreamResponse:
        if not accepts(request.headers.get("Authorization", ""), demand_tokens(gateway_keys())):
            raise web.HTTPUnauthorized(text="the demand stream requires a token derived from the gateway's key\n")
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        async for line in demand.lines():
            await response.write(line)
        return response

    async def show_metrics(request: web.Request) -> web.StreamResponse:
        header = request.headers.get("Authorization", "")
        if require_token and not accepts(header, metrics_tokens(gateway_keys())):
            raise web.HTTPUnauthorized(text=METRICS_REFUSAL, headers={"WWW-Authenticate": "Bearer"})
        return await _exposition(request, metrics)

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        reason = not_ready()
        if reason is not None:
            return web.Response(text=f"{reason}\n", status=HTTPStatus.SERVICE_UNAVAILABLE)
        return web.Response(text="ok\n")

    app = web.Application()
    app.router.add_get("/v1/demand", stream_demand)
    app.router.add_get("/metrics", show_metrics)
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    return app


async def _exposition(request: web.Request, metrics: Metrics) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
    await response.prepare(request)
    for piece in metrics.exposition():
        if piece:
            await response.write(piece)
        # Serve requests before the next piece.
        await asyncio.sleep(0)
    return response
