"""Adapter slots of pods: where requests go when several pods hold an adapter."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tests.gateway.gateway_rig import adapter_manifest, eventually
from tunesmith.contracts.agent import PodUse

if TYPE_CHECKING:
    from tests.gateway.gateway_rig import FakePod, Rig

PIRATE, POET = "team/pirate@aaaaaaaaaaaa", "team/poet@aaaaaaaaaaaa"


async def two_pods(rig: Rig) -> tuple[FakePod, FakePod]:
    for name in ("pirate", "poet"):
        rig.watches.put(adapter_manifest(name))
    pods = (await rig.add_pod(PIRATE, POET), await rig.add_pod(PIRATE, POET))
    await report(rig, pods[0])
    await report(rig, pods[1])
    return pods


async def report(rig: Rig, pod: FakePod, *active: str, slots: int = 1) -> None:
    """Have the pod's agent report its slots, and wait until the gateway knows them."""
    pod.use = PodUse(slots=slots, active=list(active))
    await pod.notify()
    backend = rig.gateway.backends._by_uid[pod.uid]
    await eventually(lambda: (backend._slots, backend._reported) == (slots, set(active)), "the use is known")


async def first(rig: Rig, pods: tuple[FakePod, FakePod], model: str) -> FakePod:
    """The pod that an idle gateway chooses for a model."""
    await rig.chat(model)
    return next(pod for pod in pods if pod.seen)


async def test_a_pod_whose_slots_another_gateway_uses_is_avoided(rig: Rig) -> None:
    pods = await two_pods(rig)
    home = await first(rig, pods, "pirate")
    other = pods[1 - pods.index(home)]
    await report(rig, home, "team/someone@bbbbbbbbbbbb")
    await rig.chat("pirate")
    assert len(other.seen) == 1
    await report(rig, home)
    await rig.chat("pirate")
    assert len(home.seen) == 2


async def test_an_adapter_stays_where_it_is_active(rig: Rig) -> None:
    pods = await two_pods(rig)
    home = await first(rig, pods, "pirate")
    other = pods[1 - pods.index(home)]
    await report(rig, other, PIRATE)
    await rig.chat("pirate")
    assert len(other.seen) == 1


async def test_adapters_in_use_at_the_same_time_get_different_pods(rig: Rig) -> None:
    pods = await two_pods(rig)
    for pod in pods:
        pod.gate.clear()
    requests = [asyncio.create_task(rig.chat("pirate"))]
    await eventually(lambda: sum(pod.running for pod in pods) == 1, "the first one runs")
    requests += [asyncio.create_task(rig.chat("poet"))]
    await eventually(lambda: [pod.running for pod in pods] == [1, 1], "each pod has one")
    for pod in pods:
        pod.gate.set()
    assert [status for status, _ in await asyncio.gather(*requests)] == [200, 200]


async def test_pods_with_the_new_and_the_old_whole_model_share_the_requests(rig: Rig) -> None:
    """While a pool's pods get a new base model, its first new pod must not be overloaded; no adapter slot is needed."""
    rig.watches.put(adapter_manifest("whole", digests=("b", "a"), whole=True))
    new, old = "team/whole@bbbbbbbbbbbb", "team/whole@aaaaaaaaaaaa"
    pods = [await rig.add_pod(new), await rig.add_pod(old), await rig.add_pod(old)]
    for pod in pods:
        await report(rig, pod, "team/someone@cccccccccccc")
        pod.gate.clear()
    requests = []
    for count in range(1, 7):
        requests.append(asyncio.create_task(rig.chat("whole")))
        await eventually(lambda count=count: sum(pod.running for pod in pods) == count, f"{count} requests run")
    running = [pod.running for pod in pods]
    assert running[0] <= 3, "the new pod does not get all"
    assert all(running), running
    for pod in pods:
        pod.gate.set()
    answers = await asyncio.gather(*requests)
    assert {document["model"] for _, document in answers} == {new, old}
