"""HTTP servers for /healthz and /readyz on one port and /metrics on another."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from aiohttp import web
from prometheus_client import generate_latest

from tunesmith.contracts.agent import METRICS_REFUSAL

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from prometheus_client import CollectorRegistry


@asynccontextmanager
async def serving(
    *,
    probe_port: int,
    metrics_port: int,
    unhealthy: Callable[[], list[str]],
    unready: Callable[[], list[str]],
    registry: CollectorRegistry,
    may_read: Callable[[str], bool],
) -> AsyncIterator[None]:
    """Serve until the context exits.

    Args:
        probe_port: port of /healthz and /readyz.
        metrics_port: port of /metrics.
        unhealthy: returns the reasons why the process must restart; empty if there are none.
        unready: returns the reasons why the process cannot work now; empty if there are none.
        registry: the metrics.
        may_read: returns True if a value of the header Authorization grants access to /metrics.

    Raises:
        OSError: a port is taken.
    """

    def check(problems: Callable[[], list[str]]) -> Callable[[web.Request], object]:
        async def answer(_: web.Request) -> web.Response:
            found = problems()
            return web.Response(text="\n".join(found or ["ok"]) + "\n", status=503 if found else 200)

        return answer

    async def metrics(request: web.Request) -> web.Response:
        if not may_read(request.headers.get("Authorization", "")):
            raise web.HTTPUnauthorized(text=METRICS_REFUSAL, headers={"WWW-Authenticate": "Bearer"})
        return web.Response(body=generate_latest(registry), content_type="text/plain", charset="utf-8")

    probes = web.Application()
    probes.router.add_get("/healthz", check(unhealthy))  # type: ignore[arg-type]
    probes.router.add_get("/readyz", check(unready))  # type: ignore[arg-type]
    figures = web.Application()
    figures.router.add_get("/metrics", metrics)
    runners = [web.AppRunner(app, access_log=None) for app in (probes, figures)]
    try:
        for runner, port in zip(runners, (probe_port, metrics_port), strict=True):
            await runner.setup()
            await web.TCPSite(runner, port=port, reuse_address=True).start()
        yield
    finally:
        for runner in runners:
            await runner.cleanup()
