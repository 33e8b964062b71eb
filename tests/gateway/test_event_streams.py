"""Streams: when they begin, what keeps them open, how they end."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import openai
import pytest
from aiohttp import web

from tests.gateway.gateway_rig import _chunk, adapter_manifest, eventually

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import aiohttp

    from tests.gateway.gateway_rig import Rig

PIRATE = "team/pirate@aaaaaaaaaaaa"
SSE = {"Content-Type": "text/event-stream; charset=utf-8"}
COMMENT = b": keep-alive\n\n"
Start = "Callable[..., Awaitable[Rig]]"


async def pirate(start: Start, **limits: float) -> Rig:
    rig = await start(**({"hold_seconds": 20} | limits))
    rig.watches.put(adapter_manifest("pirate"))
    await rig.add_pod(PIRATE)
    return rig


def stream(rig: Rig, **fields: object) -> aiohttp.client._RequestContextManager:
    body = {"model": "pirate", "messages": [], "stream": True} | fields
    return rig.http.post(f"{rig.url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {rig.key}"})


def scripted(*parts: bytes | asyncio.Event) -> Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]:
    """An engine's stream: bytes are sent, events are waited for."""

    async def answer(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers=SSE)
        await response.prepare(request)
        for part in parts:
            if isinstance(part, asyncio.Event):
                await part.wait()
            else:
                await response.write(part)
        await response.write_eof()
        return response

    return answer


def error_of(text: bytes) -> str:
    last = text.rstrip(b"\n").rpartition(b"\n\n")[2]
    return str(json.loads(last.removeprefix(b"data: "))["error"]["code"])


async def test_the_head_is_sent_when_the_pod_accepts_the_request(start: Start) -> None:
    rig = await pirate(start)
    token = asyncio.Event()
    rig.pods[0].answer = scripted(token, _chunk(PIRATE, "late"))
    async with stream(rig) as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert response.headers["X-Accel-Buffering"] == "no"
        assert response.headers["Cache-Control"] == "no-cache"
        token.set()
        assert b"late" in await response.read()


async def test_comments_keep_a_silent_stream_open_and_never_split_an_event(start: Start) -> None:
    rig = await pirate(start, comment_seconds=0.05)
    event, middle, end = _chunk(PIRATE, "one"), asyncio.Event(), asyncio.Event()
    rig.pods[0].answer = scripted(event, middle, event[:40], end, event[40:], b"data: [DONE]\n\n")
    async with stream(rig) as response:
        assert await response.content.readuntil(b"\n\n") == event
        assert await response.content.readuntil(b"\n\n") == COMMENT
        middle.set()
        assert await response.content.readuntil(b"\n\n") == COMMENT
        assert await response.content.readuntil(b"\n\n") == COMMENT
        end.set()
        rest = await response.read()
        assert rest.replace(COMMENT, b"") == event + b"data: [DONE]\n\n"


@pytest.mark.parametrize("first", [b": keep-alive\n\n", b"\n\n", b": a\n\n: b\n\n\n"])
async def test_comments_of_the_engine_pass_before_the_first_event(start: Start, first: bytes) -> None:
    rig = await pirate(start)
    rig.pods[0].answer = scripted(first, _chunk(PIRATE, "word"), b"data: [DONE]\n\n")
    async with stream(rig) as response:
        assert (response.status, await response.read()) == (200, first + _chunk(PIRATE, "word") + b"data: [DONE]\n\n")


async def test_a_held_stream_gets_a_head_and_comments_and_then_its_answer(start: Start) -> None:
    rig = await start(hold_seconds=20, comment_seconds=0.05)
    rig.watches.put(adapter_manifest("pirate"))
    pod = await rig.add_pod()
    async with openai.AsyncOpenAI(base_url=f"{rig.url}/v1", api_key=rig.key, max_retries=0) as client:
        chunks = await client.chat.completions.create(model="pirate", messages=[], stream=True)  # the head came
        assert pod.seen == []
        await pod.hold(PIRATE)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in chunks]) == "Ahoy there from pod-1"


async def test_after_the_head_an_error_is_an_event(start: Start) -> None:
    rig = await start(hold_seconds=0.3, comment_seconds=0.05)
    rig.watches.put(adapter_manifest("pirate"))
    await rig.add_pod()
    async with stream(rig) as response:
        text = await response.read()
    assert text.startswith(COMMENT)
    assert error_of(text) == "no_pod_ready"


