"""Memory while everything is listed: one page of complete objects at a time."""

from __future__ import annotations

import tracemalloc
from typing import TYPE_CHECKING

import pytest
from aiohttp import web
from kubernetes.aio.client import Configuration

from tunesmith.cluster.client import Cluster
from tunesmith.cluster.keep import PAGE_SIZE, kept

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

COUNT = 8 * PAGE_SIZE
NOTE = 250 * 1024


async def page(request: web.Request) -> web.Response:
    start = int(request.query.get("continue") or 0)
    end = start + int(request.query["limit"])
    items = [
        {
            "metadata": {
                "name": f"adapter-{number}",
                "namespace": "team",
                "uid": f"uid-{number}",
                "resourceVersion": str(number + 1),
                "annotations": {"note": "x" * NOTE},
            },
            "spec": {"adapterFrom": {"fineTuneJob": {"name": "job"}}},
        }
        for number in range(start, min(end, COUNT))
    ]
    metadata = {"resourceVersion": "9", "continue": str(end) if end < COUNT else ""}
    return web.json_response({"metadata": metadata, "items": items})


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    application = web.Application()
    application.router.add_get("/{path:.*}", page)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    configuration = Configuration()
    configuration.host = f"http://127.0.0.1:{runner.addresses[0][1]}"
    configuration.retries = None
    async with Cluster(configuration) as connected:
        yield connected
    await runner.cleanup()


async def test_only_one_page_is_in_memory_completely(cluster: Cluster) -> None:
    await cluster.list_at("AdapterDeployment", page_size=1, keep=kept)
    tracemalloc.start()
    try:
        items, _ = await cluster.list_at("AdapterDeployment", page_size=PAGE_SIZE, keep=kept)
        left, highest = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(items) == COUNT
    assert left < 2 * PAGE_SIZE * NOTE, "at most the last answer"
    # A page as its server here made it, its bytes on both sides of the connection, and its objects.
    assert highest < 7 * PAGE_SIZE * NOTE < COUNT * NOTE
