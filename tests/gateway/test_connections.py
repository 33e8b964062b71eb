"""Connections and requests that are not HTTP: answered in the schema, bounded in time and number, never logged."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import logging
import re
import zlib
from typing import TYPE_CHECKING

import pytest

from tests.gateway.gateway_rig import adapter_manifest, eventually
from tunesmith.gateway.budget import Budget
from tunesmith.gateway.connections import client_network
from tunesmith.gateway.errors import ApiError
from tunesmith.gateway.limits import Limits

if TYPE_CHECKING:
    from tests.gateway.gateway_rig import Rig

PIRATE = "team/pirate@aaaaaaaaaaaa"
BODY = b'{"model":"pirate"}'
Start = "Callable[..., Awaitable[Rig]]"


async def pirate(start: Start, **limits: float) -> Rig:
    rig = await start(**limits)
    rig.watches.put(adapter_manifest("pirate"))
    await rig.add_pod(PIRATE)
    return rig


async def send(rig: Rig, data: bytes) -> bytes:
    """Send bytes and return what comes back until the gateway closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.gateway.port)
    try:
        writer.write(data)
        async with asyncio.timeout(60):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


def post(rig: Rig, *lines: bytes, body: bytes = BODY, length: int | None = None, close: bool = True) -> bytes:
    head = [
        b"POST /v1/completions HTTP/1.1",
        b"Host: x",
        b"Authorization: Bearer " + rig.key.encode(),
        b"Content-Length: %d" % (len(body) if length is None else length),
        *([b"Connection: close"] if close else []),
        *lines,
    ]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def status_of(answer: bytes) -> tuple[int, str | None]:
    head, _, body = answer.partition(b"\r\n\r\n")
    error = json.loads(body).get("error") if body.startswith(b"{") else None
    if error is not None:
        assert set(error) == {"message", "type", "param", "code"}
    return int(head.split()[1]), error and error["code"]


MALFORMED = [
    b"POST /v1/completions HTTP/1.1\nHost: x\nAuthorization: Bearer KEY\n\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer KEY\nX: y\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization Bearer KEY\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nAuthorization: Bearer KEY\r\n folded\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nAuthorization: Bearer KEY\0\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nAuthorization: Bearer KEY\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nAuthorization: Bearer KEY\r\nContent-Length: KEY\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nAuthorization: Bearer KEY\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
    b"POST / HTTP/1.1\r\nX: KEY\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nAuthorization: Bearer KEY\r\nTransfer-Encoding: KEY\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nAuthorization : Bearer KEY\r\n\r\n",
    b"POST  /v1/completions  HTTP/1.1\r\nAuthorization: Bearer KEY\r\n\r\n",
    b"POST /v1/completions?KEY HTTP/9.9\r\nAuthorization: Bearer KEY\r\n\r\n",
    b"POST /KEY KEY HTTP/1.1\r\n\r\n",
    b"KEY\r\n\r\n",
    b"KEY / HTTP/1.1\r\nAuthorization: Bearer KEY\r\n\r\n",
    b"Authorization: Bearer KEY\r\nPOST / HTTP/1.1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\n: KEY\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nKEY",
    b"\x16\x03\x01\x02\x00\x01\x00KEY\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nAuthorization: Bearer KEY\r\nX: " + b"KEY" * 3000 + b"\r\n\r\n",
    b"POST /" + b"KEY" * 3000 + b" HTTP/1.1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nAuthorization: Bearer KEY\r\n" + b"X: KEY\r\n" * 400 + b"\r\n",
]


@pytest.mark.parametrize("data", MALFORMED)
async def test_a_malformed_request_is_a_400_and_its_key_is_not_logged(
    rig: Rig, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    answer = await send(rig, data.replace(b"KEY", rig.key.encode()))
    status, code = status_of(answer)
    assert status in {400, 401, 404, 405, 431}
    assert code is not None
    text = caplog.text + "".join(record.getMessage() + str(record.exc_info) for record in caplog.records)
    assert rig.key not in text
    assert rig.key.split("-", 3)[3] not in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    "body",
    [
        b"5;x=" + b"y" * 20_000 + b"\r\nhello\r\n0\r\n\r\n",
        b"zz\r\n",
        b"-1\r\n\r\n",
        b"ffffffffffffffffff\r\n",
        b"1\r\nab\r\n0\r\n\r\n",
        b"0\r\nX: " + b"y" * 20_000 + b"\r\n\r\n",
    ],
)
async def test_broken_chunks_are_refused(start: Start, body: bytes, caplog: pytest.LogCaptureFixture) -> None:
    rig = await pirate(start, body_seconds=0.5)
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nConnection: close\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n" % rig.key.encode()
    )
    answer = await send(rig, head + body)
    assert status_of(answer)[0] in {400, 431}
    assert rig.key not in caplog.text


