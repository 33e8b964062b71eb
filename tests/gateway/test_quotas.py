"""Limits of API keys: requests, tokens, sequences at once, expiry and rotation."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from tests.gateway.gateway_rig import OWN_NAMESPACE, adapter_manifest, eventually
from tunesmith.contracts.apikey import key_record, new_key, parse_key_record, rotated
from tunesmith.gateway.keys import ExpiredKeyError, KeyTable
from tunesmith.gateway.usage import AnswerUsage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.gateway.gateway_rig import Rig

    Start = Callable[..., Awaitable[Rig]]

PIRATE = "team/pirate@aaaaaaaaaaaa"
NOW = datetime(2026, 1, 1, tzinfo=UTC)


async def pirate(start: Start, **settings: float) -> Rig:
    rig = await start(**settings)
    rig.watches.put(adapter_manifest("pirate"))
    await rig.add_pod(PIRATE)
    return rig


async def known(rig: Rig, name: str, **limits: int) -> str:
    key = rig.add_key(name, home="team", **limits)
    await eventually(lambda: rig.gateway.keys.find(key), "the key is known")
    return key


async def test_requests_per_minute(start: Start) -> None:
    rig = await pirate(start)
    key = await known(rig, "limited", requests_per_minute=3)
    body = {"model": "pirate", "messages": []}
    left = []
    for _ in range(3):
        status, _, headers = await rig.post(body, key=key)
        assert status == 200
        assert headers["x-ratelimit-limit-requests"] == "3"
        left.append(headers["x-ratelimit-remaining-requests"])
    assert left == ["2", "1", "0"]
    status, answer, headers = await rig.post(body, key=key)
    assert (status, answer["error"]["code"], answer["error"]["type"]) == (
        429,
        "rate_limit_exceeded",
        "rate_limit_error",
    )
    assert 1 <= int(headers["Retry-After"]) <= 120
    assert headers["x-ratelimit-reset-requests"] == headers["Retry-After"] + "s"
    assert "may send 3 requests per minute" in answer["error"]["message"]
    async with rig.http.get(f"{rig.url}/v1/models", headers={"Authorization": f"Bearer {key}"}) as models:
        assert models.status == 429
    status, _, headers = await rig.post(body)
    assert status == 200
    assert "x-ratelimit-limit-requests" not in headers, "another key has no limit"


async def test_streams_carry_the_headers_of_the_limit(start: Start) -> None:
    rig = await pirate(start)
    key = await known(rig, "limited", requests_per_minute=7)
    body = {"model": "pirate", "messages": [], "stream": True}
    headers = {"Authorization": f"Bearer {key}"}
    async with rig.http.post(f"{rig.url}/v1/chat/completions", json=body, headers=headers) as response:
        assert response.status == 200
        assert response.headers["x-ratelimit-remaining-requests"] == "6"
        await response.read()


async def test_each_gateway_accepts_its_part_of_a_limit(start: Start) -> None:
    rig = await pirate(start, replicas=3)
    key = await known(rig, "limited", requests_per_minute=6)
    body = {"model": "pirate", "messages": []}
    assert [(await rig.post(body, key=key))[0] for _ in range(3)] == [200, 200, 429]


async def test_sequences_at_once(start: Start) -> None:
    rig = await pirate(start)
    key = await known(rig, "limited", max_concurrency=3)
    pod = rig.pods[0]
    pod.gate.clear()
    two = asyncio.create_task(rig.chat("pirate", key=key, n=2))
    await eventually(lambda: pod.running == 1, "the first request runs")
    status, answer = await rig.chat("pirate", key=key, n=2)
    assert (status, answer["error"]["code"]) == (429, "concurrency_limit_exceeded")
    one = asyncio.create_task(rig.chat("pirate", key=key))
    await eventually(lambda: pod.running == 2, "a third sequence runs")
    pod.gate.set()
    assert [(await task)[0] for task in (one, two)] == [200, 200]
    assert (await rig.chat("pirate", key=key, n=3))[0] == 200, "finished ones no longer count"
    status, answer = await rig.chat("pirate", key=key, n=4)
    assert (status, answer["error"]["code"]) == (400, "too_many_sequences")


async def test_tokens_per_minute(start: Start) -> None:
    rig = await pirate(start)
    key = await known(rig, "limited", tokens_per_minute=100)
    body = {"model": "pirate", "messages": [], "max_tokens": 90}
    left = []
    for _ in range(3):
        status, _, headers = await rig.post(body, key=key)
        assert status == 200
        assert headers["x-ratelimit-limit-tokens"] == "100"
        left.append(int(headers["x-ratelimit-remaining-tokens"]))
    assert [left[0] - later for later in left] == [0, 2, 4], "each answer used 2 tokens, of those reserved"
    status, answer, headers = await rig.post(body | {"max_tokens": 96}, key=key)
    assert (status, answer["error"]["code"], answer["error"]["type"]) == (429, "rate_limit_exceeded", "tokens")
    assert "may use 100 tokens per minute" in answer["error"]["message"]
    assert 1 <= int(headers["Retry-After"]) <= 60
    assert (await rig.post(body, key=key))[0] == 200, "a refused request uses nothing"
    status, answer, _ = await rig.post(body | {"max_tokens": 200}, key=key)
    assert (status, answer["error"]["code"]) == (400, "too_many_tokens")


async def test_tokens_of_running_requests_are_reserved(start: Start) -> None:
    rig = await pirate(start)
    key = await known(rig, "limited", tokens_per_day=100)
    pod = rig.pods[0]
    pod.gate.clear()
    first = asyncio.create_task(rig.chat("pirate", key=key, max_completion_tokens=60))
    await eventually(lambda: pod.running == 1, "the first request runs")
    status, answer = await rig.chat("pirate", key=key, max_tokens=60)
    assert (status, answer["error"]["type"]) == (429, "tokens")
    assert "tokens per day" in answer["error"]["message"]
    pod.gate.set()
    assert (await first)[0] == 200
    assert (await rig.chat("pirate", key=key, max_tokens=60))[0] == 200


async def test_a_request_that_fails_uses_no_tokens(start: Start) -> None:
    rig = await pirate(start, hold_seconds=0)
    key = await known(rig, "limited", tokens_per_minute=100)
    rig.pods[0].resident.clear()
    await rig.pods[0].notify()
    await eventually(lambda: not rig.gateway.backends._by_uid[rig.pods[0].uid].resident, "no pod holds the model")
    assert [(await rig.chat("pirate", key=key, max_tokens=60))[0] for _ in range(3)] == [503] * 3
    await rig.pods[0].hold(PIRATE)
    await eventually(lambda: rig.gateway.backends._by_uid[rig.pods[0].uid].resident, "the pod holds the model")
    assert (await rig.chat("pirate", key=key, max_tokens=60))[0] == 200


async def limited_adapter(start: Start, **limits: int) -> Rig:
    rig = await start()
    manifest = adapter_manifest("pirate")
    manifest["spec"]["limits"] = limits
    rig.watches.put(manifest)
    await rig.add_pod(PIRATE)
    return rig


async def test_requests_of_an_adapter_from_all_keys(start: Start) -> None:
    rig = await limited_adapter(start, requestsPerMinute=3)
    keys = [await known(rig, name) for name in ("one", "two", "three", "four")]
    assert [(await rig.chat("pirate", key=key))[0] for key in keys[:3]] == [200] * 3
    status, answer, headers = await rig.post({"model": "pirate", "messages": []}, key=keys[3])
    assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
    assert "The adapter team/pirate may get 3 requests per minute" in answer["error"]["message"]
    assert 1 <= int(headers["Retry-After"]) <= 120
    status, answer = await rig.chat(f"pirate@{PIRATE.partition('@')[2]}", key=keys[0])
    assert status == 429, "a revision's own name is no way around the limit"
    assert (await rig.chat("serving/base", key=keys[3]))[0] == 200, "the base has no limit"


async def test_tokens_of_an_adapter_are_settled(start: Start) -> None:
    rig = await limited_adapter(start, tokensPerMinute=100)
    keys = [await known(rig, name) for name in ("one", "two")]
    assert [(await rig.chat("pirate", key=key, max_tokens=80))[0] for key in keys * 2] == [200] * 4
    status, answer = await rig.chat("pirate", key=keys[0], max_tokens=84)
    assert (status, answer["error"]["type"]) == (429, "tokens")
    assert "The adapter team/pirate may use 100 tokens per minute" in answer["error"]["message"]
    status, answer = await rig.chat("pirate", key=keys[0], max_tokens=200)
    assert (status, answer["error"]["code"]) == (400, "too_many_tokens")


async def test_sequences_of_an_adapter_at_once(start: Start) -> None:
    rig = await limited_adapter(start, maxConcurrency=2)
    one, two = [await known(rig, name) for name in ("one", "two")]
    pod = rig.pods[0]
    pod.gate.clear()
    running = asyncio.create_task(rig.chat("pirate", key=one, n=2))
    await eventually(lambda: pod.running == 1, "the request runs")
    status, answer = await rig.chat("pirate", key=two)
    assert (status, answer["error"]["code"]) == (429, "concurrency_limit_exceeded")
    assert "The adapter team/pirate may have 2 sequences" in answer["error"]["message"]
    pod.gate.set()
    assert (await running)[0] == 200
    assert (await rig.chat("pirate", key=two, n=2))[0] == 200


@pytest.mark.parametrize("asked", [True, False])
async def test_the_tokens_of_a_stream_are_counted(start: Start, *, asked: bool) -> None:
    rig = await pirate(start)
    key = await known(rig, "limited", tokens_per_minute=1000)
    options = {"stream_options": {"include_usage": True}} if asked else {}
    body = {"model": "pirate", "messages": [], "stream": True, **options}
    headers, left = {"Authorization": f"Bearer {key}"}, []
    for _ in range(2):
        async with rig.http.post(f"{rig.url}/v1/chat/completions", json=body, headers=headers) as response:
            left.append(int(response.headers["x-ratelimit-remaining-tokens"]))
            text = await response.read()
        assert text.endswith(b"data: [DONE]\n\n")
        assert (b'"usage"' in text) == asked
        assert rig.pods[0].seen[-1]["stream_options"] == {"include_usage": True}
    assert left[0] - left[1] == 4


@pytest.mark.parametrize(
    ("events", "hide", "kept", "tokens"),
    [
        ([b'data: {"choices":[1]}'], True, 1, 8),
        ([b'data: {"choices":[1]}', b'data: {"choices":[],"usage":{"total_tokens":3}}'], True, 1, 3),
        ([b'data: {"choices":[1]}', b'data: {"choices":[],"usage":{"total_tokens":3}}'], False, 2, 3),
        ([b'data: {"choices":[1],"usage":{"a":1,"total_tokens":5}}'], True, 1, 5),
        ([rb'data: {"choices":[{"text":"\"usage\":{\"total_tokens\":1}"}]}'], True, 1, 8),
    ],
)
def test_usage_in_a_stream(events: list[bytes], kept: int, tokens: int, *, hide: bool) -> None:
    usage = AnswerUsage(7, hide=hide)
    passed = b"".join(usage.pass_events(event + b"\n\n") for event in events)
    assert passed == b"".join(event + b"\n\n" for event in events[:kept])
    assert usage.counts.total == tokens
    at_once = AnswerUsage(7, hide=hide)
    assert at_once.pass_events(b"".join(event + b"\n\n" for event in events)) == passed
    assert at_once.counts.total == tokens


def test_usage_of_a_long_answer() -> None:
    usage = AnswerUsage(7, hide=False)
    for piece in (b"x" * 10_000, b'"choices":[],"usage":{"prompt_tok', b'ens":1,"total_tokens":123456},"x":null}'):
        usage.read_body(piece)
    assert usage.counts.total == 123_456
    without = AnswerUsage(7, hide=False)
    without.read_body(b"x" * 400)
    assert without.counts.total == 107


async def test_a_client_that_leaves_frees_its_sequences(start: Start) -> None:
    rig = await pirate(start)
    key = await known(rig, "limited", max_concurrency=1)
    pod = rig.pods[0]
    pod.gate.clear()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(rig.chat("pirate", key=key), 0.5)
    pod.gate.set()

    async def accepted() -> bool:
        return (await rig.chat("pirate", key=key))[0] == 200

    async with asyncio.timeout(60):
        while not await accepted():  # noqa: ASYNC110 - polls a gateway
            await asyncio.sleep(0.05)


async def test_an_expired_key_is_refused_with_the_reason(start: Start) -> None:
    rig = await pirate(start)
    key = rig.add_key("old", home="team", expires=datetime.now(UTC) - timedelta(seconds=1))
    async with asyncio.timeout(60):
        status, answer = await rig.chat("pirate", key=key)
        while answer["error"]["code"] == "invalid_api_key":
            status, answer = await rig.chat("pirate", key=key)
    assert (status, answer["error"]["code"]) == (401, "expired_api_key")
    assert "tunesmith keys rotate" in answer["error"]["message"]


def test_a_rotated_key_is_valid_beside_the_new_one_until_the_overlap_ends() -> None:
    now = NOW.timestamp()
    table = KeyTable(lambda: now)
    first, second, third = new_key(), new_key(), new_key()
    expires = NOW + timedelta(days=9)
    record = key_record("alice", OWN_NAMESPACE, first, home="team", namespaces=["team"], models=["*"], expires=expires)
    record |= {"data": rotated(record, second, NOW + timedelta(hours=1))}
    table.put("api-key-alice", parse_key_record(record))
    assert table.find(first)
    assert table.find(second)
    now += 3600
    assert table.find(second)
    with pytest.raises(ExpiredKeyError):
        table.find(first)
    record |= {"data": rotated(record, third, NOW + timedelta(hours=2))}
    table.put("api-key-alice", parse_key_record(record))
    assert table.find(first) is None
    assert table.find(second)
    now = expires.timestamp()
    with pytest.raises(ExpiredKeyError):
        table.find(third)
    table.remove("api-key-alice")
    assert table.find(third) is None
    assert not table._by_prefix


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("requestsPerMinute", "0", "`requestsPerMinute` must be a number from 1 to 999999999"),
        ("maxConcurrency", "many", "`maxConcurrency` must be a number"),
        ("maxConcurrency", "1" * 5000, "`maxConcurrency` must be a number"),
        ("expires", "tomorrow", "`expires` must be a time with a time zone, such as 2027-01-31T00:00:00Z"),
        ("expires", "2027-01-31T00:00:00", "`expires` must be a time with a time zone"),
        ("previousHash", "abc", "`previousHash` must be the SHA-256"),
    ],
)
def test_a_malformed_limit_makes_the_key_invalid(field: str, value: str, problem: str) -> None:
    record = key_record("a", OWN_NAMESPACE, new_key(), home="team", namespaces=["team"], models=["*"])
    record["data"][field] = value
    with pytest.raises(ValueError, match=problem):
        parse_key_record(record)
