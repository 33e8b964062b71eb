"""An agent's event stream: what one end writes, the other end reads, and nothing else."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from pydantic import ValidationError

from tunesmith.contracts.agent import MAX_ADAPTERS, GatewayDemand, PodState, Residency, ResidencyState
from tunesmith.contracts.crash import CrashedRequest, EngineCrash
from tunesmith.contracts.podevents import EventReader, EventWriter, StreamOutOfSyncError


def residency(number: int, state: ResidencyState = ResidencyState.RESIDENT, message: str = "") -> Residency:
    digest = f"{number:064x}"
    return Residency(
        engine_name=f"team/a{number}@{digest[:12]}", digest=f"sha256:{digest}", state=state, message=message
    )


def test_a_stream_is_a_snapshot_then_changes_then_short_heartbeats() -> None:
    writer, reader = EventWriter(), EventReader()
    adapters = [residency(number) for number in range(250)]
    state = PodState(epoch=3, sequence=4, engine_ready=True, adapters=adapters)
    snapshot = writer.line(state)
    assert reader.read(snapshot).names == {entry.engine_name for entry in adapters}
    assert reader.state == state
    heartbeat = writer.line(state)
    kept = reader.state
    assert not reader.read(heartbeat).names
    assert reader.state is kept
    assert len(heartbeat) < 200 < len(snapshot) / 100
    state = state.model_copy(
        update={"adapters": [*adapters[1:], residency(999, ResidencyState.LOADING)], "sequence": 5}
    )
    change = reader.read(writer.line(state))
    assert change.names == {adapters[0].engine_name, residency(999).engine_name}
    assert reader.state.sequence == 5
    assert sorted(reader.state.adapters, key=str) == sorted(state.adapters, key=str)
    assert reader.residency(adapters[0].engine_name) is None


def crash(number: int, requests: int = 0) -> EngineCrash:
    suspects = [CrashedRequest(digest=f"{request:048x}", model="team/a@1") for request in range(requests)]
    return EngineCrash(id=f"{number:016x}", at=float(number), reason="killed", was_ready=True, requests=suspects)


def test_a_crash_is_in_one_line_and_stays_in_the_state() -> None:
    writer, reader = EventWriter(), EventReader()
    state = PodState(engine_crashes=1, crashes=[crash(1)])
    assert reader.read(writer.line(state)).crashes == (crash(1),)
    state = state.model_copy(update={"engine_crashes": 2, "crashes": [crash(1), crash(2, requests=256)]})
    assert reader.read(writer.line(state)).crashes == (crash(2, requests=256),)
    heartbeat = writer.line(state)
    assert reader.read(heartbeat).crashes == ()
    assert len(heartbeat) < 200
    assert reader.state == state
    for number in range(3, 40):
        reader.read(writer.line(state.model_copy(update={"crashes": [crash(number)]})))
    assert [found.at for found in reader.state.crashes] == list(range(24, 40))


def test_random_histories_are_read_as_written() -> None:
    numbers = random.Random(3)  # noqa: S311 - repeatable, no secret
    writer, reader = EventWriter(), EventReader()
    for step in range(500):
        chosen = numbers.sample(range(12), numbers.randrange(12))
        adapters = [
            residency(number, numbers.choice(list(ResidencyState)), str(numbers.randrange(3))) for number in chosen
        ]
        state = PodState(epoch=step, engine_ready=numbers.random() < 0.5, adapters=adapters)
        reader.read(writer.line(state))
        assert reader.state.model_copy(update={"adapters": []}) == state.model_copy(update={"adapters": []})
        assert {entry.engine_name: entry for entry in reader.state.adapters} == {e.engine_name: e for e in adapters}


def test_a_reader_that_missed_a_line_notices() -> None:
    writer, reader = EventWriter(), EventReader()
    reader.read(writer.line(PodState(adapters=[residency(1)])))
    writer.line(PodState(adapters=[residency(1), residency(2)]))
    with pytest.raises(StreamOutOfSyncError, match="digest"):
        reader.read(writer.line(PodState(adapters=[residency(1), residency(2)])))


def test_a_stream_must_begin_with_a_snapshot() -> None:
    writer = EventWriter()
    writer.line(PodState())
    with pytest.raises(StreamOutOfSyncError, match="snapshot"):
        EventReader().read(writer.line(PodState()))


def test_a_pod_cannot_fill_the_readers_memory() -> None:
    writer, reader = EventWriter(), EventReader()
    adapters = [residency(number) for number in range(MAX_ADAPTERS)]
    state = PodState(adapters=adapters)
    reader.read(writer.line(state))
    more = state.model_copy(update={"adapters": [*adapters, residency(MAX_ADAPTERS)]})
    line = writer.line(more)
    with pytest.raises(StreamOutOfSyncError, match=f"more than {MAX_ADAPTERS}"):
        reader.read(line)


GOOD: dict[str, Any] = json.loads(EventWriter().line(PodState(epoch=1, adapters=[residency(1, message="m")])))
BAD: dict[str, Any] = {
    "unknown state": {"changed": [{**GOOD["changed"][0], "state": "Exploded"}]},
    "not a number": {"epoch": float("nan")},
    "infinite": {"epoch": float("inf")},
    "a fraction": {"sequence": 1.5},
    "text for a number": {"sequence": "1"},
    "negative": {"epoch": -1},
    "huge": {"epoch": 2**62},
    "more digits than an int may have": {"epoch": 10**5000},
    "text for a boolean": {"engineReady": "yes"},
    "a number for a boolean": {"engineReady": 1},
    "no digest of a revision": {"changed": [{**GOOD["changed"][0], "digest": "../../etc"}]},
    "a long name": {"changed": [{**GOOD["changed"][0], "engineName": "x" * 300}]},
    "null": {"changed": None},
    "an object for a list": {"changed": {}},
    "too many": {"changed": [GOOD["changed"][0]] * (MAX_ADAPTERS + 1)},
    "no digest": {"residencyDigest": None},
}


@pytest.mark.parametrize("case", BAD)
def test_a_line_outside_the_contract_is_refused_without_repeating_it(case: str) -> None:
    reader = EventReader()
    # json writes NaN and Infinity as Python does; a hostile pod may too.
    text = "1" + "0" * 5000 if case.startswith("more digits") else None
    line = json.dumps({**GOOD, **({"epoch": 0} if text else BAD[case])})
    line = line.replace('"epoch": 0', f'"epoch": {text}') if text else line
    with pytest.raises(ValidationError) as refused:
        reader.read(line.encode())
    assert "Exploded" not in str(refused.value)
    assert "etc" not in str(refused.value)
    assert reader.state == PodState()


@pytest.mark.parametrize("line", [b"", b"x", b"[]", b"null", b"{}", b"[" * 100_000, b"\xff", b'{"a":' * 10_000])
def test_an_invalid_line_is_refused(line: bytes) -> None:
    with pytest.raises((ValidationError, StreamOutOfSyncError)):
        EventReader().read(line)


def test_fields_of_a_later_release_are_ignored() -> None:
    reader = EventReader()
    reader.read(json.dumps({**GOOD, "later": {"a": [1]}}).encode())
    assert reader.header.epoch == 1


def test_a_long_message_is_truncated_by_the_writer() -> None:
    made = residency(1, ResidencyState.FAILED, "x" * 5000)
    assert len(made.message) == 1000
    reader = EventReader()
    reader.read(EventWriter().line(PodState(adapters=[made], problem="y" * 5000)))
    assert reader.state.adapters == [made]
    assert reader.header.problem == "y" * 1000


@pytest.mark.parametrize(
    "models",
    [
        {"team/a": {"running": 10**6 + 1}},
        {"team/a": {"running": -1}},
        {"team/a": {"running": 1.5}},
        {"team/a": {"running": "1"}},
        {"team/a": {"running": float("nan")}},
        {"x" * 300: {"running": 1}},
        {f"team/{number}": {} for number in range(20_001)},
        [],
    ],
    ids=range(8),
)
def test_a_gateways_demand_is_bounded(models: Any) -> None:
    with pytest.raises(ValidationError):
        GatewayDemand.model_validate_json(json.dumps({"models": models}))