async def test_nothing_that_a_client_sends_is_logged(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    rig = await pirate(start, hold_seconds=0.1)
    rig.watches.put(adapter_manifest("later", digests=("b",)))
    for request_id in (rig.key, "a\tb", "x" * 65, "${jndi}", "\x7f"):
        for model in ("later", rig.key, "a\nb", "\0"):
            body = json.dumps({"model": model}).encode()
            await send(rig, post(rig, b"X-Request-Id: " + request_id.encode(), body=body))
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("tunesmith")]
    assert any("no pod" in message.lower() for message in messages)
    for message in messages:
        assert message.isprintable()
        assert rig.key not in message
        assert "jndi" not in message


async def test_compressed_bodies_are_read_and_bounded(start: Start) -> None:
    rig = await pirate(start)
    assert status_of(await send(rig, post(rig, b"Content-Encoding: gzip", body=gzip.compress(BODY))))[0] == 200
    bomb = gzip.compress(b" " * 50_000_000 + BODY)
    assert status_of(await send(rig, post(rig, b"Content-Encoding: gzip", body=bomb))) == (413, "request_too_large")
    assert status_of(await send(rig, post(rig, b"Content-Encoding: gzip"))) == (400, "invalid_body")
    assert status_of(await send(rig, post(rig, b"Content-Encoding: deflate"))) == (400, "invalid_body")
    cut = zlib.compress(BODY)[:-8]
    assert status_of(await send(rig, post(rig, b"Content-Encoding: deflate", body=cut))) == (400, "invalid_body")
    for encoding in (b"br", b"zstd", b"compress", b"gzip, gzip", b"nonsense"):
        answer = await send(rig, post(rig, b"Content-Encoding: " + encoding))
        assert status_of(answer) == (415, "unsupported_encoding")
    assert rig.gateway.proxy.budget.used == 0


async def test_a_long_list_of_models_passes_in_pieces(start: Start) -> None:
    rig = await pirate(start)
    for number in range(1000):
        rig.watches.put(adapter_manifest(f"model-{number:04}"))
    await eventually(lambda: rig.gateway.catalog.exists("team/model-0999"), "all are known")
    async with rig.http.get(f"{rig.url}/v1/models", headers={"Authorization": f"Bearer {rig.key}"}) as response:
        assert len((await response.json())["data"]) == 1002
    assert rig.gateway.proxy.budget.used == 0


async def test_expectations(start: Start) -> None:
    rig = await pirate(start)
    answer = await send(rig, post(rig, b"Expect: 100-continue"))
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")
    assert status_of(await send(rig, post(rig, b"Expect: nothing"))) == (417, "unknown_expectation")


async def test_old_clients_and_other_methods(start: Start) -> None:
    rig = await pirate(start)
    old = post(rig, close=False).replace(b"HTTP/1.1", b"HTTP/1.0")
    assert status_of(await send(rig, old))[0] == 200
    key = b"Authorization: Bearer %s\r\nConnection: close\r\n\r\n" % rig.key.encode()
    head = await send(rig, b"HEAD /v1/models HTTP/1.1\r\nHost: x\r\n" + key)
    assert (head.split()[1], head.partition(b"\r\n\r\n")[2]) == (b"200", b"")
    for method in (b"OPTIONS", b"PUT", b"DELETE", b"PATCH", b"TRACE"):
        answer = await send(rig, method + b" /v1/chat/completions HTTP/1.1\r\nHost: x\r\n" + key)
        assert status_of(answer) == (405, "method_not_allowed")


async def test_an_upgrade_is_ignored(start: Start) -> None:
    rig = await pirate(start)
    for line in (b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings", b"Upgrade: websocket\r\nConnection: Upgrade"):
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.gateway.port)
        writer.write(post(rig, line, close=False))
        async with asyncio.timeout(60):
            assert (await reader.readline()).startswith(b"HTTP/1.1 ")
        writer.close()


async def test_pipelined_requests_are_answered_in_order(start: Start) -> None:
    rig = await pirate(start)
    bodies = [b'{"model":"pirate"}', b'{"model":"nobody"}', b'{"model":"base"}']
    answer = await send(rig, b"".join(post(rig, body=body, close=body is bodies[-1]) for body in bodies))
    assert re.findall(rb"HTTP/1\.1 (\d+) ", answer) == [b"200", b"404", b"200"]


