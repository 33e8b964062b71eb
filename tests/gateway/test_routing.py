from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from tunesmith.gateway.routing import LOAD_FACTOR, PodLoad, choose, rank

PODS = tuple(f"pod-{number}" for number in range(8))


def identity(pod: str) -> str:
    return pod


def test_the_order_of_a_model_does_not_depend_on_the_order_of_the_pods() -> None:
    assert rank("team/pirate@1", PODS, identity) == rank("team/pirate@1", reversed(PODS), identity)


def test_removing_a_pod_moves_only_its_own_models() -> None:
    models = [f"team/m{number}@1" for number in range(400)]
    for model in models:
        before = rank(model, PODS, identity)
        after = rank(model, PODS[:-1], identity)
        assert after == tuple(pod for pod in before if pod != PODS[-1])


def test_models_spread_over_the_pods() -> None:
    firsts = Counter(rank(f"team/m{number}@1", PODS, identity)[0] for number in range(4000))
    assert set(firsts) == set(PODS)
    assert max(firsts.values()) < 1.3 * min(firsts.values())


@pytest.mark.parametrize(
    ("loads", "chosen"),
    [
        ([0], 0),
        ([9], 0),
        ([0, 0], 0),
        ([1, 0], 0),
        ([2, 0], 1),
        ([5, 5, 0], 2),
        ([4, 1, 3], 1),
        ([3, 3, 3], 0),
        ([5, 3, 3], 1),
    ],
)
def test_the_first_pod_within_the_bound_is_chosen(loads: list[int], chosen: int) -> None:
    assert choose([PodLoad(load) for load in loads]) == chosen


def test_load_stays_within_the_bound_and_uses_every_pod() -> None:
    loads = [0, 0, 0, 0]
    for _ in range(96):
        loads[choose([PodLoad(load) for load in loads])] += 1
    assert min(loads) > 0
    assert max(loads) <= LOAD_FACTOR * 96 / 4 + 1


IDLE, FREE, FULL = (
    {"active": False, "excess": -7},
    {"active": False, "excess": 0},
    {"active": False, "excess": 1},
)
ACTIVE = {"active": True, "excess": 0}


@pytest.mark.parametrize(
    ("pods", "chosen"),
    [
        pytest.param([(0, FREE), (1, ACTIVE)], 1, id="where the adapter is active"),
        pytest.param([(0, FULL), (1, FREE)], 1, id="where a slot is free"),
        pytest.param([(0, IDLE), (0, FREE)], 0, id="in the order of the adapter"),
        pytest.param([(5, ACTIVE), (0, FREE)], 1, id="to a free slot when the load requires it"),
        pytest.param([(5, ACTIVE), (0, FULL)], 0, id="to no full pod, whatever the load"),
        pytest.param([(9, FREE), (0, FULL)], 0, id="to a free slot, whatever the load"),
        pytest.param([(9, ACTIVE), (4, ACTIVE), (0, FULL)], 1, id="to the least loaded one where it is active"),
        pytest.param([(0, {"active": False, "excess": 3}), (5, FULL)], 1, id="to the one with fewest active adapters"),
        pytest.param([(5, FULL), (0, FULL)], 1, id="to the least loaded of these"),
    ],
)
def test_slots_come_before_loads(pods: list[tuple[int, dict[str, Any]]], chosen: int) -> None:
    assert choose([PodLoad(running, **more) for running, more in pods]) == chosen


def test_no_pod_has_more_active_adapters_than_slots_while_another_has_room() -> None:
    chance, slots = random.Random(1), 4  # noqa: S311
    active: list[Counter[str]] = [Counter() for _ in range(3)]
    running: list[tuple[int, str]] = []
    for _ in range(3000):
        model = f"team/m{chance.randrange(11)}@1"
        order = rank(model, range(3), str)
        loads = [
            PodLoad(sum(active[pod].values()), len(active[pod].keys() | {model}) - slots, model in active[pod])
            for pod in order
        ]
        pod = order[choose(loads)]
        if model not in active[pod] and len(active[pod]) >= slots:
            assert all(len(other) >= slots for other in active)
        active[pod][model] += 1
        running.append((pod, model))
        if len(running) > 20:
            pod, model = running.pop(chance.randrange(len(running)))
            active[pod] -= Counter([model])
