from __future__ import annotations

import random

import pytest

from tunesmith.api.autoscaling import AdapterAutoscaling, PoolAutoscaling
from tunesmith.autoscale.decide import Decision, decide_copies, decide_pods
from tunesmith.autoscale.demand import demand_of
from tunesmith.autoscale.record import read, written
from tunesmith.autoscale.schedule import Minimum
from tunesmith.autoscale.window import Sample, Window

RULE = AdapterAutoscaling(min_replicas=0, max_replicas=8, target_concurrency=3, idle_seconds=20)
POOL = PoolAutoscaling(min_replicas=1, max_replicas=9, target_concurrency=7, scale_down_delay_seconds=30)


def test_every_recorded_decision_is_taken_again_with_the_same_size_and_reason() -> None:
    source = random.Random(3)  # noqa: S311 - not for secrets
    copies, pods, adapter, pool = 0, 1, Window(), Window()
    for second in range(1500):
        burst = 40 if second % 400 < 150 else 0
        demand = demand_of(source.randint(0, 1 + burst), source.randint(0, burst), source.random() * burst, 2.3)
        adapter.add(Sample.of(demand, second * 1.1), RULE.scale_down_delay_seconds)
        pool.add(Sample.of(demand, second * 1.1, floor=copies), POOL.scale_down_delay_seconds)
        low = Minimum(2, "the schedule from 08:00 to 18:00 UTC") if second % 700 > 600 else Minimum(0)
        for name, decision in (
            ("AdapterDeployment team/ä", decide_copies(adapter, copies, RULE, low)),
            ("ServingPool team/p", decide_pods(pool, pods, POOL, Minimum(1), "team/ä needs copies", slots=4)),
        ):
            line = written(name, decision)
            record = read(f"2026-11-30 12:00:00 INFO tunesmith: {line}\n")
            assert record is not None
            assert (record.resource, record.replicas, record.reason) == (name, decision.replicas, decision.reason)
            assert record.inputs == decision.inputs
            assert record.again() == decision
            if decision.inputs is not None and decision.inputs.unit == "copy":
                copies = decision.replicas
            else:
                pods = decision.replicas


def test_a_size_that_is_set_has_no_record_and_other_lines_have_none() -> None:
    assert written("AdapterDeployment team/a", Decision(2, "spec.replicas is 2")) is None
    assert read("2026-11-30 12:00:00 INFO tunesmith: leading\n") is None


def test_a_damaged_record_is_refused() -> None:
    window = Window()
    window.add(Sample(0.0, 0), 10)
    line = written("AdapterDeployment team/a", decide_copies(window, 1, RULE, Minimum(0)))
    assert line is not None
    with pytest.raises(ValueError, match="target"):
        read(line.replace('"target"', '"aim"'))
    with pytest.raises(ValueError, match="inputs"):
        read(line.replace('"inputs"', '"other"'))
    with pytest.raises(ValueError, match=r"Unterminated|Expecting"):
        read(line[:-20])
