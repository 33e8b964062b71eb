"""A gateway process under attack: its memory stays below the container's limit, and others are answered meanwhile."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from tests.gateway.http_fuzzer import check
from tests.gateway.process_rig import DEADLINE, MEMORY_LIMIT, MIB, PIRATE, ProcessRig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
    from pathlib import Path

    Connections = list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]

SIZE = 4 * MIB
PIECE = 64 * 1024


@pytest.fixture(autouse=True)
def _quiet_pods() -> None:
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)


def filled(unit: bytes, *, text: bool = False) -> bytes:
    """A body of almost 4 MiB."""
    start, end = (b'{"model":"pirate","messages":"', b'"}') if text else (b'{"model":"pirate","messages":[0', b"]}")
    return start + unit * ((SIZE - len(start) - len(end)) // len(unit)) + end


def head(key: str, length: int = SIZE) -> bytes:
    lines = ("POST /v1/completions HTTP/1.1", "Host: x", f"Authorization: Bearer {key}", f"Content-Length: {length}")
    return "\r\n".join((*lines, "", "")).encode()


def answer_of(mebibytes: int) -> Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]:
    async def answer(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        await response.write(b'{"id":"x","model":"%s","text":"' % PIRATE.encode())
        for _number in range(mebibytes * MIB // PIECE):
            await response.write(b"x" * PIECE)
        await response.write(b'"}')
        await response.write_eof()
        return response

    return answer


@asynccontextmanager
async def connections(rig: ProcessRig, pieces: Iterable[bytes]) -> AsyncIterator[Connections]:
    """Open connections, send a piece on each, and close them at the end."""
    opened: Connections = []
    try:
        for piece in pieces:
            opened.append(await rig.open(piece))
        yield opened
    finally:
        for _, writer in opened:
            writer.transport.abort()
        await asyncio.gather(*(writer.wait_closed() for _, writer in opened), return_exceptions=True)


async def first_bytes(connections: Connections, count: int) -> set[bytes]:
    """Wait until `count` connections were answered or closed, and return the answers' first bytes."""

    async def first(reader: asyncio.StreamReader) -> bytes:
        try:
            return await reader.read(1)
        except ConnectionError:
            return b""

    reads = {asyncio.create_task(first(reader)) for reader, _ in connections}
    done: set[asyncio.Task[bytes]] = set()
    try:
        async with asyncio.timeout(DEADLINE):
            while len(done) < count:
                done, _ = await asyncio.wait(reads - done, return_when=asyncio.FIRST_COMPLETED)
                done = {read for read in reads if read.done()}
        return {read.result() for read in done}
    finally:
        for read in reads:
            read.cancel()


async def statuses(rig: ProcessRig, body: bytes, count: int) -> Counter[int]:
    """Send `count` requests at once with each key. The pod answers when all others are refused or with it."""
    rig.pod.gate.clear()
    tasks = [asyncio.create_task(rig.chat(body, key=key)) for key in rig.keys for _ in range(count)]
    async with asyncio.timeout(DEADLINE):
        while rig.pod.running + sum(task.done() for task in tasks) < len(tasks):  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.02)
    rig.pod.gate.set()
    return Counter([(await task)[0] for task in tasks])


async def test_mutated_requests(tmp_path: Path) -> None:
    lines: list[str] = []
    await check(tmp_path, 1500, 7, lines.append)


async def test_attacks_on_memory(tmp_path: Path) -> None:
    async with ProcessRig(tmp_path, "--header-seconds=2", "--hold-seconds=60", "--body-seconds=3600") as rig:
        for number in range(2):
            await rig.another_key(f"key-{number}")
        # Bodies whose trees are many times as large as they are, and as many bodies as fit.
        for body, count, expected in (
            (filled(b",[]"), 5, {400}),
            (filled(b",1"), 5, {400}),
            (filled(b"x", text=True), 25, {200, 429, 503}),
        ):
            seen = await statuses(rig, body, count)
            assert set(seen) <= expected, seen
            assert rig.memory("VmHWM") < MEMORY_LIMIT
        # Bodies that are never completed, with and without a valid key; others are answered.
        victim = await rig.another_key("victim")
        part = filled(b"x", text=True)[:-2]
        for keys in (rig.keys[:3], ["sk-ts-00000000-wrong"]):
            async with connections(rig, [head(keys[number % len(keys)]) + part for number in range(100)]) as opened:
                await first_bytes(opened, 100 - int(0.4 * MEMORY_LIMIT) // SIZE if len(keys) > 1 else 100)
                await rig.answering(victim)
                assert rig.memory("VmHWM") < MEMORY_LIMIT
        # An answer of 200 MiB, and clients that do not read theirs.
        before = rig.memory()
        rig.pod.answer = answer_of(200)
        size = 0
        headers = {"Authorization": f"Bearer {rig.key}"}
        async with rig.http.post(f"{rig.url}/v1/completions", json={"model": "pirate"}, headers=headers) as response:
            async for chunk in response.content.iter_any():
                size += len(chunk)
        assert size > 200 * MIB
        assert rig.memory() < before + 30 * MIB
        rig.pod.answer = answer_of(2)
        body = b'{"model":"pirate"}'
        async with connections(rig, [head(rig.key, len(body)) + body] * 200) as opened:
            assert b"H" in await first_bytes(opened, len(opened))
            rig.pod.answer = None
            await rig.answering()
            assert rig.memory("VmHWM") < MEMORY_LIMIT
        # Connections without a header, more than there may be.
        async with connections(rig, [b"", b"POST / HTTP/1.1\r\nHo"] * 1100) as opened:
            await rig.answering()
            assert await first_bytes(opened, len(opened)) == {b""}
        assert rig.memory("VmHWM") < MEMORY_LIMIT
        rig.check_log()


async def test_a_terminated_process_drains_and_exits_with_0(tmp_path: Path) -> None:
    async with ProcessRig(tmp_path, "--drain-seconds=0.5") as rig:
        rig.pod.gate.clear()
        request = asyncio.create_task(rig.chat())
        async with asyncio.timeout(DEADLINE):
            while not rig.pod.running:  # noqa: ASYNC110 - of another process
                await asyncio.sleep(0.02)
        assert await rig.end() == 0
        status, body = await request
        assert status == 502
        assert b"gateway_shut_down" in body
        rig.check_log()