async def test_a_client_that_sends_too_much_before_its_answer_is_disconnected(start: Start) -> None:
    rig = await pirate(start)
    pod = rig.pods[0]
    pod.gate.clear()
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.gateway.port)
    writer.write(post(rig, close=False))
    await eventually(lambda: pod.running == 1, "the first request runs")
    ahead = post(rig, body=b" " * 100_000 + BODY, close=False)
    writer.write(ahead * 3)
    connection = next(iter(rig.gateway._server._open))
    await eventually(lambda: connection._close, "the connection closes after its answer")
    pod.gate.set()
    async with asyncio.timeout(60):
        try:
            answer = await reader.read()
        except ConnectionError:
            answer = b"HTTP/1.1 200"
    assert answer.count(b"HTTP/1.1 200") == 1
    assert len(pod.seen) == 1
    writer.close()


@pytest.mark.parametrize("data", [b"", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthori"])
async def test_connections_without_a_header_are_closed(start: Start, data: bytes) -> None:
    rig = await start(header_seconds=0.2)
    assert await send(rig, data) == b""
    assert not rig.gateway._server._open


async def test_idle_connections_are_closed(start: Start) -> None:
    rig = await pirate(start, idle_seconds=0.2, header_seconds=20)
    answer = await send(rig, post(rig, close=False))
    assert status_of(answer)[0] == 200


async def test_a_slow_body_is_a_408(start: Start) -> None:
    rig = await pirate(start, body_seconds=0.2)
    answer = await send(rig, post(rig, length=len(BODY) + 1, close=False))
    assert status_of(answer) == (408, "request_timeout")
    assert rig.gateway.proxy.budget.used == 0


async def test_a_new_connection_replaces_an_idle_one_and_is_refused_if_all_are_busy(start: Start) -> None:
    rig = await pirate(start, max_connections=3, max_connections_per_address=3)
    pod = rig.pods[0]
    idle = [await asyncio.open_connection("127.0.0.1", rig.gateway.port) for _ in range(20)]
    assert status_of(await send(rig, post(rig)))[0] == 200
    assert len(rig.gateway._server._open) <= 3
    pod.gate.clear()
    busy = [asyncio.create_task(send(rig, post(rig))) for _ in range(3)]
    await eventually(lambda: pod.running == 3, "three requests run")
    assert (await send(rig, b"")).startswith(b"HTTP/1.1 503 ")
    pod.gate.set()
    assert {status_of(answer)[0] for answer in await asyncio.gather(*busy)} == {200}
    for _, writer in idle:
        writer.close()


def test_greedy_keys_leave_room_for_another_one() -> None:
    limits = Limits(max_in_flight_bytes=1_000_000, max_in_flight_bytes_per_key=500_000)
    budget = Budget(limits)
    greedy = ["one", "two", "three"]
    for key in greedy * 1_000:
        with contextlib.suppress(ApiError):
            budget.reserve(key, 1_000)
    assert budget.used <= 750_000
    budget.reserve("victim", 100_000)


async def test_bytes_in_flight_are_limited_per_key_and_in_total(start: Start) -> None:
    rig = await pirate(start, max_in_flight_bytes=700_000, max_in_flight_bytes_per_key=300_000)
    other, third = rig.add_key("other", home="team"), rig.add_key("third", home="team")
    await eventually(lambda: rig.gateway.keys.find(third), "the keys are known")
    pod = rig.pods[0]
    pod.gate.clear()
    body = {"model": "pirate", "messages": "x" * 200_000}
    first = asyncio.create_task(rig.post(body))
    await eventually(lambda: pod.running == 1, "the first runs")
    status, answer, headers = await rig.post(body)
    assert (status, answer["error"]["code"], headers["Retry-After"]) == (429, "too_many_bytes_in_flight", "2")
    second = asyncio.create_task(rig.post(body, key=other))
    await eventually(lambda: pod.running == 2, "another key's request runs")
    status, answer, headers = await rig.post(body, key=third)
    assert (status, answer["error"]["code"], headers["Retry-After"]) == (503, "gateway_overloaded", "2")
    pod.gate.set()
    assert [(await task)[0] for task in (first, second)] == [200, 200]
    assert rig.gateway.proxy.budget.used == 0


@pytest.mark.parametrize(
    ("peer", "site"),
    [
        (("10.1.2.3", 1), "10.1.2.3"),
        (("::ffff:10.1.2.3", 1, 0, 0), "10.1.2.3"),
        (("2001:db8:1:2:3::4", 1, 0, 0), "2001:db8:1:2::/64"),
        (("2001:db8:1:2:9::9", 1, 0, 0), "2001:db8:1:2::/64"),
        (("fe80::1%eth0", 1, 0, 2), "fe80::/64"),
        (None, ""),
    ],
)
def test_the_network_by_which_a_clients_connections_are_counted(peer: object, site: str) -> None:
    assert client_network(peer) == site
