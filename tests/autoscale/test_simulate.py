from __future__ import annotations

import math
from datetime import UTC, datetime

import pytest

from tunesmith.api.autoscaling import AdapterAutoscaling, PoolAutoscaling
from tunesmith.autoscale.policies import Fixed, Hpa, Tunesmith
from tunesmith.autoscale.simulate import Arrival, Timing, simulate

START = datetime(2026, 11, 30, tzinfo=UTC)
TIMING = Timing(start_seconds=30.0, load_seconds=2.0, concurrency=4, capacity=8, slots=8, gpus=2)
POOL = PoolAutoscaling(min_replicas=1, max_replicas=6, target_concurrency=4, scale_down_delay_seconds=60)
TO_ZERO = AdapterAutoscaling(min_replicas=0, max_replicas=6, target_concurrency=4, idle_seconds=60)


def steady(model: str, rate: float, seconds: float, *, since: float = 0.0, each: float = 2.0) -> list[Arrival]:
    return [Arrival(since + number / rate, model, each) for number in range(int(rate * seconds))]


def operator(*models: str, pool: PoolAutoscaling = POOL, rule: AdapterAutoscaling = TO_ZERO) -> Tunesmith:
    return Tunesmith(START, pool, dict.fromkeys(models, rule), TIMING)


def test_a_fixed_pool_costs_its_size_and_waits_for_the_start_only() -> None:
    outcome = simulate(steady("a", 1.0, 600), Fixed(2, ["a"]), TIMING, seconds=3600)
    assert outcome.gpu_hours == pytest.approx(2 * 2.0)
    assert outcome.waits[-1] == pytest.approx(32.0), "the pods start and load the adapter"
    assert outcome.wait(0.9) < 32.0
    assert (outcome.unserved, outcome.changes, outcome.sizes) == (0, 0, [(0.0, 2)])


def test_a_pool_that_is_too_small_lets_requests_wait_in_their_order() -> None:
    outcome = simulate(steady("a", 4.0, 300), Fixed(1, ["a"]), TIMING)
    assert outcome.wait(1.0) > 100, "8 requests at once on a pod that computes 4"
    assert outcome.unserved > 0


def test_the_operators_decisions_follow_the_load_and_cost_less_than_the_peak() -> None:
    trace = [*steady("a", 0.2, 7200), *steady("a", 6.0, 600, since=3600)]
    trace.sort(key=lambda arrival: arrival.at)
    scaled = simulate(trace, operator("a"), TIMING)
    peak = max(size for _, size in scaled.sizes)
    assert peak >= 3
    assert scaled.sizes[-1][1] == 1
    fixed = simulate(trace, Fixed(peak, ["a"]), TIMING)
    assert scaled.gpu_hours < 0.6 * fixed.gpu_hours
    assert (scaled.unserved, fixed.unserved) == (0, 0)


def test_a_request_for_an_idle_adapter_waits_for_its_load_and_for_an_idle_pool_for_its_start() -> None:
    warm = simulate([Arrival(0.0, "b", 1.0), Arrival(500.5, "a", 1.0)], operator("a", "b"), TIMING, seconds=600)
    assert warm.waits[0] == pytest.approx(2.0)
    zero = POOL.model_copy(update={"min_replicas": 0, "idle_seconds": 60})
    trace = [Arrival(0.5, "a", 1.0), Arrival(900.5, "a", 1.0)]
    cold = simulate(trace, operator("a", pool=zero), TIMING, seconds=1000)
    assert list(cold.waits) == pytest.approx([32.0, 32.0])
    assert 0 in {size for _, size in cold.sizes}


def test_an_hpa_follows_the_requests_per_pod() -> None:
    trace = [*steady("a", 0.5, 3600), *steady("a", 6.0, 900, since=600)]
    trace.sort(key=lambda arrival: arrival.at)
    outcome = simulate(trace, Hpa(4, 1, 6, ["a"]), TIMING)
    assert max(size for _, size in outcome.sizes) >= 3
    assert outcome.sizes[-1][1] == 1
    assert outcome.unserved == 0


def test_a_pod_that_leaves_finishes_its_requests() -> None:
    long = [Arrival(0.0, "a", 500.0), *steady("a", 4.0, 100, each=1.0)]
    outcome = simulate(long, operator("a"), TIMING, seconds=1200)
    assert len(outcome.waits) == len(long)
    assert outcome.unserved == 0


def test_schedules_use_the_time_of_the_trace() -> None:
    day = {"min_replicas": 3, "start": "00:10", "end": "00:20"}
    pool = PoolAutoscaling.model_validate({**POOL.model_dump(), "schedules": [day]})
    outcome = simulate([Arrival(0.0, "a", 1.0)], operator("a", pool=pool), TIMING, seconds=1800)
    assert [size for at, size in outcome.sizes if at == 600.0] == [3]
    assert outcome.sizes[-1][1] == 1
    assert math.isclose(outcome.gpu_hours, 2 * (1800 + 2 * 600) / 3600, rel_tol=0.25)
