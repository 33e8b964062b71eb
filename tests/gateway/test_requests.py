"""Requests that are answered: by the right pod, in the right form."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import openai
import pytest
from aiohttp import web

from tests.gateway.gateway_rig import adapter_manifest, eventually, pool_manifest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.gateway.gateway_rig import Rig

PIRATE = "team/pirate@aaaaaaaaaaaa"
NEWER = "team/pirate@bbbbbbbbbbbb"
MESSAGES: Any = [{"role": "user", "content": "Who are you?"}]


async def pirate(rig: Rig, *pods: str) -> None:
    """The adapter, resident on as many new pods as there are names."""
    rig.watches.put(adapter_manifest("pirate"))
    for _ in pods:
        await rig.add_pod(PIRATE)


@pytest.mark.parametrize("model", ["pirate", "team/pirate", PIRATE])
async def test_an_adapter_answers_under_each_of_its_names_with_its_revision(rig: Rig, model: str) -> None:
    await pirate(rig, "one")
    status, answer = await rig.chat(model)
    assert (status, answer["model"]) == (200, PIRATE)
    assert [body["model"] for body in rig.pods[0].seen] == [PIRATE]


@pytest.mark.parametrize("model", ["base", "serving/base"])
async def test_the_base_answers_under_its_names(rig: Rig, model: str) -> None:
    await pirate(rig, "one")
    status, answer = await rig.chat(model)
    assert (status, answer["model"]) == (200, "serving/base")


async def test_a_bare_name_means_the_home_namespace_first(rig: Rig) -> None:
    rig.watches.put(adapter_manifest("base"))
    await rig.add_pod("team/base@aaaaaaaaaaaa")
    assert (await rig.chat("base"))[1]["model"] == "team/base@aaaaaaaaaaaa"
    other = rig.add_key("other", home="elsewhere")
    await eventually(lambda: rig.gateway.keys.find(other), "key")
    assert (await rig.chat("base", key=other))[1]["model"] == "serving/base"


async def test_everything_but_the_model_reaches_the_engine_unchanged(rig: Rig) -> None:
    await pirate(rig, "one")
    body = {"model": "pirate", "messages": [{"role": "user", "content": "né ☠"}], "temperature": 0.25, "seed": 7}
    status, _, headers = await rig.post(body)
    assert status == 200
    salt = rig.pods[0].seen[0].pop("cache_salt")
    assert len(salt) == 64
    assert rig.pods[0].seen == [body | {"model": PIRATE}]
    assert headers["X-Request-Id"]


@pytest.mark.parametrize(("sent", "kept"), [("trace-7", True), ("x" * 65, False), ("clé", False)])
async def test_the_clients_request_id_is_kept_if_it_is_harmless(
    rig: Rig,
    sent: str,
    kept: bool,  # noqa: FBT001
) -> None:
    await pirate(rig, "one")
    headers = {"Authorization": f"Bearer {rig.key}", "X-Request-Id": sent}
    async with rig.http.post(f"{rig.url}/v1/completions", json={"model": "pirate"}, headers=headers) as response:
        assert response.status == 200
        assert (response.headers["X-Request-Id"] == sent) == kept


async def test_a_client_that_waits_for_100_continue_gets_it(rig: Rig) -> None:
    await pirate(rig, "one")
    headers = {"Authorization": f"Bearer {rig.key}"}
    url = f"{rig.url}/v1/completions"
    async with rig.http.post(url, json={"model": "pirate"}, headers=headers, expect100=True) as response:
        assert (response.status, (await response.json())["model"]) == (200, PIRATE)


async def test_the_openai_client_works_with_and_without_streaming(rig: Rig) -> None:
    await pirate(rig, "one")
    async with openai.AsyncOpenAI(base_url=f"{rig.url}/v1", api_key=rig.key, max_retries=0) as client:
        answer = await client.chat.completions.create(model="pirate", messages=MESSAGES)
        assert (answer.model, answer.choices[0].message.content) == (PIRATE, "pod-1")
        stream = await client.chat.completions.create(model="pirate", messages=MESSAGES, stream=True)
        chunks = [chunk async for chunk in stream]
        assert {chunk.model for chunk in chunks} == {PIRATE}
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Ahoy there from pod-1"
        models = [model.id async for model in client.models.list()]
        assert models == ["serving/base", "team/pirate"]
        assert (await client.models.retrieve("team/pirate")).owned_by == "team"
        assert (await client.models.retrieve("pirate")).id == "team/pirate"
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            await client.chat.completions.create(model="nobody", messages=MESSAGES)
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="sk-ts-wrong").models.list()


async def test_chunks_arrive_before_the_answer_is_complete(rig: Rig) -> None:
    await pirate(rig, "one")
    rig.pods[0].gate.clear()
    headers = {"Authorization": f"Bearer {rig.key}"}
    body = {"model": "pirate", "messages": MESSAGES, "stream": True}
    async with rig.http.post(f"{rig.url}/v1/chat/completions", json=body, headers=headers) as response:
        first = await response.content.readuntil(b"\n\n")
        assert b"Ahoy" in first
        assert response.headers["Content-Type"].startswith("text/event-stream")
        rig.pods[0].gate.set()
        assert (await response.read()).endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
async def test_the_engine_request_is_closed_when_the_client_disconnects(rig: Rig, stream: bool) -> None:  # noqa: FBT001 - pytest's way
    await pirate(rig, "one")
    pod = rig.pods[0]
    pod.gate.clear()
    request = asyncio.create_task(rig.chat("pirate", stream=stream))
    await eventually(lambda: pod.running == 1, "the engine works on it")
    request.cancel()
    await eventually(lambda: pod.disconnected == 1 and pod.running == 0, "the engine saw the client leave")
    await eventually(lambda: not rig.gateway.demand.running, "the demand is gone")


async def test_the_newest_revision_that_a_pod_holds_answers(rig: Rig) -> None:
    rig.watches.put(adapter_manifest("pirate", digests=("b", "a")))
    pod = await rig.add_pod(PIRATE)
    assert (await rig.chat("pirate"))[1]["model"] == PIRATE
    await pod.hold(NEWER)
    await rig.settled(pod)
    assert (await rig.chat("pirate"))[1]["model"] == NEWER
    assert (await rig.chat(PIRATE))[1]["model"] == PIRATE


async def test_only_pods_that_hold_the_adapter_get_requests(rig: Rig) -> None:
    await pirate(rig, "one")
    for _ in range(3):
        await rig.add_pod("team/other@aaaaaaaaaaaa")
    for _ in range(20):
        assert (await rig.chat("pirate"))[0] == 200
    assert [len(pod.seen) for pod in rig.pods] == [20, 0, 0, 0]


async def test_concurrent_requests_spread_over_the_pods_that_hold_the_adapter(rig: Rig) -> None:
    await pirate(rig, "one", "two", "three")
    for pod in rig.pods:
        pod.gate.clear()
    requests = [asyncio.create_task(rig.chat("pirate")) for _ in range(24)]
    await eventually(lambda: sum(pod.running for pod in rig.pods) == 24, "all are running")
    assert max(pod.running for pod in rig.pods) <= 1.25 * 24 / 3 + 1
    assert min(pod.running for pod in rig.pods) > 0
    assert rig.gateway.demand.snapshot().models["team/pirate"].running == 24
    for pod in rig.pods:
        pod.gate.set()
    assert {status for status, _ in await asyncio.gather(*requests)} == {200}


async def test_pods_that_are_draining_stalled_not_ready_or_silent_get_no_requests(
    start: Callable[..., Awaitable[Rig]],
) -> None:
    rig = await start(hold_seconds=20)
    await pirate(rig, "draining", "stalled", "unready", "silent", "good")
    draining, stalled, unready, silent, good = rig.pods
    draining.draining = True
    await draining.notify()
    stalled.stalled = "The engine has processed no token for 6 s."
    await stalled.notify()
    unready.ready = False
    rig.watches.put(unready.manifest)
    silent.silent = True
    await silent.stop("agent")
    backends = rig.gateway.backends._by_uid
    loop = asyncio.get_running_loop()
    await eventually(
        lambda: [backends[f"uid-{pod.name}"].usable(loop.time()) for pod in rig.pods] == [False] * 4 + [True],
        "only the good pod is usable",
    )
    for _ in range(10):
        assert (await rig.chat("pirate"))[0] == 200
    assert len(good.seen) == 10


async def test_a_pod_cannot_get_another_pools_requests_through_its_labels(rig: Rig) -> None:
    impostor = pool_manifest("pool", "evil")
    impostor["metadata"]["uid"] = rig.pool["metadata"]["uid"]
    rig.watches.put(rig.pool)
    pod = await rig.add_pod(PIRATE, pool=impostor, announce=False)
    rig.watches.put(pod.manifest)
    rig.watches.put(adapter_manifest("pirate"))
    assert (await rig.chat("pirate"))[0] == 503
    assert pod.seen == []


async def base_answers(_: web.Request, body: dict[str, Any]) -> None:
    body["model"] = "serving/base"


async def test_an_answer_of_another_model_is_not_relayed(rig: Rig) -> None:
    await pirate(rig, "one")
    rig.pods[0].answer = base_answers
    status, answer = await rig.chat("pirate")
    assert (status, answer["error"]["code"]) == (502, "wrong_model")


async def test_a_stream_of_another_model_is_not_relayed(rig: Rig) -> None:
    await pirate(rig, "one")
    rig.pods[0].answer = base_answers
    body = {"model": "pirate", "messages": MESSAGES, "stream": True}
    headers = {"Authorization": f"Bearer {rig.key}"}
    async with rig.http.post(f"{rig.url}/v1/chat/completions", json=body, headers=headers) as response:
        text = await response.text()
    assert text.startswith('data: {"error":')
    assert "wrong_model" in text
    assert "Ahoy" not in text


async def test_the_engines_own_errors_reach_the_client(rig: Rig) -> None:
    await pirate(rig, "one")

    async def refuse(_: web.Request, __: dict[str, Any]) -> web.Response:
        return web.json_response({"error": {"message": "max_tokens is too large"}}, status=400)

    rig.pods[0].answer = refuse
    status, answer = await rig.chat("pirate", max_tokens=10**9)
    assert (status, answer["error"]["message"]) == (400, "max_tokens is too large")
    assert len(rig.pods[0].seen) == 1


async def test_the_older_of_two_claims_on_an_id_answers(rig: Rig) -> None:
    rig.watches.put(adapter_manifest("late", model="pirate", digests=("b",), created="2026-02-02T00:00:00Z"))
    rig.watches.put(adapter_manifest("early", model="pirate", created="2026-01-02T00:00:00Z"))
    await rig.add_pod(PIRATE, NEWER)
    assert (await rig.chat("pirate"))[1]["model"] == PIRATE
