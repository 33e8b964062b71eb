"""Plan of the agent, as a table of situations."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tunesmith.api.parity import ParityMode, ParityVerdict
from tunesmith.contracts.agent import AdapterParity, DesiredAdapter, ResidencyState
from tunesmith_server.residency import (
    COLLECT_SECONDS,
    MAX_LOADS,
    UNLOAD_SECONDS,
    Failure,
    PodObservation,
    PodPlan,
    next_loads,
    plan,
)

A, B, C = (
    DesiredAdapter(engine_name=f"team/{name}@{name * 12}", digest=f"sha256:{name * 64}", uri=f"s3://s/team/{name}")
    for name in "abc"
)
FOLDERS = {adapter.digest: f"/adapters/{adapter.digest[7:]}" for adapter in (A, B, C)}
IDLE = PodObservation(
    now=100.0,
    desired=[A, B],
    folders=FOLDERS,
    downloading=frozenset(),
    failures={},
    engine={},
    in_flight={},
    unwanted_since={},
    max_adapters=2,
)


def holding(*adapters: DesiredAdapter) -> dict[str, str]:
    return {adapter.engine_name: FOLDERS[adapter.digest] for adapter in adapters}


def states(result: PodPlan) -> dict[str, ResidencyState]:
    return {residency.engine_name: residency.state for residency in result.report}


def names(adapters: list[DesiredAdapter]) -> list[str]:
    return [adapter.engine_name for adapter in adapters]


def test_stored_adapters_are_loaded_and_others_downloaded() -> None:
    result = plan(replace(IDLE, folders={A.digest: FOLDERS[A.digest]}))
    assert (result.loads, result.downloads, result.unloads) == ([A], [B], [])
    assert states(result) == {A.engine_name: ResidencyState.LOADING, B.engine_name: ResidencyState.DOWNLOADING}


def test_loaded_adapters_need_no_action() -> None:
    result = plan(replace(IDLE, engine=holding(A, B)))
    assert result.loads == result.downloads == result.unloads == []
    assert set(states(result).values()) == {ResidencyState.RESIDENT}


def test_downloads_continue_while_the_engine_is_down() -> None:
    result = plan(replace(IDLE, engine=None, folders={A.digest: FOLDERS[A.digest]}))
    assert (result.loads, result.downloads) == ([], [B])
    assert states(result) == {A.engine_name: ResidencyState.LOADING, B.engine_name: ResidencyState.DOWNLOADING}


def test_two_names_of_one_artifact_fetch_it_once() -> None:
    twin = A.model_copy(update={"engine_name": f"team/twin@{'a' * 12}"})
    assert plan(replace(IDLE, desired=[A, twin], folders={})).downloads == [A]
    assert plan(replace(IDLE, desired=[A, twin], folders={}, downloading=frozenset({A.digest}))).downloads == []


def test_a_name_with_other_weights_is_unloaded_first() -> None:
    result = plan(replace(IDLE, desired=[A], engine={A.engine_name: "/elsewhere"}))
    assert (result.unloads, result.loads) == ([A.engine_name], [])
    assert states(result) == {A.engine_name: ResidencyState.LOADING}


@pytest.mark.parametrize(
    ("in_flight", "since", "unloads"),
    [
        ({}, 100.0, [C.engine_name]),
        ({C.engine_name: 1}, 100.0, []),
        ({C.engine_name: 1}, 100.1 - UNLOAD_SECONDS, []),
        ({C.engine_name: 1}, 100.0 - UNLOAD_SECONDS, [C.engine_name]),
    ],
)
def test_an_unwanted_adapter_stays_while_it_has_requests(
    in_flight: dict[str, int], since: float, unloads: list[str]
) -> None:
    result = plan(
        replace(IDLE, desired=[A], engine=holding(A, C), in_flight=in_flight, unwanted_since={C.engine_name: since})
    )
    assert result.unloads == unloads
    assert states(result)[C.engine_name] is ResidencyState.UNLOADING


def test_a_new_adapter_waits_for_the_slot_of_an_old_one() -> None:
    result = plan(replace(IDLE, engine=holding(A, C), in_flight={C.engine_name: 1}))
    assert result.loads == []
    assert states(result)[B.engine_name] is ResidencyState.LOADING


def test_more_adapters_than_slots_are_refused_with_a_fix() -> None:
    result = plan(replace(IDLE, desired=[A, B, C]))
    last = result.report[-1]
    assert names(result.loads) == names([A, B])
    assert (last.engine_name, last.state, last.permanent) == (C.engine_name, ResidencyState.FAILED, False)
    assert "registers at most 2 adapters (engine.maxAdapters), and the operator wants 3" in last.message


@pytest.mark.parametrize(
    ("failure", "loads"),
    [
        (Failure("unfit", permanent=True, attempts=1, retry_at=0.0), [B]),
        (Failure("later", permanent=False, attempts=1, retry_at=100.1), [B]),
        (Failure("now", permanent=False, attempts=1, retry_at=100.0), [A, B]),
    ],
)
def test_a_failure_delays_only_its_own_adapter(failure: Failure, loads: list[DesiredAdapter]) -> None:
    result = plan(replace(IDLE, failures={A.engine_name: failure}))
    assert result.loads == loads
    assert (states(result)[A.engine_name] is ResidencyState.FAILED) is (A not in loads)


def test_the_delay_doubles_up_to_a_minute() -> None:
    failure: Failure | None = None
    delays = []
    for _ in range(9):
        failure = Failure.after(failure, "x", permanent=False, now=10.0)
        delays.append(failure.retry_at - 10.0)
    assert delays == [1, 2, 4, 8, 16, 32, 60, 60, 60]


REQUIRED = A.model_copy(update={"parity": ParityMode.REQUIRED})
OFF = A.model_copy(update={"parity": ParityMode.OFF})


@pytest.mark.parametrize(
    ("adapter", "verdict", "expected"),
    [
        (A, None, (ResidencyState.RESIDENT, False)),
        (A, ParityVerdict.FAILED, (ResidencyState.RESIDENT, False)),
        (REQUIRED, None, (ResidencyState.LOADING, False)),
        (REQUIRED, ParityVerdict.UNFINISHED, (ResidencyState.LOADING, False)),
        (REQUIRED, ParityVerdict.PASSED, (ResidencyState.RESIDENT, False)),
        (REQUIRED, ParityVerdict.FAILED, (ResidencyState.FAILED, True)),
        (REQUIRED, ParityVerdict.UNDECIDED, (ResidencyState.FAILED, True)),
        (REQUIRED, ParityVerdict.NOT_RECORDED, (ResidencyState.FAILED, True)),
        (OFF, ParityVerdict.FAILED, (ResidencyState.RESIDENT, False)),
    ],
)
def test_requests_wait_for_required_parity(
    adapter: DesiredAdapter, verdict: ParityVerdict | None, expected: tuple[ResidencyState, bool]
) -> None:
    result = None if verdict is None else AdapterParity(verdict=verdict, message="why")
    parity = {} if result is None else {A.engine_name: result}
    planned = plan(replace(IDLE, desired=[adapter], engine=holding(A), parity=parity))
    assert (planned.loads, planned.unloads) == ([], [])
    [reported] = planned.report
    assert (reported.state, reported.permanent) == expected
    assert reported.parity == (None if adapter is OFF else result)


@pytest.mark.parametrize(
    ("ready", "downloads", "waited", "loaded"),
    [
        pytest.param(1, 0, 0.0, 1, id="nothing else arrives"),
        pytest.param(1, MAX_LOADS - 1, 0.0, 1, id="few others arrive"),
        pytest.param(3, MAX_LOADS, 0.0, 0, id="many others arrive"),
        pytest.param(3, MAX_LOADS, COLLECT_SECONDS, 3, id="others arrive slowly"),
        pytest.param(MAX_LOADS + 2, 100, 0.0, MAX_LOADS, id="a whole group is ready"),
        pytest.param(0, 100, float("-inf"), 0, id="none is ready"),
    ],
)
def test_adapters_are_loaded_in_groups_while_many_arrive(
    ready: int, downloads: int, waited: float, loaded: int
) -> None:
    adapters = [A.model_copy(update={"engine_name": f"team/{number}"}) for number in range(ready)]
    assert list(next_loads(adapters, downloads, waited)) == adapters[:loaded]
