"""Pods that come late, refuse, die: what is held, what is tried again, what is not."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import openai
import pytest
from aiohttp import web

from tests.gateway.gateway_rig import adapter_manifest, eventually

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.gateway.gateway_rig import FakePod, Rig

PIRATE = "team/pirate@aaaaaaaaaaaa"


def waiting(rig: Rig) -> int:
    return rig.gateway.demand.waiting["team/pirate"]


async def test_a_request_waits_until_a_pod_holds_the_adapter(patient: Rig) -> None:
    pod = await patient.add_pod()
    request = asyncio.create_task(patient.chat("pirate"))
    await eventually(lambda: waiting(patient) == 1, "the request is held")
    await pod.hold(PIRATE)
    status, answer = await request
    assert (status, answer["model"]) == (200, PIRATE)
    assert waiting(patient) == 0


async def test_a_request_waits_for_the_first_pod_of_its_pool(patient: Rig) -> None:
    patient.watches.put(patient.pool)
    await eventually(lambda: len(patient.gateway.catalog._models) == 2, "adapter and pool are known")
    request = asyncio.create_task(patient.chat("base"))
    await eventually(lambda: patient.gateway.demand.waiting["serving/base"] == 1, "the request is held")
    await patient.add_pod()
    assert (await request)[1]["model"] == "serving/base"


async def test_a_request_that_waited_too_long_is_a_503_with_retry_after(rig: Rig) -> None:
    rig.watches.put(adapter_manifest("pirate"))
    await rig.add_pod()
    status, answer, headers = await rig.post({"model": "pirate"})
    assert (status, answer["error"]["code"], headers["Retry-After"]) == (503, "no_pod_ready", "5")
    assert "0.5 s" in answer["error"]["message"]


async def test_a_request_waits_as_long_as_its_pool_asks_for_the_first_pod_of_a_pool_at_zero(rig: Rig) -> None:
    """Without that, it waits for the gateway's time. The time to try again is the measured start."""
    pool = rig.pool | {
        "spec": rig.pool["spec"] | {"holdSeconds": 1, "autoscaling": {"minReplicas": 0, "maxReplicas": 1}},
        "status": {"engineStartSeconds": 43},
    }
    rig.watches.put(pool)
    await eventually(lambda: rig.gateway.catalog.start_of(("serving", "pool")).from_zero, "the pool is known")
    status, answer, headers = await rig.post({"model": "serving/base"})
    assert (status, answer["error"]["code"], headers["Retry-After"]) == (503, "no_pod_ready", "43")
    assert "within 1 s" in answer["error"]["message"]


@pytest.mark.parametrize("limits", [{"max_held_requests": 2}])
async def test_requests_above_the_bound_do_not_wait(
    start: Callable[..., Awaitable[Rig]], limits: dict[str, int]
) -> None:
    rig = await start(hold_seconds=20, **limits)
    rig.watches.put(adapter_manifest("pirate"))
    pod = await rig.add_pod()
    other = rig.add_key("other", home="team")
    await eventually(lambda: rig.gateway.keys.find(other), "the key is known")
    held = [asyncio.create_task(rig.chat("pirate"))]
    await eventually(lambda: waiting(rig) == 1, "one is held")
    status, answer = await rig.chat("pirate")
    assert (status, answer["error"]["code"]) == (429, "too_many_waiting"), "a key leaves places to others"
    held.append(asyncio.create_task(rig.chat("pirate", key=other)))
    await eventually(lambda: waiting(rig) == 2, "two are held")
    status, answer = await rig.chat("pirate")
    assert (status, answer["error"]["code"]) == (503, "too_many_waiting")
    await pod.hold(PIRATE)
    assert {status for status, _ in await asyncio.gather(*held)} == {200}


async def test_a_waiting_client_that_disconnects_no_longer_counts(patient: Rig) -> None:
    pod = await patient.add_pod()
    request = asyncio.create_task(patient.chat("pirate"))
    await eventually(lambda: waiting(patient) == 1, "the request is held")
    request.cancel()
    await eventually(lambda: waiting(patient) == 0, "nobody waits")
    await pod.hold(PIRATE)
    assert pod.seen == []


