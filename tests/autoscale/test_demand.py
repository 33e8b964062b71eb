from __future__ import annotations

import pytest

from tunesmith.autoscale.demand import DemandBoard
from tunesmith.contracts.agent import AdapterDemand, GatewayDemand


def line(**models: tuple[int, int]) -> GatewayDemand:
    return GatewayDemand(
        models={
            f"t/{name}": AdapterDemand(running=running, waiting=waiting) for name, (running, waiting) in models.items()
        }
    )


@pytest.fixture
def board() -> DemandBoard:
    return DemandBoard(silence_seconds=3.0)


def test_gateways_are_summed(board: DemandBoard) -> None:
    board.expect(["g1", "g2"])
    board.record("g1", line(a=(1, 2)), 0.0)
    board.record("g2", line(a=(4, 0), b=(1, 0)), 0.0)
    demand = board.read(1.0)
    assert demand.complete
    assert demand.models == {"t/a": 7, "t/b": 1}
    assert demand.of(["t/a", "t/b", "t/nobody"]) == 8


def test_without_a_gateway_nothing_is_known(board: DemandBoard) -> None:
    assert not board.read(0.0).complete


def test_a_gateway_that_was_never_heard_makes_it_incomplete(board: DemandBoard) -> None:
    board.expect(["g1", "g2"])
    board.record("g1", line(a=(1, 0)), 0.0)
    demand = board.read(0.0)
    assert not demand.complete
    assert demand.models == {"t/a": 1}


def test_silence_forgets_the_figures(board: DemandBoard) -> None:
    board.expect(["g1"])
    board.record("g1", line(a=(1, 0)), 0.0)
    assert board.read(3.0).complete
    late = board.read(3.1)
    assert not late.complete
    assert late.models == {}


def test_a_gateway_that_left_does_not_count(board: DemandBoard) -> None:
    board.expect(["g1", "g2"])
    board.record("g1", line(a=(1, 0)), 0.0)
    board.record("g2", line(a=(5, 0)), 0.0)
    board.expect(["g1"])
    board.record("g2", line(a=(5, 0)), 0.0)
    demand = board.read(0.0)
    assert demand.complete
    assert demand.models == {"t/a": 1}
