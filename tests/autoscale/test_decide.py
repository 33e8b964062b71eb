from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tunesmith.api.adapterdeployment import AdapterAutoscaling
from tunesmith.api.servingpool import PoolAutoscaling
from tunesmith.autoscale.decide import (
    Decision,
    Sample,
    Window,
    decide_copies,
    decide_pods,
    loaded_pods,
    pods_for_copies,
)

if TYPE_CHECKING:
    from collections.abc import Callable

RULE = AdapterAutoscaling(min_replicas=1, max_replicas=4, target_concurrency=8, scale_down_delay_seconds=60)
POOL = PoolAutoscaling(min_replicas=1, max_replicas=3, target_concurrency=16, scale_down_delay_seconds=60)


def trace(
    load: Callable[[int], int | None],
    seconds: int,
    rule: AdapterAutoscaling = RULE,
    start: int | None = None,
) -> list[Decision]:
    """One decision per second; a load of None is a second in which no gateway reported."""
    window, current, decisions = Window(), start, []
    for second in range(seconds):
        requests = load(second)
        window.add(Sample(float(second), requests or 0, complete=requests is not None), rule.scale_down_delay_seconds)
        decisions.append(decide_copies(window, current, rule))
        current = decisions[-1].replicas
    return decisions


def test_load_adds_copies_within_seconds_and_the_delay_removes_them() -> None:
    sizes = [decision.replicas for decision in trace(lambda second: 24 if 100 <= second < 200 else 0, 300)]
    assert sizes[99] == 1
    assert sizes[102] == 3, "two seconds after the load came"
    assert set(sizes[102:259]) == {3}, "for as long as the load was there in the last 60 s"
    assert sizes[262] == 1


def test_a_short_spike_adds_no_copy() -> None:
    assert {decision.replicas for decision in trace(lambda second: 16 if second == 100 else 0, 200)} == {1}


def test_a_wave_shorter_than_the_delay_keeps_its_copies() -> None:
    sizes = [decision.replicas for decision in trace(lambda second: 32 if second % 40 < 20 else 0, 400)]
    assert set(sizes[10:]) == {4}


def test_nothing_shrinks_while_gateways_are_silent() -> None:
    sizes = [decision.replicas for decision in trace(lambda second: 24 if second < 70 else None, 400)]
    assert set(sizes[5:]) == {3}


def test_after_silence_a_complete_delay_must_be_observed() -> None:
    sizes = [
        decision.replicas
        for decision in trace(lambda second: None if second == 100 else (24 if second < 70 else 0), 400)
    ]
    assert sizes[160] == 3
    assert sizes[161] == 1


def test_a_partial_view_may_grow() -> None:
    window = Window()
    window.add(Sample(0.0, 40, complete=False), 60)
    assert decide_copies(window, 1, RULE).replicas == 4


def test_nothing_shrinks_after_unobserved_time() -> None:
    window, sizes = Window(), {}
    for second in [*range(70), *range(200, 300)]:
        window.add(Sample(float(second), 0), 60)
        sizes[second] = decide_copies(window, 3, RULE).replicas
    assert sizes[69] == 1
    assert {sizes[second] for second in range(200, 260)} == {3}
    assert sizes[260] == 1


def test_after_a_restart_nothing_shrinks_before_the_delay_was_observed() -> None:
    sizes = [decision.replicas for decision in trace(lambda _: 0, 100, start=3)]
    assert set(sizes[:60]) == {3}
    assert sizes[60] == 1


def test_without_a_delay_copies_are_removed_immediately() -> None:
    quick = RULE.model_copy(update={"scale_down_delay_seconds": 0})
    sizes = [decision.replicas for decision in trace(lambda second: 24 if second < 5 else 0, 10, quick)]
    assert (sizes[4], sizes[5]) == (3, 1)


def once(requests: int, current: int | None, rule: AdapterAutoscaling = RULE, *, seconds: float = 60.0) -> Decision:
    window = Window()
    for at in range(int(seconds) + 1):
        window.add(Sample(float(at), requests), rule.scale_down_delay_seconds)
    return decide_copies(window, current, rule)