async def pair(rig: Rig) -> tuple[FakePod, FakePod]:
    """Two pods that hold the adapter; requests go to the first one."""
    pods = [await rig.add_pod(PIRATE), await rig.add_pod(PIRATE)]
    await rig.chat("pirate")
    pods.sort(key=lambda pod: len(pod.seen), reverse=True)
    for pod in pods:
        pod.seen.clear()
    return pods[0], pods[1]


async def test_no_request_fails_if_an_engine_refuses_connections(patient: Rig) -> None:
    dead, alive = await pair(patient)
    await dead.stop("engine")
    statuses = [await patient.chat("pirate") for _ in range(20)]
    assert {status for status, _ in statuses} == {200}
    assert len(alive.seen) == 20


async def test_no_request_fails_if_a_pod_crashes(patient: Rig) -> None:
    dead, alive = await pair(patient)
    await dead.stop()
    requests = [asyncio.create_task(patient.chat("pirate")) for _ in range(20)]
    assert {status for status, _ in await asyncio.gather(*requests)} == {200}
    assert len(alive.seen) == 20


async def test_requests_to_a_draining_pod_go_to_another(patient: Rig) -> None:
    draining, other = await pair(patient)
    draining.draining = True  # its agent has not reported it yet
    assert (await patient.chat("pirate"))[1]["choices"][0]["message"]["content"] == other.name


async def test_requests_to_an_engine_that_restarted_without_adapters_go_to_another(patient: Rig) -> None:
    restarted, other = await pair(patient)
    restarted.announced = {PIRATE}  # what its agent still believes
    restarted.resident.clear()
    answer = (await patient.chat("pirate"))[1]
    assert (answer["model"], answer["choices"][0]["message"]["content"]) == (PIRATE, other.name)
    assert len(restarted.seen) == 1


async def test_requests_wait_while_all_engines_restart_and_never_get_the_bases_answer(patient: Rig) -> None:
    pod = await patient.add_pod(PIRATE)
    pod.announced = {PIRATE}
    pod.resident.clear()
    requests = [asyncio.create_task(patient.chat("pirate")) for _ in range(5)]
    await eventually(lambda: waiting(patient) == 5, "all are held")
    await pod.stop("engine")
    await pod.start_engine()
    await pod.hold(PIRATE)
    answers = await asyncio.gather(*requests)
    assert {(status, answer["model"]) for status, answer in answers} == {(200, PIRATE)}


async def test_a_pod_that_refuses_the_gateways_token_is_not_the_clients_fault(patient: Rig) -> None:
    refusing, other = await pair(patient)

    async def refuse(_: web.Request, __: dict[str, Any]) -> web.Response:
        return web.json_response({"error": "who are you?"}, status=401)

    refusing.answer = refuse
    status, answer = await patient.chat("pirate")
    assert (status, answer["choices"][0]["message"]["content"]) == (200, other.name)


async def test_a_503_without_the_not_started_header_is_never_sent_twice(patient: Rig) -> None:
    overloaded, other = await pair(patient)

    async def refuse(_: web.Request, __: dict[str, Any]) -> web.Response:
        return web.json_response({"error": {"message": "overloaded"}}, status=503)

    overloaded.answer = refuse
    assert (await patient.chat("pirate"))[0] == 503
    assert (len(overloaded.seen), len(other.seen)) == (1, 0)


async def test_an_interrupted_stream_raises_in_the_openai_client(patient: Rig) -> None:
    dying, other = await pair(patient)
    dying.gate.clear()
    async with openai.AsyncOpenAI(base_url=f"{patient.url}/v1", api_key=patient.key, max_retries=0) as client:
        stream = await client.chat.completions.create(
            model="pirate", messages=[{"role": "user", "content": "Hello"}], stream=True
        )
        assert (await anext(stream)).choices[0].delta.content == "Ahoy"
        await dying.stop("engine")
        with pytest.raises(openai.APIError, match="failed before its answer was complete"):
            async for _ in stream:
                pass
    assert other.seen == []


async def test_a_deleted_pod_finishes_its_running_requests(patient: Rig) -> None:
    pod = await patient.add_pod(PIRATE)
    pod.gate.clear()
    request = asyncio.create_task(patient.chat("pirate"))
    await eventually(lambda: pod.running == 1, "the engine works on it")
    patient.watches.delete(pod.manifest)
    await eventually(lambda: not patient.gateway.backends._by_uid, "the pod is forgotten")
    pod.gate.set()
    assert (await request)[0] == 200