async def test_before_the_head_an_error_has_its_status(start: Start) -> None:
    rig = await start(hold_seconds=0.1)
    rig.watches.put(adapter_manifest("pirate"))
    await rig.add_pod()
    async with stream(rig) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (503, "no_pod_ready")


async def test_an_engines_refusal_after_the_head_is_an_event(start: Start) -> None:
    rig = await pirate(start, comment_seconds=0.05)

    async def refuse(*_: object) -> web.Response:
        await asyncio.sleep(0.2)  # longer than the interval of comments
        return web.json_response({"error": {"message": "too long", "code": "context"}}, status=400)

    rig.pods[0].answer = refuse
    async with stream(rig) as response:
        assert response.status == 200
        assert error_of(await response.read()) == "context"


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_silent_engine_fails_the_request(start: Start, streamed: bool) -> None:  # noqa: FBT001
    rig = await pirate(start, silence_seconds=0.3, answer_seconds=0.3)
    pod = rig.pods[0]
    pod.gate.clear()
    if streamed:
        async with stream(rig) as response:
            assert error_of(await response.read()) == "engine_silent"
    else:
        status, answer, headers = await rig.post({"model": "pirate"})
        assert (status, answer["error"]["code"], headers["x-should-retry"]) == (504, "engine_silent", "false")
    await eventually(lambda: pod.disconnected == 1, "the engine request is closed")


async def test_an_answer_may_take_longer_than_a_stream_may_be_silent(start: Start) -> None:
    rig = await pirate(start, silence_seconds=0.05)

    async def slow(*_: object) -> None:
        await asyncio.sleep(0.3)

    rig.pods[0].answer = slow
    assert (await rig.chat("pirate"))[0] == 200


async def test_a_stream_interrupted_within_an_event_finishes_with_an_error_event(start: Start) -> None:
    rig = await pirate(start)

    seen = asyncio.Event()

    async def breaks(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers=SSE)
        await response.prepare(request)
        await response.write(_chunk(PIRATE, "one") + _chunk(PIRATE, "two")[:30])
        await seen.wait()
        assert request.transport is not None
        request.transport.close()
        return response

    rig.pods[0].answer = breaks
    async with stream(rig) as response:
        assert await response.content.readuntil(b"\n\n") == _chunk(PIRATE, "one")
        seen.set()
        text = await response.read()
    assert text.startswith(b'data: {"error":')
    assert error_of(text) == "engine_failed"


async def test_the_openai_client_does_not_repeat_a_request_whose_engine_crashed(start: Start) -> None:
    rig = await pirate(start)

    async def die(request: web.Request, _: dict[str, Any]) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    rig.pods[0].answer = die
    async with openai.AsyncOpenAI(base_url=f"{rig.url}/v1", api_key=rig.key, max_retries=2) as client:
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(model="pirate", messages=[])
    assert len(rig.pods[0].seen) == 1