@pytest.mark.parametrize(
    ("requests", "current", "replicas", "reason"),
    [
        (24, 1, 3, "24 requests running or waiting, 8 per copy: 3 copies"),
        (100, 1, 4, "100 requests running or waiting, 8 per copy: 13 copies, limited to 4 by maxReplicas"),
        (1, 1, 1, "1 request running or waiting, 8 per copy: 1 copy"),
        (0, None, 1, "0 requests running or waiting, 8 per copy: 1 copy"),
        (3, 4, 1, "at most 3 requests running or waiting in the last 60 s, 8 per copy: 1 copy"),
        (0, 9, 1, "at most 0 requests running or waiting in the last 60 s, 8 per copy: 1 copy"),
    ],
)
def test_the_reason_is_a_sentence(requests: int, current: int | None, replicas: int, reason: str) -> None:
    assert once(requests, current) == Decision(replicas, reason)


def test_changed_limits_apply_immediately() -> None:
    lower = RULE.model_copy(update={"max_replicas": 2})
    assert once(0, 4, lower, seconds=1.0).replicas == 2
    higher = RULE.model_copy(update={"min_replicas": 3})
    assert once(0, 1, higher, seconds=1.0).replicas == 3


def test_the_reason_names_the_missing_demand() -> None:
    assert once(0, None, seconds=0).reason == "0 requests running or waiting, 8 per copy: 1 copy"
    assert once(0, 3, seconds=1.0).reason == (
        "0 requests running or waiting, 8 per copy; 3 copies until demand has been known for 60 s"
    )


@pytest.mark.parametrize(
    ("copies", "capacity", "expected"),
    [
        ({}, 4, (0, "")),
        ({"t/a": 1, "t/b": 2}, 4, (2, "t/b needs 2 copies, each on a separate pod")),
        ({"t/a": 2, "t/b": 2, "t/c": 1}, 2, (3, "5 copies of adapters, 2 per pod")),
        ({"t/a": 1}, 1, (1, "t/a needs 1 copy, each on a separate pod")),
    ],
)
def test_pods_for_copies(copies: dict[str, int], capacity: int, expected: tuple[int, str]) -> None:
    assert pods_for_copies(copies, capacity) == expected


def pool_once(samples: list[Sample], current: int | None, reason: str = "") -> Decision:
    window = Window()
    for sample in samples:
        window.add(sample, POOL.scale_down_delay_seconds)
    return decide_pods(window, current, POOL, reason, slots=4)


def test_a_pool_grows_for_copies_for_load_and_up_to_its_limit() -> None:
    reason = "t/b needs 2 copies, each on a separate pod"
    assert pool_once([Sample(0.0, 0, floor=2)], 1, reason) == Decision(2, f"{reason}: 2 pods")
    assert pool_once([Sample(0.0, 40, floor=1)], 1, reason) == Decision(
        3, "40 requests running or waiting, 16 per pod: 3 pods"
    )
    assert pool_once([Sample(0.0, 0, floor=5)], 1, reason) == Decision(
        3, f"{reason}: 5 pods, limited to 3 by maxReplicas"
    )


def test_a_pool_keeps_its_pods_for_the_delay_after_copies_left() -> None:
    before = [Sample(float(second), 0, floor=2) for second in range(100)]
    just_left = [*before, Sample(100.0, 0, floor=1)]
    assert pool_once(just_left, 2).replicas == 2
    removed = [*before, *(Sample(float(second), 0, floor=1) for second in range(100, 161))]
    assert pool_once(removed, 2, "t/a needs 1 copy, each on a separate pod") == Decision(
        1, "t/a needs 1 copy, each on a separate pod: 1 pod"
    )


def test_loaded_pods_follow_the_demand_of_the_last_seconds() -> None:
    window = Window()
    window.add(Sample(0.0, 17), 60)
    assert loaded_pods(window, POOL, slots=4) == 2


def test_a_pool_grows_for_active_adapters_that_wait_for_slots() -> None:
    assert pool_once([Sample(0.0, 9, active=9)], 1) == Decision(3, "9 active adapters, 4 per pod: 3 pods")
    assert pool_once([Sample(0.0, 40, active=9)], 1).reason == "40 requests running or waiting, 16 per pod: 3 pods"
    assert pool_once([Sample(0.0, 4, active=4)], 1).replicas == 1
    window = Window()
    window.add(Sample(0.0, 5, active=5), 60)
    assert loaded_pods(window, POOL, slots=4) == 2


def test_a_pool_keeps_its_pods_for_the_delay_after_adapters_were_active() -> None:
    before = [Sample(float(second), 8, active=8) for second in range(100)]
    assert pool_once([*before, Sample(100.0, 1, active=1)], 3) == Decision(
        2, "at most 8 active adapters in the last 60 s, 4 per pod: 2 pods"
    )
