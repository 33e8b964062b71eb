from __future__ import annotations

import pytest

from tunesmith.autoscale.demand import DRAIN_SECONDS, Demand, DemandTracker
from tunesmith.contracts.agent import AdapterDemand, GatewayDemand

GATEWAYS = {"g1": "gateway one", "g2": "gateway two"}


def line(**models: tuple[int, int]) -> GatewayDemand:
    return GatewayDemand(
        models={
            f"t/{name}": AdapterDemand(running=running, waiting=waiting) for name, (running, waiting) in models.items()
        }
    )


@pytest.fixture
def first_requests() -> list[str]:
    return []


@pytest.fixture
def tracker(first_requests: list[str]) -> DemandTracker:
    return DemandTracker(silence_seconds=3.0, on_first_requests=first_requests.append)


def test_gateways_are_summed(tracker: DemandTracker) -> None:
    tracker.expect(GATEWAYS, 0.0)
    tracker.record("g1", line(a=(1, 2)), 0.0)
    tracker.record("g2", line(a=(4, 0), b=(1, 0)), 0.0)
    assert tracker.read(["t/a"], 1.0) == Demand(7, complete=True, active=1, running=5, backlog=2.0)
    assert tracker.read(["t/a", "t/b", "t/nobody"], 1.0) == Demand(8, complete=True, active=2, running=6, backlog=2.0)
    assert tracker.unknown_reason(1.0) is None


def test_without_a_gateway_demand_is_unknown(tracker: DemandTracker) -> None:
    assert not tracker.read(["t/a"], 0.0).complete
    assert tracker.unknown_reason(0.0) is None, "the gateways are being listed"
    assert tracker.unknown_reason(10.1) == "no gateway is running"
    tracker.expect({}, 11.0)
    assert tracker.unknown_reason(11.0) == "no gateway is running"


def test_demand_is_incomplete_until_every_gateway_reported(tracker: DemandTracker) -> None:
    tracker.expect(GATEWAYS, 0.0)
    tracker.record("g1", line(a=(1, 0)), 0.0)
    assert tracker.read(["t/a"], 0.0) == Demand(1, complete=False, active=1, running=1)
    assert tracker.unknown_reason(9.0) is None
    tracker.record("g1", line(a=(1, 0)), 10.0)
    assert tracker.unknown_reason(10.1) == "gateway two does not report its requests on port 8081"
    tracker.record_error("g2", "timed out")
    assert tracker.unknown_reason(10.1) == "gateway two does not report its requests on port 8081: timed out"
    assert tracker.silent(10.1) == 1
    assert tracker.unknown_reason(30.0) == "gateway one does not report its requests on port 8081 (and 1 more)"


def test_reports_of_a_silent_gateway_are_ignored(tracker: DemandTracker) -> None:
    tracker.expect({"g1": "gateway one"}, 0.0)
    tracker.record("g1", line(a=(1, 0)), 0.0)
    assert tracker.read(["t/a"], 3.0).complete
    assert tracker.read(["t/a"], 3.1) == Demand(0, complete=False)


def test_a_deleted_gateway_is_ignored(tracker: DemandTracker) -> None:
    tracker.expect(GATEWAYS, 0.0)
    tracker.record("g1", line(a=(1, 0)), 0.0)
    tracker.record("g2", line(a=(5, 0)), 0.0)
    tracker.expect({"g1": "gateway one"}, 0.0)
    tracker.record("g2", line(a=(5, 0)), 0.0)
    assert tracker.read(["t/a"], 0.0) == Demand(1, complete=True, active=1, running=1)


def test_the_first_requests_of_a_model_are_notified(tracker: DemandTracker, first_requests: list[str]) -> None:
    tracker.expect(GATEWAYS, 0.0)
    tracker.record("g1", line(a=(0, 0), b=(0, 1)), 0.0)
    tracker.record("g1", line(a=(2, 0), b=(3, 0)), 0.1)
    assert first_requests == ["t/b", "t/a"]


def measured(running: int, waiting: int, rate: float, seconds: float | None) -> GatewayDemand:
    demand = AdapterDemand(running=running, waiting=waiting, arrival_rate=rate, service_seconds=seconds)
    return GatewayDemand(models={"t/a": demand})


def test_arrivals_times_durations_are_the_offered_load_and_the_backlog_is_drained_over_time(
    tracker: DemandTracker,
) -> None:
    tracker.expect(GATEWAYS, 0.0)
    tracker.record("g1", measured(4, 200, 3.0, 3.0), 0.0)
    tracker.record("g2", measured(2, 100, 1.0, 7.0), 0.0)
    demand = tracker.read(["t/a"], 0.0)
    assert (demand.requests, demand.running, demand.complete) == (306, 6, True)
    assert demand.offered == pytest.approx(3.0 * 3.0 + 1.0 * 7.0)
    assert demand.backlog == pytest.approx(300 * 4.0 / DRAIN_SECONDS), "4 s is the mean over both gateways"


def test_a_restarted_gateway_uses_the_service_time_of_the_others(tracker: DemandTracker) -> None:
    tracker.expect(GATEWAYS, 0.0)
    tracker.record("g1", measured(0, 0, 0.0, 3.0), 0.0)
    tracker.record("g2", measured(0, 30, 2.0, None), 0.0)
    demand = tracker.read(["t/a"], 0.0)
    assert (demand.offered, demand.backlog) == (pytest.approx(6.0), pytest.approx(3.0))


def test_without_a_service_time_each_waiting_request_counts_fully(tracker: DemandTracker) -> None:
    tracker.expect({"g1": "gateway one"}, 0.0)
    tracker.record("g1", measured(0, 30, 2.0, None), 0.0)
    assert tracker.read(["t/a"], 0.0) == Demand(30, complete=True, active=1, backlog=30.0)


def test_a_backlog_of_long_requests_counts_once_each(tracker: DemandTracker) -> None:
    tracker.expect({"g1": "gateway one"}, 0.0)
    tracker.record("g1", measured(2, 5, 0.0, 600.0), 0.0)
    assert tracker.read(["t/a"], 0.0).backlog == 5.0
