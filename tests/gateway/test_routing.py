from __future__ import annotations

from collections import Counter

import pytest

from tunesmith.gateway.routing import LOAD_FACTOR, choose, rank

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
    assert choose(loads) == chosen


def test_load_stays_within_the_bound_and_uses_every_pod() -> None:
    loads = [0, 0, 0, 0]
    for _ in range(96):
        loads[choose(loads)] += 1
    assert min(loads) > 0
    assert max(loads) <= LOAD_FACTOR * 96 / 4 + 1
