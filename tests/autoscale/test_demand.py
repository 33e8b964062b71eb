from __future__ import annotations

import pytest

from tunesmith.autoscale.demand import Demand, DemandBoard
from tunesmith.contracts.agent import AdapterDemand, GatewayDemand

GATEWAYS = {"g1": "gateway one", "g2": "gateway two"}


def line(**models: tuple[int, int]) -> GatewayDemand:
    return GatewayDemand(
        models={
            f"t/{name}": AdapterDemand(running=running, waiting=waiting) for name, (running, waiting) in models.items()
        }
    )


@pytest.fixture
def rises() -> list[str]:
    return []


@pytest.fixture
def board(rises: list[str]) -> DemandBoard:
    return DemandBoard(silence_seconds=3.0, rises=rises.append)


def test_gateways_are_summed(board: DemandBoard) -> None:
    board.expect(GATEWAYS, 0.0)
    board.record("g1", line(a=(1, 2)), 0.0)
    board.record("g2", line(a=(4, 0), b=(1, 0)), 0.0)
    assert board.read(["t/a"], 1.0) == Demand(7, complete=True)
    assert board.read(["t/a", "t/b", "t/nobody"], 1.0) == Demand(8, complete=True)
    assert board.missing(1.0) is None


def test_without_a_gateway_nothing_is_known(board: DemandBoard) -> None:
    assert not board.read(["t/a"], 0.0).complete
    assert board.missing(0.0) is None, "the gateways are being listed"
    assert board.missing(10.1) == "no gateway is running"
    board.expect({}, 11.0)
    assert board.missing(11.0) == "no gateway is running"


def test_a_gateway_that_was_never_heard_makes_it_incomplete(board: DemandBoard) -> None:
    board.expect(GATEWAYS, 0.0)
    board.record("g1", line(a=(1, 0)), 0.0)
    assert board.read(["t/a"], 0.0) == Demand(1, complete=False)
    assert board.missing(9.0) is None
    board.record("g1", line(a=(1, 0)), 10.0)
    assert board.missing(10.1) == "gateway two does not report its requests on port 8081"
    board.fail("g2", "timed out")
    assert board.missing(10.1) == "gateway two does not report its requests on port 8081: timed out"
    assert board.silent(10.1) == 1
    assert board.missing(30.0) == "gateway one does not report its requests on port 8081 (1 more as well)"


def test_silence_forgets_the_figures(board: DemandBoard) -> None:
    board.expect({"g1": "gateway one"}, 0.0)
    board.record("g1", line(a=(1, 0)), 0.0)
    assert board.read(["t/a"], 3.0).complete
    assert board.read(["t/a"], 3.1) == Demand(0, complete=False)


def test_a_gateway_that_left_does_not_count(board: DemandBoard) -> None:
    board.expect(GATEWAYS, 0.0)
    board.record("g1", line(a=(1, 0)), 0.0)
    board.record("g2", line(a=(5, 0)), 0.0)
    board.expect({"g1": "gateway one"}, 0.0)
    board.record("g2", line(a=(5, 0)), 0.0)
    assert board.read(["t/a"], 0.0) == Demand(1, complete=True)


def test_the_first_requests_of_a_model_are_told(board: DemandBoard, rises: list[str]) -> None:
    board.expect(GATEWAYS, 0.0)
    board.record("g1", line(a=(0, 0), b=(0, 1)), 0.0)
    board.record("g1", line(a=(2, 0), b=(3, 0)), 0.1)
    assert rises == ["t/b", "t/a"]
