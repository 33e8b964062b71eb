"""Starts gateways."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
import uvloop

from tests.gateway.gateway_rig import OWN_NAMESPACE, Rig, Watches, adapter_manifest, eventually, free_ports
from tunesmith.gateway.limits import MIB
from tunesmith.gateway.server import Gateway
from tunesmith.gateway.settings import GatewaySettings

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator, Awaitable, Callable


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop that the gateway's process runs on."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., Awaitable[Rig]]]:
    """Starts a gateway with the given limits."""
    async with AsyncExitStack() as stack:
        rigs: list[Rig] = []

        async def run(*, synced: bool = True, drain_seconds: float = 5.0, **limits: Any) -> Rig:
            engine_port, agent_port = free_ports(2)
            watches = Watches()
            if not synced:
                watches.sync.clear()
            settings = GatewaySettings(
                namespace=OWN_NAMESPACE,
                shared_pool_namespaces=("serving", "elsewhere"),
                host="127.0.0.1",
                port=0,
                internal_port=0,
                linger_seconds=0.0,
                drain_seconds=drain_seconds,
                engine_port=engine_port,
                agent_port=agent_port,
                **limits,
            ).for_memory(512 * MIB)
            gateway = await stack.enter_async_context(Gateway(settings, lambda: watches.gateway_keys, watches))
            http = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
            rig = Rig(gateway, watches, http, (engine_port, agent_port))
            rigs.append(rig)
            if synced:
                await eventually(gateway.feed.synced, "the gateway has read everything")
                await eventually(lambda: gateway.keys.find(rig.key), "the key is known")
            return rig

        yield run
        for rig in rigs:
            for pod in rig.pods:
                await pod.stop()


@pytest.fixture
async def rig(start: Callable[..., Awaitable[Rig]]) -> Rig:
    """A gateway that holds requests for at most half a second."""
    return await start(hold_seconds=0.5)


@pytest.fixture
async def patient(start: Callable[..., Awaitable[Rig]]) -> Rig:
    """A gateway that holds requests for long, with the adapter `pirate`."""
    rig = await start(hold_seconds=20)
    rig.watches.put(adapter_manifest("pirate"))
    return rig
