"""A shadow gets copies of requests, and nobody notices."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

from tests.gateway.gateway_rig import GATEWAY_KEYS, adapter_manifest, eventually
from tunesmith.contracts.agent import GatewayDemand, PodUse, demand_tokens
from tunesmith.contracts.traffic import MAX_COMPARISONS, Comparison
from tunesmith.gateway.comparison import AnswerFacts, AnswerReader, Comparisons, documents
from tunesmith.gateway.shadow import MAX_ANSWER_BYTES, MAX_MIRRORED_PER_POD

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.gateway.gateway_rig import Rig

NEW, OLD = "team/pirate@bbbbbbbbbbbb", "team/pirate@aaaaaaaaaaaa"


@pytest.fixture
async def shadowed(rig: Rig) -> Rig:
    """A gateway with a shadow that gets every request; one pod holds it, another one the revision that answers."""
    return await prepared(rig, 100)


async def prepared(rig: Rig, percent: int) -> Rig:
    await rig.add_pod(OLD)
    await rig.add_pod(NEW)
    rig.watches.put(adapter_manifest("pirate", digests=("b", "a"), weights=(0, 100), shadow=percent))
    await eventually(lambda: rig.gateway.catalog.exists(NEW), "the adapter is known")
    return rig


def comparison(rig: Rig) -> Comparison:
    return rig.gateway.demand.comparisons.since(0)[1].get(NEW) or Comparison(start="")


async def compared(rig: Rig, **expected: float) -> Comparison:
    await eventually(
        lambda: all(getattr(comparison(rig), name) == value for name, value in expected.items()), f"{expected}"
    )
    return comparison(rig)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_is_mirrored_and_the_answers_are_compared(shadowed: Rig, stream: bool) -> None:  # noqa: FBT001
    rig = shadowed
    key = rig.add_key("limited", home="team", tokens_per_minute=1000)
    await eventually(lambda: rig.gateway.keys.find(key), "the key is known")
    body = {"model": "pirate", "messages": [{"role": "user", "content": "Hello"}], "stream": stream, "seed": 7}
    headers = {"Authorization": f"Bearer {key}"}
    async with rig.http.post(f"{rig.url}/v1/chat/completions", json=body, headers=headers) as response:
        text = await response.text()
    assert OLD in text
    assert NEW not in text
    assert "usage" not in text or not stream
    found = await compared(rig, answers=1)
    tokens = 3 if stream else 1
    assert (found.served_tokens, found.shadow_tokens, found.failures, found.dropped) == (tokens, tokens, 0, 0)
    assert (found.served_refusals, found.shadow_refusals, found.logprob_answers) == (0, 0, 0)
    (mirrored,) = rig.pods[1].mirrored
    (served,) = rig.pods[0].seen
    assert mirrored == {**served, "model": NEW}
    assert not rig.pods[1].seen
    assert not rig.pods[0].mirrored
    assert not rig.gateway.demand.running
    async with rig.http.post(f"{rig.url}/v1/chat/completions", json=body, headers=headers) as response:
        remaining = int(response.headers["x-ratelimit-remaining-tokens"])
        await response.read()
    assert remaining > 1000 - 4 * 30  # the mirrored one was not counted: the estimate of two prompts is less


async def test_the_share_of_the_shadow_is_kept(rig: Rig) -> None:
    await prepared(rig, 25)
    for _ in range(80):
        assert (await rig.chat("pirate"))[0] == 200
    await eventually(lambda: len(rig.pods[1].mirrored) >= 20, "they are mirrored")
    assert len(rig.pods[1].mirrored) == pytest.approx(20, abs=2)


async def test_explicit_revisions_errors_and_clients_that_leave_are_not_mirrored(shadowed: Rig) -> None:
    rig = shadowed
    assert (await rig.chat(OLD))[0] == 200

    async def refuse(_: web.Request, __: dict[str, Any]) -> web.Response:
        return web.json_response({"error": {"message": "too long"}}, status=400)

    rig.pods[0].answer = refuse
    assert (await rig.chat("pirate"))[0] == 400
    rig.pods[0].answer = None
    rig.pods[0].gate.clear()
    async with asyncio.timeout(60):
        task = asyncio.create_task(rig.chat("pirate"))
        await eventually(lambda: rig.pods[0].running, "it runs")
        task.cancel()
        await eventually(lambda: rig.pods[0].disconnected, "the client has left")
    rig.pods[0].gate.set()
    assert (await rig.chat("pirate"))[0] == 200
    await compared(rig, answers=1)
    assert len(rig.pods[1].mirrored) == 1


async def test_a_slow_shadow_delays_nothing(shadowed: Rig) -> None:
    rig = shadowed
    rig.pods[1].gate.clear()
    for number in range(MAX_MIRRORED_PER_POD + 3):
        assert (await rig.chat("pirate"))[0] == 200, number
    await compared(rig, dropped=3)
    rig.pods[1].gate.set()
    await compared(rig, answers=MAX_MIRRORED_PER_POD)
    assert (await rig.chat("pirate", n=MAX_MIRRORED_PER_POD + 1))[0] == 200
    await compared(rig, dropped=4, answers=MAX_MIRRORED_PER_POD)
    assert rig.gateway.proxy._mirrors._bytes == rig.gateway.proxy._mirrors._reserved == 0


async def test_mirrored_requests_are_cancelled_when_others_need_the_pod(shadowed: Rig) -> None:
    rig = shadowed
    rig.pods[1].gate.clear()
    for _ in range(3):
        assert (await rig.chat("pirate"))[0] == 200
    await eventually(lambda: rig.pods[1].running == 3, "they run")
    rig.pods[1].use = PodUse(waiting=1)
    await rig.pods[1].notify()
    await compared(rig, dropped=3)
    await eventually(lambda: rig.pods[1].disconnected == 3, "the engine was told")
    assert (await rig.chat("pirate"))[0] == 200
    await compared(rig, dropped=4)


async def test_nothing_is_mirrored_while_the_budget_is_half_used(shadowed: Rig) -> None:
    rig = shadowed
    with rig.gateway.proxy.budget.share("a") as first, rig.gateway.proxy.budget.share("b") as second:
        for share in (first, second):
            share.reserve(rig.gateway.proxy._limits.max_in_flight_bytes // 3)
        assert (await rig.chat("pirate"))[0] == 200
    await compared(rig, dropped=1)
    assert not rig.pods[1].mirrored


async def test_a_long_answer_is_not_compared(shadowed: Rig) -> None:
    rig = shadowed

    async def long(_: web.Request, body: dict[str, Any]) -> web.Response:
        text = "x" * MAX_ANSWER_BYTES
        message = {"index": 0, "message": {"role": "assistant", "content": text}}
        return web.json_response({"model": body["model"], "choices": [message], "usage": {"completion_tokens": 1}})

    rig.pods[0].answer = long
    assert (await rig.chat("pirate"))[0] == 200
    await compared(rig, dropped=1)
    assert not rig.pods[1].mirrored
    rig.pods[0].answer, rig.pods[1].answer = None, long
    assert (await rig.chat("pirate"))[0] == 200
    await compared(rig, dropped=2)


@pytest.mark.parametrize(
    ("problem", "expected"),
    [("draining", "dropped"), ("not resident", "dropped"), ("error", "failures"), ("dead", "dropped")],
)
async def test_a_shadow_that_fails_is_counted_and_harms_nobody(shadowed: Rig, problem: str, expected: str) -> None:
    rig, pod = shadowed, shadowed.pods[1]
    if problem == "draining":
        pod.draining = True
    elif problem == "dead":
        await pod.stop("engine")
    elif problem == "not resident":
        pod.announced, pod.resident = {NEW}, set()
    else:

        async def fail(_: web.Request, __: dict[str, Any]) -> web.Response:
            return web.json_response({"error": {"message": "broken"}}, status=500)

        pod.answer = fail
    for _ in range(3):
        status, answer = await rig.chat("pirate")
        assert (status, answer["model"]) == (200, OLD)
    await compared(rig, **{expected: 3})


async def test_requests_that_crashed_an_engine_are_not_mirrored(shadowed: Rig) -> None:
    rig = shadowed
    assert (await rig.chat("pirate"))[0] == 200
    await compared(rig, answers=1)
    await rig.pods[1].report_crash(*rig.pods[1].digests, model=NEW)
    await eventually(lambda: rig.gateway.crashes.has_suspects(rig.pool["metadata"]["uid"]), "the crash is known")
    assert (await rig.chat("pirate"))[0] == 200
    await compared(rig, dropped=1)


async def test_refusals_and_log_probabilities_are_compared(shadowed: Rig) -> None:
    rig = shadowed

    def answering(text: str, logprobs: list[float]) -> Callable[[web.Request, dict[str, Any]], Awaitable[web.Response]]:
        async def answer(_: web.Request, body: dict[str, Any]) -> web.Response:
            choice = {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "logprobs": {"content": [{"token": "t", "logprob": value} for value in logprobs]},
                "finish_reason": "stop",
            }
            usage = {"prompt_tokens": 1, "completion_tokens": len(logprobs), "total_tokens": 9}
            return web.json_response({"model": body["model"], "choices": [choice], "usage": usage})

        return answer

    rig.pods[0].answer = answering("a word", [-1.0, -2.0])
    rig.pods[1].answer = answering(" ", [-0.5])
    assert (await rig.chat("pirate", logprobs=True))[0] == 200
    found = await compared(rig, answers=1)
    assert (found.served_refusals, found.shadow_refusals, found.logprob_answers) == (0, 1, 1)
    assert (found.served_logprob, found.shadow_logprob) == (-1.5, -0.5)
    assert (found.served_tokens, found.shadow_tokens) == (2, 1)


async def test_the_operator_and_prometheus_get_the_comparison(shadowed: Rig) -> None:
    rig = shadowed
    assert (await rig.chat("pirate"))[0] == 200
    await compared(rig, answers=1)
    (token, *_) = demand_tokens(GATEWAY_KEYS)
    headers = {"Authorization": f"Bearer {token}"}
    async with rig.http.get(f"{rig.internal_url}/v1/demand", headers=headers) as response:
        first = GatewayDemand.model_validate_json(await response.content.readline())
        assert first.comparisons[NEW] == comparison(rig)
        assert not GatewayDemand.model_validate_json(await response.content.readline()).comparisons
    text = b"".join(rig.gateway.metrics.exposition()).decode()
    seen = {
        (sample.name, sample.labels.get("answer", sample.labels.get("result", ""))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("revision") == "bbbbbbbbbbbb"
    }
    assert seen["tunesmith_gateway_shadow_requests_total", "compared"] == 1
    assert seen["tunesmith_gateway_shadow_tokens_total", "served"] == 1
    assert seen["tunesmith_gateway_shadow_tokens_total", "shadow"] == 1


async def test_a_gateway_that_stops_cancels_mirrored_requests(shadowed: Rig) -> None:
    rig = shadowed
    rig.pods[1].gate.clear()
    assert (await rig.chat("pirate"))[0] == 200
    await eventually(lambda: rig.pods[1].running, "it runs")
    await rig.gateway.proxy.drain(60)
    await eventually(lambda: rig.pods[1].disconnected == 1, "it is cancelled")
    assert comparison(rig).dropped == 1


def facts(answer: dict[str, Any] | bytes, *, stream: bool = False) -> AnswerFacts | None:
    reader = AnswerReader()
    for document in documents(answer if isinstance(answer, bytes) else json.dumps(answer).encode(), stream=stream):
        reader.read(document)
    return reader.facts()


USAGE = {"completion_tokens": 5}


@pytest.mark.parametrize(
    ("choices", "refused"),
    [
        ([{"index": 0, "message": {"content": "yes"}}], False),
        ([{"index": 0, "text": "yes"}], False),
        ([{"index": 0, "message": {"content": None, "tool_calls": [{"id": "1"}]}}], False),
        ([{"index": 0, "message": {"content": "", "reasoning": "hm"}}], False),
        ([{"index": 0, "message": {"content": ""}}], True),
        ([{"index": 0, "text": "\n"}], True),
        ([{"index": 0, "message": {"content": "I cannot", "refusal": "I cannot"}}], True),
        ([{"index": 0, "text": "x", "finish_reason": "content_filter"}], True),
        ([{"index": 0, "text": "x"}, {"index": 1, "text": ""}], True),
    ],
)
def test_refusals(choices: list[dict[str, Any]], refused: bool) -> None:  # noqa: FBT001
    assert facts({"choices": choices, "usage": USAGE}) == AnswerFacts(5, refused, None)


def test_an_answer_in_events_is_read_like_a_whole_one() -> None:
    events = [
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"index": 0, "delta": {"content": "a"}, "logprobs": {"content": [{"logprob": -1}]}}]},
        {"choices": [{"index": 0, "delta": {"content": "b"}, "logprobs": {"content": [{"logprob": -3}]}}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        {"choices": [], "usage": USAGE},
    ]
    stream = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"
    assert facts(stream, stream=True) == AnswerFacts(5, is_refusal=False, logprob=-2.0)
    broken = stream + b'data: {"error": {"message": "x"}}\n\n'
    assert facts(broken, stream=True) is None


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        {"choices": [{"index": 0, "text": "x"}]},
        {"choices": [], "usage": USAGE},
        {"choices": [{"text": "x"}], "usage": USAGE},
        {"choices": ["x"], "usage": USAGE},
        {"choices": [{"index": 0, "text": "x", "logprobs": {"token_logprobs": ["x"]}}], "usage": USAGE},
        {"error": {"message": "x"}, "choices": [{"index": 0, "text": "x"}], "usage": USAGE},
    ],
    ids=range(10),
)
def test_other_answers_cannot_be_compared(answer: Any) -> None:
    assert facts(answer) is None


def test_log_probabilities_of_completions() -> None:
    choice = {"index": 0, "text": "x", "logprobs": {"token_logprobs": [None, -1.0, -9999.0]}}
    assert facts({"choices": [choice], "usage": USAGE}) == AnswerFacts(5, is_refusal=False, logprob=-500.5)


def test_comparisons_are_bounded_and_reported_once() -> None:
    comparisons = Comparisons()
    for number in range(MAX_COMPARISONS + 10):
        comparisons.add_failure(f"team/{number}")
    seen, found = comparisons.since(0)
    assert len(found) == MAX_COMPARISONS
    assert "team/0" not in found
    assert comparisons.since(seen) == (seen, {})
    comparisons.add_dropped("team/99")
    changed = comparisons.since(seen)[1]
    assert {name: (entry.failures, entry.dropped) for name, entry in changed.items()} == {"team/99": (1, 1)}
    comparisons.keep(lambda name: name == "team/99")
    assert list(comparisons.since(0)[1]) == ["team/99"]
