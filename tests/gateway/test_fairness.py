"""Turns of API keys: a flood of one key neither delays the others nor uses up the pods."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from tests.gateway.gateway_rig import adapter_manifest, eventually, pool_manifest
from tunesmith.api.engine_arguments import max_sequences
from tunesmith.contracts.apikey import Priority
from tunesmith.gateway.fairness import ACTIVE_SECONDS, PodShares, Tenant, Turns, Waiter

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.gateway.gateway_rig import FakePod, Rig

    Start = Callable[..., Awaitable[Rig]]

PIRATE = "team/pirate@aaaaaaaaaaaa"


def order(arrivals: list[tuple[Tenant, int]], count: int) -> list[str]:
    """The keys of the first requests that get a place, one place at a time."""
    turns: Turns[int] = Turns()
    free = 0

    def take() -> int | None:
        nonlocal free
        free -= 1
        return 1 if free >= 0 else None

    for tenant, cost in arrivals:
        turns.enter(Waiter(tenant, (tenant.name, "model"), cost, take))
    served = []
    for _ in range(count):
        free = 1
        served += [waiter.tenant.name for waiter in turns.dispatch(1)]
    return served


def test_keys_take_turns_whatever_the_order_of_arrival() -> None:
    flood, other = Tenant("flood", 2), Tenant("other", 2)
    assert order([(flood, 1)] * 100 + [(other, 1)] * 3, 6) == ["flood", "other"] * 3


def test_weights_share_the_places() -> None:
    high, normal, low = Tenant("high", 4), Tenant("normal", 2), Tenant("low", 1)
    assert Counter(order([(tenant, 1) for tenant in (low, normal, high) for _ in range(99)], 70)) == {
        "high": 40,
        "normal": 20,
        "low": 10,
    }


def test_a_request_with_many_sequences_counts_as_many() -> None:
    many, one = Tenant("many", 2), Tenant("one", 2)
    assert Counter(order([(many, 8)] * 20 + [(one, 1)] * 100, 18)) == {"many": 2, "one": 16}


def test_a_key_that_was_idle_has_no_credit() -> None:
    turns: Turns[int] = Turns()
    busy, idle = Tenant("busy", 2), Tenant("idle", 2)
    for _ in range(100):
        turns.started(turns.charge(busy, 1))
    starts = [turns.charge(idle, 1) for _ in range(3)]
    assert starts[0] >= turns.charge(busy, 1) - 1, "it is next, but not for a hundred requests"


def test_a_request_that_leaves_the_queue_is_not_served() -> None:
    turns: Turns[int] = Turns()
    waiter = Waiter(Tenant("a", 1), ("a", "model"), 1, lambda: 1)
    turns.enter(waiter)
    turns.leave(waiter)
    assert turns.is_empty
    assert turns.dispatch() == []


def test_one_key_alone_may_use_a_whole_pod() -> None:
    shares = PodShares(lambda: 0.0)
    alone = Tenant("alone", 2)
    for _ in range(16):
        assert shares.is_open_to(alone, 16)
        shares.add(alone, 1)
    assert not shares.is_open_to(alone, 16)


def test_places_are_kept_for_other_keys_that_are_active() -> None:
    now = 0.0
    shares = PodShares(lambda: now)
    flood, other, third = (Tenant(name, 2) for name in ("flood", "other", "third"))
    shares.add(other, 1)
    shares.add(other, -1)
    while shares.is_open_to(flood, 16):
        shares.add(flood, 1)
    assert shares.running == 14
    assert shares.is_open_to(other, 16)
    assert shares.is_open_to(third, 16), "also for a key that was never seen"
    shares.add(other, 2)
    assert not shares.is_open_to(third, 16), "none is left"
    shares.add(other, -2)
    now = ACTIVE_SECONDS + 1
    assert shares.is_open_to(flood, 16), "the other key has sent nothing for long"


def test_keys_that_all_flood_share_a_pod_equally() -> None:
    shares = PodShares(lambda: 0.0)
    turns: Turns[bool] = Turns()
    tenants = [Tenant(name, 2) for name in ("a", "b", "c", "d")]
    running: list[Tenant] = []

    def taker(tenant: Tenant) -> Callable[[], bool | None]:
        def take() -> bool | None:
            if not shares.is_open_to(tenant, 16):
                return None
            shares.add(tenant, 1)
            running.append(tenant)
            return True

        return take

    for tenant in tenants:
        for _ in range(200):
            turns.enter(Waiter(tenant, (tenant.name, "model"), 1, taker(tenant)))
    turns.dispatch()
    for _ in range(100):
        shares.add(running.pop(0), -1)
        turns.dispatch(1)
    assert max(Counter(running).values()) - min(Counter(running).values()) <= 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], None),
        (["--max-num-seqs=8"], 8),
        (["--seed=1", "--max-num-seqs", "32"], 32),
        (["--max_num_seqs=8", "--max-num-seqs=16"], 16),
        (["--max-num-seqs"], None),
        (["--max-num-seqs=-1"], None),
    ],
)
def test_the_places_of_a_pod_from_its_arguments(arguments: list[str], expected: int | None) -> None:
    assert max_sequences(arguments) == expected


async def busy_pod(start: Start, places: int = 8, **settings: Any) -> tuple[Rig, FakePod]:
    rig = await start(**settings)
    rig.pool = pool_manifest(engine={"args": [f"--max-num-seqs={places}"]})
    rig.watches.put(adapter_manifest("pirate"))
    pod = await rig.add_pod(PIRATE)
    return rig, pod


async def known(rig: Rig, name: str, **fields: Any) -> str:
    key = rig.add_key(name, home="team", **fields)
    await eventually(lambda: rig.gateway.keys.find(key), "the key is known")
    return key


async def test_a_flood_of_one_key_does_not_delay_another(start: Start) -> None:
    rig, pod = await busy_pod(start)
    flood, other = await known(rig, "flood"), await known(rig, "other")
    assert (await rig.chat("pirate", key=other))[0] == 200
    pod.gate.clear()
    flooding = [asyncio.create_task(rig.chat("pirate", key=flood)) for _ in range(200)]
    await eventually(
        lambda: (pod.running, rig.gateway.demand.waiting["team/pirate"]) == (7, 193),
        "the flood waits, and a place is kept for the other key",
    )
    single = asyncio.create_task(rig.chat("pirate", key=other))
    await eventually(lambda: pod.running == 8, "the other key's request starts at once")
    assert rig.gateway.demand.waiting["team/pirate"] == 193
    waiting = [asyncio.create_task(rig.chat("pirate", key=other, user=f"other-{i}")) for i in range(3)]
    await eventually(lambda: rig.gateway.demand.waiting["team/pirate"] == 196, "three more wait")
    seen = len(pod.seen)
    pod.gate.set()
    assert {status for status, _ in await asyncio.gather(single, *waiting, *flooding)} == {200}
    positions = [i for i, body in enumerate(pod.seen[seen:]) if body.get("user", "").startswith("other-")]
    assert len(positions) == 3
    assert positions[-1] < 12, "they take turns with the flood, of which 193 waited before them"
    assert pod.max_running == 8


async def test_a_key_of_high_priority_gets_more_of_a_busy_pod(start: Start) -> None:
    rig, pod = await busy_pod(start, 4)
    low, high = await known(rig, "low", priority=Priority.LOW), await known(rig, "high", priority=Priority.HIGH)
    pod.gate.clear()
    tasks = [asyncio.create_task(rig.chat("pirate", key=low, user="low")) for _ in range(40)]
    await eventually(lambda: rig.gateway.demand.waiting["team/pirate"] == 36, "the pod is busy")
    tasks += [asyncio.create_task(rig.chat("pirate", key=high, user="high")) for _ in range(40)]
    await eventually(lambda: rig.gateway.demand.waiting["team/pirate"] == 76, "both wait")
    pod.gate.set()
    assert {status for status, _ in await asyncio.gather(*tasks)} == {200}
    first = Counter(body["user"] for body in pod.seen[4:44])
    assert 28 <= first["high"] <= 36, first


async def test_a_busy_pod_is_waited_for_longer_than_a_missing_one(start: Start) -> None:
    rig, pod = await busy_pod(start, 1, hold_seconds=0, queue_seconds=0.5)
    pod.gate.clear()
    running = asyncio.create_task(rig.chat("pirate"))
    await eventually(lambda: pod.running == 1, "one runs")
    status, answer = await rig.chat("pirate")
    assert (status, answer["error"]["code"]) == (503, "pods_busy")
    waiting = asyncio.create_task(rig.chat("pirate"))
    await eventually(lambda: rig.gateway.demand.waiting["team/pirate"] == 1, "another one waits")
    waiting.cancel()
    await eventually(lambda: not rig.gateway.demand.waiting, "it left")
    pod.gate.set()
    assert (await running)[0] == 200
    assert (await rig.chat("pirate"))[0] == 200
    assert all(shares.running == 0 for shares in rig.gateway.proxy._hold._shares.values())


async def test_gateways_share_the_places_of_a_pod(start: Start) -> None:
    rig, pod = await busy_pod(start, 8, replicas=2)
    pod.gate.clear()
    tasks = [asyncio.create_task(rig.chat("pirate")) for _ in range(10)]
    await eventually(
        lambda: (pod.running, rig.gateway.demand.waiting["team/pirate"]) == (4, 6), "the rest waits at the gateway"
    )
    pod.gate.set()
    assert {status for status, _ in await asyncio.gather(*tasks)} == {200}
