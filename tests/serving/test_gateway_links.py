"""The operator's streams of demand: which pods it follows, and what a pod that is no gateway learns."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from aiohttp import web

from tunesmith.autoscale.demand import DemandTracker
from tunesmith.cluster.watch import WatchEvent
from tunesmith.contracts.agent import (
    STALE_AFTER_SECONDS,
    AdapterDemand,
    GatewayDemand,
    accepts,
    demand_tokens,
    gateway_keys,
)
from tunesmith.controller.serving.gateways import GatewayLinks
from tunesmith.controller.serving.keyuse import KeyUseWriter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    import pytest

KEYS = (b"an installation key of the tests",)
OURS = {
    "app.kubernetes.io/name": "tunesmith",
    "app.kubernetes.io/instance": "release",
    "app.kubernetes.io/component": "gateway",
}


class Cluster:
    """Lists pods as the API server does: only those that match the selector."""

    def __init__(self, pods: list[dict[str, Any]]) -> None:
        self._pods = pods

    async def watch(self, kind: str, namespace: str, *, labels: str, keep: Any) -> AsyncIterator[WatchEvent]:
        assert (kind, namespace) == ("Pod", "tunesmith-system")
        wanted = dict(pair.split("=") for pair in labels.split(","))
        for pod in self._pods:
            if wanted.items() <= pod["metadata"]["labels"].items():
                yield WatchEvent("ADDED", keep({"kind": "Pod", **pod}))
        yield WatchEvent("SYNCED", {})
        await asyncio.Event().wait()


def pod(pod_name: str, address: str, /, **labels: str) -> dict[str, Any]:
    found = OURS | {f"app.kubernetes.io/{key}": value for key, value in labels.items()}
    metadata = {"name": pod_name, "uid": f"uid-{pod_name}", "labels": found}
    return {"metadata": metadata, "status": {"phase": "Running", "podIP": address}}


@asynccontextmanager
async def serving(address: str, port: int, answer: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> Any:
    application = web.Application()
    application.router.add_get("/v1/demand", answer)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, address, port)
    await site.start()
    yield runner.addresses[0][1]
    await runner.cleanup()


async def gateway(request: web.Request) -> web.StreamResponse:
    assert accepts(request.headers["Authorization"], demand_tokens(gateway_keys(KEYS)))
    response = web.StreamResponse()
    await response.prepare(request)
    models = {"team/pirate": AdapterDemand(running=3)}
    line = GatewayDemand(models=models, used_keys={"alice": 1_800_000_000}).model_dump_json(by_alias=True)
    while True:
        await response.write(line.encode() + b"\n")
        await asyncio.sleep(0.2)


async def test_a_pod_of_another_chart_with_the_same_component_is_ignored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    async def foreign(request: web.Request) -> web.StreamResponse:
        asked.append(request.headers.get("Authorization", ""))
        return web.Response(status=404)

    async with serving("127.0.2.1", 0, gateway) as port, serving("127.0.2.2", port, foreign):
        monkeypatch.setattr("tunesmith.controller.serving.gateways.GATEWAY_INTERNAL_PORT", port)
        pods = [
            pod("loki-gateway-0", "127.0.2.2", name="loki"),
            pod("other-release-gateway", "127.0.2.2", instance="other"),
            pod("tunesmith-operator", "127.0.2.2", component="operator"),
            pod("tunesmith-gateway-1", "127.0.2.1"),
        ]
        tracker = DemandTracker(STALE_AFTER_SECONDS)
        settings = SimpleNamespace(namespace="tunesmith-system", instance="release")
        context: Any = SimpleNamespace(installation_keys=KEYS, cluster=Cluster(pods), settings=settings)
        key_use = KeyUseWriter(context.cluster, "tunesmith-system")
        task = asyncio.create_task(GatewayLinks(context, tracker, key_use).run())
        async with asyncio.timeout(120):
            while not tracker.read(["team/pirate"], time.monotonic()).complete:
                assert not task.done()
                await asyncio.sleep(0.01)
        assert tracker.read(["team/pirate"], time.monotonic()).requests == 3
        assert key_use.times == {"alice": 1_800_000_000}
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert asked == []