async def big(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    await response.write(b'{"id":"x","model":"%s","text":"' % PIRATE.encode())
    for _piece in range(64):
        await response.write(b"x" * 65536)
    await response.write(b'"}')
    await response.write_eof()
    return response


async def test_a_large_answer_passes_in_pieces(start: Start) -> None:
    rig = await pirate(start)
    rig.pods[0].answer = big
    status, answer = await rig.chat("pirate")
    assert (status, len(answer["text"])) == (200, 64 * 65536)
    assert rig.gateway.proxy.budget.used == 0


async def test_a_client_that_does_not_read_is_disconnected_and_its_engine_request_closed(start: Start) -> None:
    rig = await pirate(start, write_seconds=0.3)
    closed = asyncio.Event()

    async def endless(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers=SSE)
        await response.prepare(request)
        try:
            while True:
                await response.write(_chunk(PIRATE, "x" * 60_000))
        finally:
            closed.set()

    rig.pods[0].answer = endless
    async with stream(rig) as response:
        assert response.status == 200
        async with asyncio.timeout(120):
            await closed.wait()
    await eventually(lambda: rig.gateway.proxy.budget.used == 0, "the bytes are returned")


async def test_requests_still_running_at_shutdown_get_an_error(start: Start) -> None:
    rig = await pirate(start, drain_seconds=0.2)
    rig.watches.put(adapter_manifest("later", digests=("b",)))
    pod = rig.pods[0]
    pod.gate.clear()

    async def read(response: aiohttp.ClientResponse) -> bytes:
        return await response.read()

    async with stream(rig) as response:
        assert await response.content.readuntil(b"\n\n") == _chunk(PIRATE, "Ahoy")
        streamed = asyncio.create_task(read(response))
        whole = asyncio.create_task(rig.chat("pirate"))
        held = asyncio.create_task(rig.chat("later"))
        await eventually(lambda: pod.running == 2 and rig.gateway.demand.waiting["team/later"], "all are on their way")
        await rig.gateway.linger()
        await rig.gateway.__aexit__()
        assert error_of(await streamed) == "gateway_shut_down"
        assert (await whole)[1]["error"]["code"] == "gateway_shut_down"
        assert (await held)[1]["error"]["code"] == "gateway_shutting_down"


@pytest.mark.parametrize("path", ["/", "/health"])
async def test_the_health_paths_report_readiness_without_a_key(start: Start, path: str) -> None:
    rig = await start(synced=False)
    async with rig.http.get(rig.url + path) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (503, "gateway_not_ready")
    rig.watches.sync.set()
    await eventually(rig.gateway.feed.synced, "everything is read")
    for method in ("GET", "HEAD"):
        async with rig.http.request(method, rig.url + path) as response:
            assert response.status == 200
    await rig.gateway.linger()
    async with rig.http.get(rig.url + path) as response:
        assert response.status == 503


async def test_cache_salts_separate_home_namespaces_and_cannot_be_chosen(start: Start) -> None:
    rig = await pirate(start)
    same = rig.add_key("same", home="team")
    other = rig.add_key("other", home="elsewhere", namespaces=["team", "elsewhere"])
    await eventually(lambda: rig.gateway.keys.find(other), "the keys are known")
    for key in (rig.key, same, other):
        await rig.chat("team/pirate", key=key, cache_salt="chosen")
    salts = [body["cache_salt"] for body in rig.pods[0].seen]
    assert salts[0] == salts[1] != salts[2]
    assert "chosen" not in salts


async def test_sequences_count_in_demand_and_load(start: Start) -> None:
    rig = await pirate(start)
    rig.pods[0].gate.clear()
    request = asyncio.create_task(rig.chat("pirate", n=5))
    await eventually(lambda: rig.pods[0].running == 1, "it runs")
    assert rig.gateway.demand.snapshot().models["team/pirate"].running == 5
    assert [backend.in_flight for backend in rig.gateway.backends._by_uid.values()] == [5]
    rig.pods[0].gate.set()
    assert (await request)[0] == 200
    assert not rig.gateway.demand.running


@pytest.mark.parametrize(
    ("status", "headers", "body", "seen"),
    [
        (302, {"Location": "http://127.0.0.1:1/"}, b"", 502),
        (204, {}, b"", 502),
        (500, {}, b"Internal Server Error", 500),
        (400, {"Content-Type": "text/html"}, b"<html>", 400),
        (422, {"Content-Type": "application/json"}, b'{"detail":[]}', 422),
        (599, {}, b"x", 599),
        (200, {"Content-Type": "application/json"}, b"[]", 502),
        (200, {"Content-Type": "text/plain"}, b"hello", 502),
        (200, {"X-Huge": "y" * 20_000}, b"", 502),
    ],
)
async def test_unusable_answers_of_engines_become_errors_in_the_schema(
    start: Start, status: int, headers: dict[str, str], body: bytes, seen: int
) -> None:
    rig = await pirate(start)

    async def odd(*_: object) -> web.Response:
        return web.Response(status=status, headers=headers, body=body)

    rig.pods[0].answer = odd
    answered, answer, reply_headers = await rig.post({"model": "pirate"})
    assert answered == seen
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert "Location" not in reply_headers
    assert reply_headers["x-should-retry"] == "false"
    assert len(rig.pods[0].seen) == 1


@pytest.mark.parametrize(
    "raw",
    [
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"",
    ],
)
async def test_an_answer_that_is_not_http_is_a_502(start: Start, raw: bytes) -> None:
    rig = await pirate(start)

    async def odd(request: web.Request, _: dict[str, Any]) -> web.Response:
        assert request.transport is not None
        request.transport.write(raw)
        request.transport.close()
        return web.Response()

    rig.pods[0].answer = odd
    status, answer = await rig.chat("pirate")
    assert (status, answer["error"]["code"]) in {(502, "engine_failed"), (502, "wrong_model")}
