"""Measured traffic: quantiles, differences of snapshots, and their way through the event streams."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
from pydantic import ValidationError

from tests.serving.test_pod_events import residency
from tunesmith.autoscale.demand import DemandTracker
from tunesmith.contracts.agent import GatewayDemand, PodState
from tunesmith.contracts.podevents import EventReader, EventWriter
from tunesmith.contracts.traffic import (
    BOUND_COUNT,
    BOUNDS_SECONDS,
    MAX_TRAFFIC_PER_LINE,
    Comparison,
    Traffic,
    TrafficCounts,
    TrafficPeriod,
    bucket_of,
    quantile,
    served_between,
    shadow_between,
)


@pytest.mark.parametrize("scale", [0.002, 0.03, 0.4, 7.0])
def test_a_quantile_is_within_15_percent(scale: float) -> None:
    numbers = random.Random(scale)  # noqa: S311 - repeatable, no secret
    seconds = sorted(scale * numbers.lognormvariate(0, 0.8) for _ in range(2000))
    found = quantile(Counter(map(bucket_of, seconds)), 0.95)
    assert found == pytest.approx(seconds[1899], rel=0.15)


def test_the_ends_of_the_scale() -> None:
    assert quantile({}, 0.95) is None
    assert bucket_of(0.0) == 0
    assert bucket_of(BOUNDS_SECONDS[7]) == 7
    assert bucket_of(1e6) == BOUND_COUNT
    assert quantile({BOUND_COUNT: 1}, 0.95) == BOUNDS_SECONDS[-1]
    assert 0 < (quantile({0: 5}, 0.5) or 0) <= BOUNDS_SECONDS[0]


def served(requests: int, errors: int, *buckets: int, start: str = "a1") -> Traffic:
    counts = TrafficCounts(requests=requests, errors=errors, first_token=dict(Counter(buckets)))
    return Traffic(start=start, served=counts)


def test_a_period_is_the_difference_of_two_snapshots() -> None:
    period = served_between(served(100, 1, 10, 10, 20), served(200, 6, 10, 10, 20, 30))
    assert (period.requests, period.error_rate, period.first_token) == (100, 0.05, {30: 1})
    assert period.first_token_p95 == pytest.approx(BOUNDS_SECONDS[30], rel=0.15)
    assert period.per_output_token_p95 is None
    assert not period.restarted
    assert shadow_between(served(100, 1), served(200, 6)).error_rate is None
    assert served_between(None, served(5, 0)).requests == 5


@pytest.mark.parametrize(
    "after", [served(3, 1, 10, start="b2"), served(3, 1, 10), served(300, 1), served(300, 0, 10, 10)], ids=range(4)
)
def test_a_restarted_counter_is_reported_and_counts_from_zero(after: Traffic) -> None:
    period = served_between(served(100, 1, 10, 10), after)
    assert period.restarted
    assert (period.requests, period.errors) == (after.served.requests, after.served.errors)


def test_periods_of_several_pods_add_up() -> None:
    periods = [served_between(None, served(10, 1, 5)), served_between(served(9, 9), served(30, 2, 5, 6))]
    total = TrafficPeriod.total(periods)
    assert (total.requests, total.errors, total.first_token, total.restarted) == (40, 3, {5: 2, 6: 1}, True)
    assert TrafficPeriod.total([]).error_rate is None


def test_traffic_is_sent_only_to_readers_that_want_it_and_only_when_it_changes() -> None:
    entries = [residency(1), residency(2)]
    state = PodState(adapters=entries, traffic={entries[0].engine_name: served(1, 0, 3), "team/gone": served(1, 0)})
    with_traffic, plain, reader = EventWriter(traffic=True), EventWriter(), EventReader()
    reader.read(with_traffic.line(state))
    assert reader.state.traffic == {entries[0].engine_name: served(1, 0, 3)}
    assert b"traffic" not in plain.line(state)
    assert b"traffic" not in with_traffic.line(state)
    state = state.model_copy(update={"traffic": {**state.traffic, entries[1].engine_name: served(7, 7)}})
    line = with_traffic.line(state)
    assert entries[0].engine_name.encode() not in line
    reader.read(line)
    assert reader.state.traffic == {entries[0].engine_name: served(1, 0, 3), entries[1].engine_name: served(7, 7)}
    reader.read(with_traffic.line(PodState(adapters=entries[1:], traffic=state.traffic)))
    assert reader.state.traffic == {entries[1].engine_name: served(7, 7)}


def test_a_line_carries_a_bounded_part_of_the_traffic_and_each_revision_gets_its_turn() -> None:
    entries = [residency(number) for number in range(2 * MAX_TRAFFIC_PER_LINE)]
    writer, reader = EventWriter(traffic=True), EventReader()
    for requests in (1, 2, 3, 4):
        traffic = {entry.engine_name: served(requests, 0) for entry in entries}
        line = writer.line(PodState(adapters=entries, traffic=traffic))
        assert len(json.loads(line)["traffic"]) == MAX_TRAFFIC_PER_LINE
        reader.read(line)
    counts = Counter(found.served.requests for found in reader.state.traffic.values())
    assert counts == {3: MAX_TRAFFIC_PER_LINE, 4: MAX_TRAFFIC_PER_LINE}


@pytest.mark.parametrize(
    "traffic",
    [
        {"start": "a", "served": {"requests": -1}},
        {"start": "a", "served": {"requests": 1.5}},
        {"start": "a", "served": {"requests": 2**60}},
        {"start": "a", "served": {"firstToken": {"65": 1}}},
        {"start": "a", "served": {"firstToken": {"-1": 1}}},
        {"start": "a", "served": {"firstToken": {"x": 1}}},
        {"start": "a" * 33},
        {"start": "<script>"},
        {},
    ],
    ids=range(9),
)
def test_traffic_outside_the_contract_is_refused(traffic: dict[str, object]) -> None:
    line = json.loads(EventWriter().line(PodState(adapters=[residency(1)])))
    with pytest.raises(ValidationError):
        EventReader().read(json.dumps({**line, "traffic": {"team/a": traffic}}).encode())


def test_the_operator_keeps_the_latest_comparison_of_each_gateway() -> None:
    tracker, name = DemandTracker(3.0), "team/a@1"
    tracker.expect({"g1": "gateway-1", "g2": "gateway-2"}, 0.0)
    tracker.record("g1", GatewayDemand(comparisons={name: Comparison(start="aa", answers=1)}), 1.0)
    tracker.record("g1", GatewayDemand(comparisons={name: Comparison(start="aa", answers=2)}), 2.0)
    tracker.record("g1", GatewayDemand(), 3.0)
    tracker.record("g2", GatewayDemand(comparisons={name: Comparison(start="bb", answers=5)}), 3.0)
    assert {uid: found.answers for uid, found in tracker.comparisons(name).items()} == {"g1": 2, "g2": 5}
    assert tracker.comparisons("team/other") == {}
    tracker.expect({"g2": "gateway-2"}, 4.0)
    assert list(tracker.comparisons(name)) == ["g2"]


def test_a_comparison_since_an_earlier_one() -> None:
    before = Comparison(start="aa", answers=10, shadow_tokens=100, logprob_answers=2, shadow_logprob=-1.0)
    after = Comparison(start="aa", answers=15, shadow_tokens=180, logprob_answers=4, shadow_logprob=-2.5)
    since = after.since(before)
    assert (since.answers, since.shadow_tokens, since.shadow_logprob) == (5, 80, -1.5)
    assert after.since(None) == after
    assert after.since(before.model_copy(update={"start": "bb"})) == after
