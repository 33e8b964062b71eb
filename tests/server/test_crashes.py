"""What the agent remembers of its engine: crashes, start time, use of its models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tunesmith.contracts.agent import DesiredAdapter
from tunesmith.contracts.crash import EngineExit
from tunesmith_server.activity import Activity
from tunesmith_server.crashes import Crashes, StartTime
from tunesmith_server.engine import EngineState

if TYPE_CHECKING:
    from pathlib import Path

NOW = 1_800_000_000.0
DIGEST = "sha256:" + "0" * 64


def report(number: int, at: float = NOW, **fields: Any) -> EngineExit:
    given = {"id": f"{number:016x}", "at": at, "started_at": at - 60, "reason": "killed", "was_ready": True}
    return EngineExit.model_validate({**given, "is_crash": True, **fields})


def state(boot: str, started_at: float = NOW, in_flight: dict[str, int] | None = None, **requests: int) -> EngineState:
    totals = {name: {"requests": n, "promptTokens": 0, "completionTokens": 0} for name, n in requests.items()}
    return EngineState.model_validate(
        {"bootId": boot, "startedAt": started_at, "draining": False, "inFlight": in_flight or {}, "totals": totals}
    )


def test_crashes_outlive_the_agent(tmp_path: Path) -> None:
    crashes = Crashes(tmp_path)
    request = {"digest": "a" * 48, "model": "team/pirate@1"}
    assert crashes.record(report(1, requests=[request]), NOW)
    assert not crashes.record(report(1), NOW)
    assert not crashes.record(report(2, is_crash=False), NOW)
    again = Crashes(tmp_path)
    assert again.total == 1
    assert [crash.model_dump() for crash in again.recent(NOW)] == [
        {"id": f"{1:016x}", "at": NOW, "reason": "killed", "wasReady": True, "requests": [request]}
    ]


def test_an_hour_of_crashes_is_kept_the_total_of_all(tmp_path: Path) -> None:
    crashes = Crashes(tmp_path)
    for number in range(20):
        crashes.record(report(number, at=NOW + number), NOW + number)
    assert [crash.at - NOW for crash in crashes.recent(NOW + 20)] == list(range(4, 20))
    assert len(crashes.recent(NOW + 3600 + 10)) == 9
    assert crashes.recent(NOW + 10_000) == []
    assert crashes.total == 20


def test_a_damaged_record_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "crashes.json").write_text("{")
    crashes = Crashes(tmp_path)
    assert crashes.recent(NOW) == []
    assert crashes.record(report(1), NOW)
    assert Crashes(tmp_path).total == 1


def test_the_start_is_measured_from_the_process_to_the_first_answer() -> None:
    start = StartTime()
    start.observe(state("a", NOW), NOW + 20, ready=True)  # the agent restarted: it did not see the start
    assert start.seconds is None
    start.observe(state("b", NOW + 100), NOW + 120, ready=False)
    start.observe(state("b", NOW + 100), NOW + 131.234, ready=True)
    start.observe(state("b", NOW + 100), NOW + 140, ready=True)
    assert start.seconds == 31.2


@pytest.mark.parametrize("restarted", [False, True])
def test_adapters_used_last_are_loaded_first(restarted: bool) -> None:  # noqa: FBT001
    adapters = [DesiredAdapter(engine_name=name, digest=DIGEST, uri="s3://b/a") for name in "abcd"]
    activity = Activity()
    activity.observe(state("1", c=1), 1.0)
    activity.observe(state("1", in_flight={"d": 1}, c=1), 2.0)
    activity.observe(state("1", b=1, c=1), 3.0)
    if restarted:
        activity.observe(state("2"), 4.0)
    assert [adapter.engine_name for adapter in activity.most_recent_first(adapters)] == ["b", "d", "c", "a"]
    activity.forget_others(["c"])
    assert [adapter.engine_name for adapter in activity.most_recent_first(adapters)] == ["c", "a", "b", "d"]
