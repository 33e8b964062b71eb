"""Limits of the agent's connections: no client can block the operator by holding them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from tunesmith_server.connections import Connections, serving

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


@asynccontextmanager
async def agent(connections: Connections) -> AsyncIterator[int]:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(text="ok")

    application = web.Application()
    application.router.add_get("/", answer)
    async with serving(application, 0, connections, "127.0.0.1") as port:
        yield port


Connect = Callable[..., Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    writers: list[asyncio.StreamWriter] = []

    async def dial(port: int, source: str = "127.0.0.1") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
        writers.append(writer)
        return reader, writer

    yield dial
    for writer in writers:
        writer.close()
    await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)


async def closed(reader: asyncio.StreamReader) -> bool:
    async with asyncio.timeout(120):
        try:
            return await reader.read() == b""
        except ConnectionResetError:
            return True


async def answered(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    writer.write(REQUEST)
    async with asyncio.timeout(120):
        return b"200 OK" in await reader.readuntil(b"\r\n\r\n")


async def test_one_address_cannot_hold_all_connections(connect: Connect) -> None:
    async with agent(Connections(max_connections=8, max_per_address=3)) as port:
        held = [await connect(port, "127.0.3.1") for _ in range(3)]
        assert all([await answered(*connection) for connection in held])
        assert await closed((await connect(port, "127.0.3.1"))[0])
        assert await answered(*await connect(port, "127.0.3.2")), "another address is served"
        held[0][1].close()
        await held[0][1].wait_closed()
        async with asyncio.timeout(120):
            while True:
                reader, writer = await connect(port, "127.0.3.1")
                writer.write(REQUEST)
                if await reader.read(8):
                    break


async def test_all_addresses_together_are_bounded(connect: Connect) -> None:
    async with agent(Connections(max_connections=4, max_per_address=3)) as port:
        held = [await connect(port, f"127.0.3.{number}") for number in range(1, 5)]
        assert all([await answered(*connection) for connection in held])
        assert await closed((await connect(port, "127.0.3.9"))[0])


async def test_a_connection_without_a_request_is_closed_and_one_with_a_request_is_kept(connect: Connect) -> None:
    async with agent(Connections(first_request_seconds=0.2)) as port:
        used, idle, half = await connect(port), await connect(port), await connect(port)
        assert await answered(*used)
        half[1].write(REQUEST[:10])
        assert await closed(idle[0])
        assert await closed(half[0])
        assert await answered(*used)
