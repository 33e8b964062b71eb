"""The agent's client of the engine, against a server with the middleware's routes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from aiohttp import web

from tunesmith_server.engine import EngineClient, EngineDownError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Server:
    """An engine whose state a test sets."""

    def __init__(self) -> None:
        self.boot = "one"
        self.version = 7
        self.registered: dict[str, str] = {"a": "/adapters/a"}
        self.leaving: list[str] = []
        self.omits = False
        self.base = "base"
        self.seen: list[str | None] = []
        self.models = 0
        self.traffic: dict[str, Any] = {"changes": 0, "models": {}}
        self.traffic_seen: list[str | None] = []

    async def state(self, request: web.Request) -> web.Response:
        seen = request.query.get("adapters")
        self.seen.append(seen)
        self.traffic_seen.append(request.query.get("traffic"))
        adapters: dict[str, Any] = {"version": self.version, "slots": 3, "memoryBytes": 10, "reloads": 2}
        if not self.omits and seen != str(self.version):
            adapters |= {"registered": self.registered, "leaving": self.leaving}
        state = {"bootId": self.boot, "draining": False, "inFlight": {}, "totals": {}, "traffic": self.traffic}
        return web.json_response({**state, "adapters": adapters})

    async def list_models(self, _request: web.Request) -> web.Response:
        self.models += 1
        return web.json_response({"data": [{"id": self.base, "parent": None, "max_model_len": 512}]})


@pytest.fixture
async def server() -> AsyncIterator[tuple[Server, EngineClient]]:
    found = Server()
    app = web.Application()
    app.router.add_get("/health", _ok)
    app.router.add_get("/tunesmith/state", found.state)
    app.router.add_get("/v1/models", found.list_models)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    async with aiohttp.ClientSession() as session:
        yield found, EngineClient(session, f"http://127.0.0.1:{port}", "token")
    await runner.cleanup()


async def _ok(_request: web.Request) -> web.Response:
    return web.Response()


async def test_adapters_are_sent_again_only_when_they_changed(server: tuple[Server, EngineClient]) -> None:
    engine, client = server
    first = await client.observe()
    assert (first.resident, first.base, first.length) == ({"a": "/adapters/a"}, "base", 512)
    second = await client.observe()
    assert second.resident == first.resident
    engine.version, engine.registered, engine.leaving = 8, {}, ["/adapters/a"]
    third = await client.observe()
    assert (third.resident, third.leaving) == ({}, {"/adapters/a"})
    assert engine.seen == [None, "7", "7"]
    assert engine.models == 1
    assert (third.state.adapters.slots, third.state.adapters.reloads) == (3, 2)


async def test_another_process_is_read_completely(server: tuple[Server, EngineClient]) -> None:
    engine, client = server
    await client.observe()
    engine.boot, engine.version, engine.registered, engine.base = "two", 9, {}, "other"
    found = await client.observe()
    assert (found.resident, found.base) == ({}, "other")


async def test_adapters_that_are_not_listed_are_unknown(server: tuple[Server, EngineClient]) -> None:
    engine, client = server
    engine.omits = True
    with pytest.raises(EngineDownError, match="does not list its adapters"):
        await client.observe()


def counts(requests: int, start: str = "aa") -> dict[str, Any]:
    return {"start": start, "served": {"requests": requests, "errors": 0, "firstToken": {"3": requests}}}


async def test_traffic_is_read_as_changes(server: tuple[Server, EngineClient]) -> None:
    engine, client = server
    engine.registered = {"a": "/adapters/a", "b": "/adapters/b"}
    engine.traffic = {"changes": 5, "models": {"a": counts(1), "b": counts(2), "unknown": counts(9)}}
    first = (await client.observe()).traffic
    assert {name: found.served.requests for name, found in first.items()} == {"a": 1, "b": 2}
    assert first["b"].served.first_token == {3: 2}
    engine.traffic = {"changes": 6, "models": {"b": counts(7)}}
    second = (await client.observe()).traffic
    assert {name: found.served.requests for name, found in second.items()} == {"a": 1, "b": 7}
    engine.boot, engine.version = "two", 1
    engine.traffic = {"changes": 1, "models": {"b": counts(1, "bb")}}
    assert {name: found.start for name, found in (await client.observe()).traffic.items()} == {"b": "bb"}
    assert engine.traffic_seen == [None, "5", "6"]
