from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from tunesmith.api.autoscaling import AdapterAutoscaling, PoolAutoscaling
from tunesmith.autoscale.decide import (
    Decision,
    decide_copies,
    decide_pods,
    loaded_pods,
    pods_for_copies,
    seconds_until_next,
)
from tunesmith.autoscale.demand import Demand, demand_of
from tunesmith.autoscale.schedule import Minimum
from tunesmith.autoscale.window import Sample, Window

if TYPE_CHECKING:
    from collections.abc import Callable

RULE = AdapterAutoscaling(min_replicas=1, max_replicas=8, target_concurrency=8, scale_down_delay_seconds=120)
TO_ZERO = RULE.model_copy(update={"min_replicas": 0, "idle_seconds": 30, "scale_down_delay_seconds": 10})
POOL = PoolAutoscaling(min_replicas=1, max_replicas=3, target_concurrency=16, scale_down_delay_seconds=60)


def trace(
    load: Callable[[int], int | None],
    seconds: int,
    rule: AdapterAutoscaling = RULE,
    start: int | None = None,
    floor: Callable[[int], int] = lambda _: 0,
) -> list[Decision]:
    """One decision per second; a load of None is a second in which no gateway reported."""
    window, current, decisions = Window(), start, []
    for second in range(seconds):
        requests = load(second)
        sample = Sample(float(second), requests or 0, complete=requests is not None, floor=floor(second))
        window.add(sample, rule.scale_down_delay_seconds)
        decisions.append(decide_copies(window, current, rule, Minimum(rule.min_replicas)))
        current = decisions[-1].replicas
    return decisions


def sizes(load: Callable[[int], int | None], seconds: int, rule: AdapterAutoscaling = RULE) -> list[int]:
    return [decision.replicas for decision in trace(load, seconds, rule)]


def reversals(values: list[int]) -> int:
    """Number of changes of direction."""
    changes = [later - earlier for earlier, later in pairwise(values) if later != earlier]
    return sum(1 for before, after in pairwise(changes) if (before > 0) != (after > 0))


def test_a_steep_rise_adds_copies_within_six_seconds() -> None:
    found = sizes(lambda second: 24 if second >= 100 else 0, 200)
    assert found[100] == 1
    assert found[106] == 3
    assert set(found[106:]) == {3}


def test_a_slow_rise_follows_the_mean_of_the_last_minute() -> None:
    found = sizes(lambda second: 12 if second >= 100 else 8, 200)
    assert found[110] == 2, "a minute's mean above the target"
    assert set(found[:100]) == {1}


def test_copies_are_removed_after_the_delay_at_most_half_at_a_time() -> None:
    found = sizes(lambda second: 64 if second < 100 else 0, 400)
    assert found[99] == 8
    assert set(found[99:210]) == {8}
    assert found[-1] == 1
    falls = [(second, found[second]) for second in range(1, 400) if found[second] < found[second - 1]]
    assert len(falls) >= 3
    assert all(later - earlier >= 10 and low >= high / 2 for (earlier, high), (later, low) in pairwise(falls))


