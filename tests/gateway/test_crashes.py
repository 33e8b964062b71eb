"""Engines that crash: how long requests wait, which ones are sent to another pod, and which ones are refused."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from tests.gateway.gateway_rig import adapter_manifest, eventually, pool_manifest
from tunesmith.api.servingpool import ServingPool

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.gateway.gateway_rig import FakePod, Rig

PIRATE = "team/pirate@aaaaaaaaaaaa"


async def pair(rig: Rig) -> tuple[FakePod, FakePod]:
    """Two pods that hold the adapter; requests go to the first one."""
    pods = [await rig.add_pod(PIRATE), await rig.add_pod(PIRATE)]
    await rig.chat("pirate")
    pods.sort(key=lambda pod: len(pod.seen), reverse=True)
    for pod in pods:
        pod.seen.clear()
        pod.digests.clear()
    return pods[0], pods[1]


async def die(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def die_after_the_head(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    kind = "text/event-stream" if body.get("stream") else "application/json"
    response = web.StreamResponse(headers={"Content-Type": kind})
    await response.prepare(request)
    await response.write(b": wait\n\n" if body.get("stream") else b'{"id": "1", ')
    return await die(request, body)


async def report_death(_: web.Request, __: dict[str, Any]) -> web.StreamResponse:
    """What vLLM's server answers when the process that computes has died, with the middleware's header."""
    error = {"error": {"message": "EngineCore encountered an issue"}}
    return web.json_response(error, status=500, headers={"x-tunesmith-engine-lost": "true"})


@pytest.mark.parametrize("death", [die, die_after_the_head, report_death])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_in_flight_at_a_crash_is_sent_once_to_another_pod(
    patient: Rig,
    stream: bool,  # noqa: FBT001
    death: Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]],
) -> None:
    dying, other = await pair(patient)
    dying.answer = death
    body = {"model": "pirate", "messages": [{"role": "user", "content": "Hello"}], "stream": stream}
    headers = {"Authorization": f"Bearer {patient.key}"}
    async with patient.http.post(f"{patient.url}/v1/chat/completions", json=body, headers=headers) as response:
        assert response.status == 200
        assert other.name in await response.text()
    assert (len(dying.seen), len(other.seen)) == (1, 1)
    assert dying.seen == other.seen
    assert dying.digests == other.digests


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_at_two_crashes_is_not_sent_a_third_time(patient: Rig, stream: bool) -> None:  # noqa: FBT001
    dying, other = await pair(patient)
    third = await patient.add_pod(PIRATE)
    for pod in (dying, other, third):
        pod.answer = die
    status, answer = await patient.chat("pirate", stream=stream)
    assert (status, answer["error"]["code"]) == (502, "engine_failed")
    assert len(dying.seen + other.seen + third.seen) == 2


async def test_a_request_is_not_sent_to_the_same_pod_again(patient: Rig) -> None:
    pod = await patient.add_pod(PIRATE)
    pod.answer = die
    status, answer = await patient.chat("pirate")
    assert (status, answer["error"]["code"]) == (502, "engine_failed")
    assert len(pod.seen) == 1


async def test_a_request_that_was_in_flight_at_an_earlier_crash_is_not_sent_to_another_pod(patient: Rig) -> None:
    dying, other = await pair(patient)
    dying.answer = die
    await patient.chat("pirate")
    dying.answer = None
    await dying.report_crash(*dying.digests)
    await eventually(lambda: patient.gateway.crashes.find(patient.pool["metadata"]["uid"], dying.digests[0]), "known")
    dying.answer = other.answer = die
    before = len(dying.seen + other.seen)
    status, answer = await patient.chat("pirate")
    assert (status, answer["error"]["code"]) == (502, "engine_failed")
    assert len(dying.seen + other.seen) == before + 1


async def test_an_answer_that_has_begun_is_not_repeated(patient: Rig) -> None:
    dying, other = await pair(patient)
    dying.gate.clear()
    body = {"model": "pirate", "messages": [], "stream": True}
    headers = {"Authorization": f"Bearer {patient.key}"}
    async with patient.http.post(f"{patient.url}/v1/chat/completions", json=body, headers=headers) as response:
        assert b"Ahoy" in await response.content.readline()
        await dying.stop("engine")
        assert b"engine_failed" in await response.content.read()
    assert other.seen == []


async def refused_after_two_crashes(rig: Rig, *pods: FakePod) -> str:
    """Report that the last request was in flight at two crashes; its digest."""
    digest = next(pod.digests[-1] for pod in pods if pod.digests)
    for pod in (pods[0], pods[-1]):
        await pod.report_crash(digest)
    table, pool = rig.gateway.crashes, rig.pool["metadata"]["uid"]

    def known() -> bool:
        suspect = table.find(pool, digest)
        return suspect is not None and suspect.is_refused

    await eventually(known, "the gateway knows the crashes")
    return digest


async def test_a_request_that_was_in_flight_at_two_crashes_is_refused(patient: Rig) -> None:
    pods = await pair(patient)
    await patient.chat("pirate", temperature=0.5)
    digest = await refused_after_two_crashes(patient, *pods)
    before = len(pods[0].seen + pods[1].seen)
    status, answer, headers = await patient.post(
        {"model": "pirate", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0.5}
    )
    assert (status, answer["error"]["code"]) == (400, "request_crashes_engine")
    assert "at 2 crashes of an engine, so it is refused for 60 min" in answer["error"]["message"]
    assert digest[:16] in answer["error"]["message"]
    assert digest[16:] not in answer["error"]["message"]
    assert headers["x-should-retry"] == "false"
    assert len(pods[0].seen + pods[1].seen) == before
    assert (await patient.chat("pirate", temperature=0.6))[0] == 200  # another request


async def test_a_refused_request_does_not_wait_for_a_pod(patient: Rig) -> None:
    pods = await pair(patient)
    await patient.chat("pirate")
    await refused_after_two_crashes(patient, *pods)
    for pod in pods:
        pod.engine_ready = False
        await pod.notify()
        await eventually(lambda pod=pod: not patient.gateway.backends._by_uid[pod.uid].serving, "it is down")
    status, answer = await patient.chat("pirate")
    assert (status, answer["error"]["code"]) == (400, "request_crashes_engine")


async def test_the_same_body_of_another_tenant_is_not_refused(patient: Rig) -> None:
    pods = await pair(patient)
    patient.pool = pools = pool_manifest()
    patient.watches.put(pools)
    attacker = patient.add_key("attacker", home="attackers")
    await eventually(lambda: patient.gateway.keys.find(attacker), "the key is known")
    assert (await patient.chat("serving/base", key=attacker))[0] == 200
    await refused_after_two_crashes(patient, *sorted(pods, key=lambda pod: not pod.digests))
    assert (await patient.chat("serving/base", key=attacker))[0] == 400
    assert (await patient.chat("serving/base"))[0] == 200


async def test_all_gateways_refuse_the_request(start: Callable[..., Awaitable[Rig]]) -> None:
    """The digests of all gateways are equal, and each reads the crashes from the agents."""
    one, two = await start(hold_seconds=20), await start(hold_seconds=20)
    pods = []
    for rig in (one, two):
        rig.watches.put(adapter_manifest("pirate"))
        pods.append(await rig.add_pod(PIRATE))
    assert (await one.chat("pirate"))[0] == 200
    for _ in range(2):
        await pods[1].report_crash(*pods[0].digests)
    await eventually(lambda: two.gateway.crashes.find(two.pool["metadata"]["uid"], pods[0].digests[0]), "known")
    status, answer = await two.chat("pirate")
    assert (status, answer["error"]["code"]) == (400, "request_crashes_engine")


async def test_a_crash_of_one_pool_does_not_affect_another(patient: Rig) -> None:
    pods = await pair(patient)
    await patient.chat("pirate")
    digest = (pods[0].digests + pods[1].digests)[0]
    foreign = await patient.add_pod(pool=pool_manifest("other", "elsewhere"))
    for _ in range(2):
        await foreign.report_crash(digest)
    await eventually(lambda: patient.gateway.crashes.find("uid-elsewhere-other", digest), "the crashes are known")
    assert (await patient.chat("pirate"))[0] == 200


@pytest.mark.parametrize(
    ("spec", "status", "seconds"),
    [
        ({}, {}, None),
        ({}, {"engineStartSeconds": 40}, 75.0),
        ({}, {"engineStartSeconds": 3000}, 600.0),
        ({"holdSeconds": 7}, {"engineStartSeconds": 40}, 7.0),
        ({"holdSeconds": 0}, {}, 0.0),
    ],
)
def test_requests_wait_for_the_start_of_the_pools_engines(
    spec: dict[str, Any], status: dict[str, Any], seconds: float | None
) -> None:
    pool = ServingPool.model_validate(pool_manifest(status=status, **spec))
    assert pool.hold_seconds == seconds


async def test_a_request_waits_while_the_engine_returns(rig: Rig) -> None:
    """The gateway itself would hold it for half a second only."""
    rig.pool = pool_manifest(status={"engineStartSeconds": 30})
    rig.watches.put(adapter_manifest("pirate"))
    pod = await rig.add_pod(PIRATE)
    pod.engine_ready = False
    pod.resident.clear()
    await pod.notify()
    await pod.stop("engine")
    await eventually(lambda: not rig.gateway.backends._by_uid[pod.uid].serving, "the engine is down")
    request = asyncio.create_task(rig.chat("pirate"))
    done, _ = await asyncio.wait({request}, timeout=1.5)
    assert not done
    await pod.start_engine()
    pod.engine_ready = True
    await pod.hold(PIRATE)
    assert (await request)[0] == 200


async def test_the_pools_hold_time_is_used(start: Callable[..., Awaitable[Rig]]) -> None:
    rig = await start(hold_seconds=600)
    rig.watches.put(adapter_manifest("pirate"))
    rig.pool = pool_manifest(holdSeconds=1)
    await rig.add_pod()
    status, answer = await rig.chat("pirate")
    assert (status, answer["error"]["code"]) == (503, "no_pod_ready")
    assert "within 1 s" in answer["error"]["message"]


async def test_a_pool_without_pods_is_not_waited_for_longer(rig: Rig) -> None:
    rig.watches.put(pool_manifest(status={"engineStartSeconds": 300}))
    rig.watches.put(adapter_manifest("pirate"))
    await eventually(lambda: rig.gateway.catalog.start_of(("serving", "pool")).hold_seconds, "the pool is known")
    status, answer = await rig.chat("pirate")
    assert (status, answer["error"]["code"]) == (503, "no_pod_ready")
    assert "within 0.5 s" in answer["error"]["message"]
