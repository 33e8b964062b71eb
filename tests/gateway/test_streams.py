"""Streams of pods over HTTP: a hostile pod stops neither its own reader nor the readers of others."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import aiohttp
import pytest
from aiohttp import web

from tests.gateway.gateway_rig import eventually
from tunesmith.contracts.agent import PodState, accepts
from tunesmith.contracts.podevents import EventReader, EventWriter
from tunesmith.streams import MAX_LINE_BYTES, Stream, Tokens, _Allowance, follow

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable


class Pod:
    """Serve a stream: the first connections with the test's data, then as an agent."""

    def __init__(self) -> None:
        self.hostile: list[bytes | web.HTTPException] = []
        self.tokens: tuple[str, ...] = ("new",)
        self.connections = 0
        self.url = ""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.connections += 1
        if not accepts(request.headers.get("Authorization", ""), self.tokens):
            raise web.HTTPUnauthorized
        hostile = self.hostile.pop(0) if self.hostile else b""
        if isinstance(hostile, web.HTTPException):
            raise hostile
        response = web.StreamResponse()
        await response.prepare(request)
        if hostile:
            await response.write(hostile)
        else:
            await response.write(EventWriter().line(PodState(epoch=1)))
        await asyncio.Event().wait()
        return response


class Reading:
    """Epochs and causes that a reader reported."""

    def __init__(self) -> None:
        self.epochs: list[int] = []
        self.causes: list[str] = []

    def opened(self) -> Callable[[bytes], None]:
        reader = EventReader()

        def process(line: bytes) -> None:
            reader.read(line)
            self.epochs.append(reader.header.epoch)

        return process


@asynccontextmanager
async def reading(stream: Stream) -> AsyncIterator[Reading]:
    found = Reading()
    async with aiohttp.ClientSession() as session:
        task = asyncio.create_task(follow(session, stream, found.opened, found.causes.append))
        yield found
        assert not task.done(), "the reader stopped"
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def pod() -> AsyncIterator[Pod]:
    made = Pod()
    application = web.Application()
    application.router.add_get("/v1/events", made.answer)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1/events"
    yield made
    await runner.cleanup()


def stream(url: str) -> Stream:
    return Stream("pod team/p", url, Tokens(lambda: (b"new", b"old"), lambda keys: tuple(key.decode() for key in keys)))


HOSTILE: dict[str, tuple[bytes | web.HTTPException, str]] = {
    "no JSON": (b"<html>\n", "a line is not valid"),
    "no object": (b"[]\n", "a line is not valid"),
    "nested deeply": (b"[" * 100_000 + b"\n", "a line is not valid"),
    "no snapshot": (b'{"residencyDigest":"0"}\n', "the stream does not begin with a snapshot"),
    "a line without end": (b"x" * (MAX_LINE_BYTES + 2**17), f"a line has more than {MAX_LINE_BYTES} bytes"),
    "another status": (web.HTTPServiceUnavailable(), "the response has status 503"),
    "a redirect": (web.HTTPFound("http://127.0.0.1:1/"), "the response has status 302"),
}


@pytest.mark.parametrize("case", HOSTILE)
async def test_invalid_data_from_a_pod_closes_only_one_connection(pod: Pod, case: str) -> None:
    pod.hostile = [HOSTILE[case][0]]
    async with reading(stream(pod.url)) as found:
        await eventually(lambda: found.epochs == [1], "the next connection is read")
        assert HOSTILE[case][1] in found.causes


async def test_an_error_while_processing_a_line_does_not_stop_the_reader(pod: Pod) -> None:
    failures: list[Exception] = [RuntimeError("a fault"), KeyError("another"), RecursionError()]
    lines: list[bytes] = []

    def process(line: bytes) -> None:
        if failures:
            raise failures.pop()
        lines.append(line)

    async with aiohttp.ClientSession() as session:
        task = asyncio.create_task(follow(session, stream(pod.url), lambda: process))
        await eventually(lambda: lines, "the stream is read again")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_pod_that_has_only_the_previous_key_is_read(pod: Pod) -> None:
    pod.tokens = ("old",)
    async with reading(stream(pod.url)) as found:
        await eventually(lambda: found.epochs, "the previous token is tried")
        assert pod.connections == 2


async def raw(serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> asyncio.Server:
    return await asyncio.start_server(serve, "127.0.0.1", 0)


async def test_an_answer_that_is_not_http_is_not_repeated(caplog: pytest.LogCaptureFixture) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 \x1b[31mgotcha\r\n\r\n")
        writer.close()

    async with await raw(serve) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/events"
        async with reading(stream(url)) as found:
            await eventually(lambda: found.causes, "the answer is refused")
            assert found.causes[0] in {"the response is not valid HTTP", "the connection was closed"}
    assert "gotcha" not in caplog.text


async def test_an_unreachable_pod_is_reported_with_the_cause() -> None:
    async with reading(stream("http://127.0.0.1:1/v1/events")) as found:
        await eventually(lambda: found.causes, "the connection fails")
        assert found.causes[0] == "connection refused"


async def test_a_flood_is_read_at_a_bounded_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def note(seconds: float) -> None:
        waits.append(seconds)

    clock = [0.0]
    monkeypatch.setattr("tunesmith.streams.asyncio.sleep", note)
    monkeypatch.setattr("tunesmith.streams.time.monotonic", lambda: clock[0])
    allowance = _Allowance()
    for _ in range(128):
        await allowance.spend(64 * 1024)
    assert waits == [], "a snapshot is read at once"
    await allowance.spend(256 * 1024)
    assert waits == [1.0]
    clock[0] += 3600
    await allowance.spend(64 * 1024)
    assert len(waits) == 1