@pytest.mark.parametrize(
    ("load", "most"),
    [
        (lambda second: 40 if second >= 300 else 4, 0),
        (lambda second: 40 if 300 <= second < 600 else 4, 1),
        (lambda second: second // 15, 0),
        (lambda second: 40 - second // 15 if second < 600 else 0, 1),
        (lambda second: (second % 300) // 6, 8),
        (lambda second: 60 if 300 <= second < 320 else 2, 1),
        (lambda second: 32 if second % 40 < 20 else 0, 0),
    ],
    ids=[
        "step",
        "step and back",
        "ramp",
        "fall",
        "four teeth of a saw",
        "flash crowd",
        "square wave shorter than the delay",
    ],
)
def test_a_change_of_load_causes_at_most_one_reversal(load: Callable[[int], int], most: int) -> None:
    found = sizes(load, 1200)
    assert reversals(found) <= most
    assert max(found) == max(1, min(8, max(found)))


def test_nothing_shrinks_while_gateways_are_silent() -> None:
    assert set(sizes(lambda second: 24 if second < 70 else None, 600)[10:]) == {3}


def test_without_a_delay_an_unknown_demand_still_removes_nothing() -> None:
    window = Window()
    window.add(Sample(0.0, 0, complete=False), 0)
    assert decide_copies(window, 2, RULE.model_copy(update={"scale_down_delay_seconds": 0}), Minimum(1)).replicas == 2


def test_after_silence_a_complete_delay_must_be_observed() -> None:
    found = sizes(lambda second: None if second == 400 else (24 if second < 70 else 0), 600, RULE)
    assert found[399] == 1
    late = sizes(lambda second: None if second == 200 else (24 if second < 150 else 0), 600)
    assert set(late[160:319]) == {3}
    assert late[-1] == 1


def test_a_partial_view_may_grow() -> None:
    window = Window()
    window.add(Sample(0.0, 40, complete=False), 60)
    assert decide_copies(window, 1, RULE, Minimum(1)).replicas == 5


def test_nothing_shrinks_after_unobserved_time_or_a_restart() -> None:
    window, found = Window(), {}
    for second in [*range(200), *range(300, 600)]:
        window.add(Sample(float(second), 0), 120)
        found[second] = decide_copies(window, 3, RULE, Minimum(1)).replicas
    assert {found[second] for second in range(120)} == {3}, "the window begins when the operator starts"
    assert found[120] == 2
    assert {found[second] for second in range(300, 419)} == {3}
    assert 2 in {found[second] for second in range(420, 600)}


def test_a_longer_delay_applies_to_time_that_was_not_kept() -> None:
    window = Window()
    for second in range(100):
        window.add(Sample(float(second), 0), 10)
    window.add(Sample(100.0, 0), 120)
    assert decide_copies(window, 3, RULE, Minimum(1)).replicas == 3


def test_an_idle_adapter_loses_its_last_copy_and_the_next_request_brings_it_back() -> None:
    decisions = trace(lambda second: 1 if second < 50 or second == 200 else 0, 300, TO_ZERO)
    found = [decision.replicas for decision in decisions]
    assert set(found[:79]) == {1}
    assert decisions[79] == Decision(0, "no request for 30 s: 0 copies")
    assert set(found[79:200]) == {0}
    assert found[200] == 1, "at once"
    assert set(found[200:230]) == {1}
    assert found[230] == 0


def test_the_last_copy_stays_while_demand_is_unknown() -> None:
    assert set(sizes(lambda second: 1 if second < 50 else None, 300, TO_ZERO)) == {1}


def test_a_new_revision_is_loaded_once_even_if_nobody_asks() -> None:
    decisions = trace(lambda _: 0, 200, TO_ZERO, start=0, floor=lambda second: 1 if 50 <= second < 60 else 0)
    found = [decision.replicas for decision in decisions]
    assert (found[49], found[50], found[59]) == (0, 1, 1)
    assert decisions[50].reason == "a new revision is loaded and rolled out without requests too: 1 copy"
    assert found[-1] == 0


def test_a_size_grows_at_most_tenfold_at_a_time() -> None:
    rule = RULE.model_copy(update={"max_replicas": 1000, "target_concurrency": 1})
    found = sizes(lambda _: 500, 30, rule)
    assert (found[0], found[1]) == (10, 100)
    assert max(found) == 500


def once(requests: int, current: int | None, rule: AdapterAutoscaling = RULE, *, seconds: int = 300) -> Decision:
    window = Window()
    for at in range(seconds + 1):
        window.add(Sample(float(at), requests), rule.scale_down_delay_seconds)
    return decide_copies(window, current, rule, Minimum(rule.min_replicas))


@pytest.mark.parametrize(
    ("requests", "current", "replicas", "reason"),
    [
        (24, 2, 3, "24 requests running or waiting on average over 60 s, 8 per copy: 3 copies"),
        (
            100,
            7,
            8,
            "100 requests running or waiting on average over 60 s, 8 per copy: 13 copies, limited to 8 by maxReplicas",
        ),
        (1, 1, 1, "1 request running or waiting on average over 60 s, 8 per copy: 1 copy"),
        (0, None, 1, "0 requests running or waiting on average over 60 s, 8 per copy: 1 copy"),
        (
            3,
            2,
            1,
            "at most 3 requests running or waiting on average over 60 s in the last 120 s, 8 per copy: 1 copy",
        ),
    ],
)
def test_the_reason_is_a_sentence(requests: int, current: int | None, replicas: int, reason: str) -> None:
    assert once(requests, current) == Decision(replicas, reason)


def test_the_reason_names_the_schedule_and_the_missing_demand() -> None:
    window = Window()
    window.add(Sample(0.0, 0), 120)
    low = Minimum(2, "the schedule from 08:00 to 18:00 UTC")
    assert decide_copies(window, 1, RULE, low) == Decision(
        2,
        "0 requests running or waiting on average over 60 s, 8 per copy: 1 copy, raised to 2 by the schedule from "
        "08:00 to 18:00 UTC",
    )
    assert decide_copies(window, 3, RULE, Minimum(1)).reason == (
        "0 requests running or waiting on average over 60 s, 8 per copy; nothing shrinks until demand has been "
        "known for 120 s: 3 copies"
    )


def test_changed_limits_apply_immediately() -> None:
    assert once(0, 4, RULE.model_copy(update={"max_replicas": 2}), seconds=1).replicas == 2
    assert once(0, 1, RULE.model_copy(update={"min_replicas": 3}), seconds=1).replicas == 3


def test_sizes_stay_within_the_limits_and_shrink_only_after_a_known_delay() -> None:
    random_source = random.Random(5)  # noqa: S311 - not for secrets
    for _ in range(40):
        rule = AdapterAutoscaling(
            min_replicas=random_source.randint(0, 2),
            max_replicas=random_source.randint(2, 9),
            target_concurrency=random_source.randint(1, 9),
            scale_down_delay_seconds=random_source.choice([0, 5, 60, 120]),
            idle_seconds=random_source.choice([10, 60]),
        )
        window, current, at, known_since = Window(), None, 0.0, 0.0
        for _ in range(600):
            gap = random_source.choice([0.5, 1.0, 1.0, 1.0, 9.0, 30.0])
            at += gap
            complete = random_source.random() > 0.05
            known_since = at if gap > 10.0 or not complete or at == gap else known_since
            requests = random_source.choice([0, 0, 0, 1, 30, 200])
            window.add(Sample(at, requests, complete), rule.scale_down_delay_seconds)
            decision = decide_copies(window, current, rule, Minimum(rule.min_replicas))
            assert rule.min_replicas <= decision.replicas <= rule.max_replicas
            assert decision.replicas >= min(requests, 1)
            if current is not None and decision.replicas < current:
                assert at - known_since >= rule.scale_down_delay_seconds
            if decision.replicas == 0 and current:
                assert at - known_since >= rule.idle_seconds
            current = decision.replicas


def test_means_are_weighted_by_time() -> None:
    window, steps = Window(), []
    random_source, at = random.Random(1), 0.0  # noqa: S311 - not for secrets
    for _ in range(500):
        at += random_source.choice([0.5, 1.0, 7.0])
        steps.append((at, random_source.randint(0, 20)))
        window.add(Sample(*steps[-1]), 120)
        for seconds, mean in ((60.0, window.stable.load), (6.0, window.panic.load)):
            start = max(steps[0][0], at - seconds)
            ends = [*(step[0] for step in steps[1:]), at]
            held = sum(
                value * max(0.0, end - max(begin, start)) for (begin, value), end in zip(steps, ends, strict=True)
            )
            expected = held / (at - start) if at > start else steps[-1][1]
            assert math.isclose(mean, expected, abs_tol=1e-6)


@pytest.mark.parametrize(
    ("copies", "capacity", "expected"),
    [
        ({}, 4, (0, "")),
        ({"t/a": 0}, 4, (0, "")),
        ({"t/a": 1, "t/b": 2}, 4, (2, "t/b needs 2 copies, each on a separate pod")),
        ({"t/a": 2, "t/b": 2, "t/c": 1}, 2, (3, "5 copies of adapters, 2 per pod")),
        ({"t/a": 1}, 1, (1, "t/a needs 1 copy, each on a separate pod")),
    ],
)
def test_pods_for_copies(copies: dict[str, int], capacity: int, expected: tuple[int, str]) -> None:
    assert pods_for_copies(copies, capacity) == expected


def pool_once(samples: list[Sample], current: int | None, reason: str = "", rule: PoolAutoscaling = POOL) -> Decision:
    window = Window()
    for sample in samples:
        window.add(sample, rule.scale_down_delay_seconds)
    return decide_pods(window, current, rule, Minimum(rule.min_replicas), reason, slots=4)


def test_a_pool_grows_for_copies_for_load_and_up_to_its_limit() -> None:
    reason = "t/b needs 2 copies, each on a separate pod"
    assert pool_once([Sample(0.0, 0, floor=2)], 1, reason) == Decision(2, f"{reason}: 2 pods")
    assert pool_once([Sample(0.0, 40, floor=1)], 1, reason) == Decision(
        3, "40 requests running or waiting on average over 60 s, 16 per pod: 3 pods"
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


def test_an_idle_pool_loses_its_last_pod_unless_an_adapter_needs_it() -> None:
    rule = POOL.model_copy(update={"min_replicas": 0, "idle_seconds": 90})
    idle = [Sample(float(second), 0) for second in range(91)]
    assert pool_once(idle[:-1], 1, rule=rule).replicas == 1
    assert pool_once(idle, 1, rule=rule) == Decision(0, "no request for 90 s: 0 pods")
    assert pool_once([Sample(float(second), 0, floor=1) for second in range(91)], 1, rule=rule).replicas == 1
    assert pool_once([Sample(0.0, 1)], 0, rule=rule).replicas == 1


def test_loaded_pods_follow_the_demand_of_the_last_seconds() -> None:
    window = Window()
    window.add(Sample(0.0, 17), 60)
    assert loaded_pods(window, POOL, slots=4) == 2


def test_a_pool_grows_for_active_adapters_that_wait_for_slots() -> None:
    assert pool_once([Sample(0.0, 9, active=9)], 1) == Decision(
        3, "9 active adapters on average over 60 s, 4 per pod: 3 pods"
    )
    assert "40 requests" in pool_once([Sample(0.0, 40, active=9)], 1).reason
    assert pool_once([Sample(0.0, 4, active=4)], 1).replicas == 1
    window = Window()
    window.add(Sample(0.0, 5, active=5), 60)
    assert loaded_pods(window, POOL, slots=4) == 2


def starting_pool(seconds: int, service_seconds: float, *, known: bool = True) -> list[int]:
    """Pods of a pool that gets 5 requests per second of `service_seconds` each, and whose pods take 90 s to start."""
    rule = POOL.model_copy(update={"min_replicas": 0, "max_replicas": 50})
    window, pods, started, waiting, running, found = Window(), 0, {}, 0.0, 0.0, []
    for second in range(seconds):
        ready = sum(1 for at in started.values() if at <= second)
        done = running / service_seconds
        admitted = min(waiting + 5.0, ready * 16 - running + done)
        waiting, running = waiting + 5.0 - max(0.0, admitted), running - done + max(0.0, admitted)
        demand = demand_of(round(running), round(waiting), 5.0, service_seconds if known else None)
        window.add(Sample.of(demand, float(second)), rule.scale_down_delay_seconds)
        pods = decide_pods(window, pods, rule, Minimum(0), "", slots=8).replicas
        started = {pod: started.get(pod, second + 90) for pod in range(pods)}
        found.append(pods)
    return found


def test_requests_that_wait_for_a_start_do_not_each_need_a_place() -> None:
    assert max(starting_pool(600, 2.0)) <= 4, "10 requests at once need one pod, and three drain the backlog"
    assert max(starting_pool(600, 2.0, known=False)) > 20
    assert starting_pool(600, 2.0)[-1] == 1
    assert max(starting_pool(600, 12.8)) <= 20, "64 requests at once need four pods"
    assert starting_pool(600, 12.8)[-1] in {4, 5}


def test_short_requests_that_no_sample_sees_keep_an_adapter() -> None:
    window, current = Window(), 1
    for second in range(200):
        window.add(Sample.of(demand_of(0, 0, 0.5, 0.05), float(second)), TO_ZERO.scale_down_delay_seconds)
        current = decide_copies(window, current, TO_ZERO, Minimum(0)).replicas
    assert current == 1


@pytest.mark.parametrize(
    ("demand", "copies", "seconds"),
    [
        (demand_of(0, 0, 0.0, None), 0, 9.0),
        (demand_of(0, 0, 0.0, None), 1, 9.0),
        (demand_of(0, 0, 0.0, None), 2, 1.0),
        (demand_of(3, 0, 0.0, None), 1, 3.0),
        (demand_of(3, 2, 0.0, None), 1, 1.0),
        (demand_of(0, 0, 0.5, 20.0), 1, 1.0),
        (demand_of(0, 1, 0.0, None), 0, 1.0),
    ],
)
def test_adapters_are_decided_as_often_as_something_may_change(demand: Demand, copies: int, seconds: float) -> None:
    window = Window()
    window.add(Sample.of(demand, 0.0), 10)
    assert seconds_until_next(window, copies, TO_ZERO, Minimum(0)) == seconds


def test_the_last_copy_is_decided_when_its_idle_time_ends() -> None:
    window = Window()
    for second in (0.0, 9.0, 18.0, 27.0):
        window.add(Sample(second, 0), 10)
    assert seconds_until_next(window, 1, TO_ZERO, Minimum(0)) == 3.0
