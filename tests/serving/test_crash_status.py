"""Crashes of engines in a pool's status, condition and Events."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest

from tunesmith.api.conditions import find
from tunesmith.api.servingpool import ServingPoolStatus
from tunesmith.autoscale.decide import Decision
from tunesmith.contracts.crash import CrashedRequest, EngineCrash
from tunesmith.serving.crashes import crash_events, crash_status
from tunesmith.serving.pod import PoolPod, current_problem
from tunesmith.serving.pool import PoolObservation, plan

if TYPE_CHECKING:
    from collections.abc import Callable

    from tunesmith.api.servingpool import ServingPool

MODEL = "team/pirate@aaaaaaaaaaaa"
REASON = "killed by SIGKILL"
_numbers = count()


@pytest.fixture
def crashed(pod: Callable[..., PoolPod], start: datetime) -> Callable[..., PoolPod]:
    """A pod whose engine crashed so many seconds ago, with the given requests in flight."""

    def build(name: str, *seconds: float, digests: tuple[str, ...] = (), reason: str = REASON, **more: Any) -> PoolPod:
        start_seconds = more.pop("start_seconds", None)
        built = pod(name, **more)
        assert built.state is not None
        crashes = [
            EngineCrash(
                id=f"{next(_numbers):016x}",
                at=start.timestamp() - ago,
                reason=reason,
                was_ready=True,
                requests=[CrashedRequest(digest=digest, model=MODEL) for digest in digests],
            )
            for ago in seconds
        ]
        update = {"crashes": crashes, "engine_crashes": len(crashes), "engine_start_seconds": start_seconds}
        return replace(built, state=built.state.model_copy(update=update))

    return build


@pytest.mark.parametrize(
    ("seconds", "is_up", "message"),
    [
        ((5,), False, "the engine stopped (killed by SIGKILL); it is started again"),
        ((5,), True, None),
        ((300, 5), True, None),
        ((500, 300, 5), True, "the engine stopped (killed by SIGKILL), 3 times in 10 minutes; it is running again"),
        ((700, 300, 5), True, None),
        ((700,), False, None),  # another cause keeps it from starting
        ((), False, None),
    ],
)
def test_a_pod_has_a_problem_until_its_engine_serves_well_again(
    crashed: Callable[..., PoolPod],
    start: datetime,
    seconds: tuple[float, ...],
    is_up: bool,  # noqa: FBT001
    message: str | None,
) -> None:
    problem = current_problem(crashed("p", *seconds, engine=is_up), start)
    assert (problem and problem.message) == message
    assert problem is None or problem.reason == "EngineFailed"


def test_a_crash_degrades_the_pool_and_is_counted(
    crashed: Callable[..., PoolPod], pool: Callable[..., ServingPool], start: datetime
) -> None:
    pods = [crashed("p", 4000, 30, reason="exit code 1: ValueError: too\nlong"), crashed("q", 20, 10, engine=False)]
    observation = PoolObservation(deployment=None, pods=pods, adapters=(), decision=Decision(2, ""))
    status = plan(pool(), observation, start).status
    degraded = find(status.conditions, "Degraded")
    assert degraded is not None
    assert (degraded.status, degraded.reason) == ("True", "EngineFailed")
    assert degraded.message == (
        "pod q: the engine stopped (killed by SIGKILL), 2 times in 10 minutes; it is started again"
    )
    assert status.phase == "Degraded"
    assert status.engine_crashes == 3
    assert status.latest_crash is not None
    assert (status.latest_crash.pod, status.latest_crash.message) == ("q", REASON)
    assert status.latest_crash.time == start - timedelta(seconds=10)


def test_the_longest_of_the_latest_starts_is_kept(crashed: Callable[..., PoolPod], start: datetime) -> None:
    status = crash_status(
        ServingPoolStatus(), [crashed("p", start_seconds=31.2), crashed("q", start_seconds=30.0)], start
    )
    assert status["engine_start_seconds"] == 32
    before = ServingPoolStatus(engine_start_seconds=32)
    assert crash_status(before, [crashed("p")], start)["engine_start_seconds"] == 32
    assert crash_status(before, [], start)["engine_start_seconds"] == 32
    assert crash_status(before, [crashed("p", start_seconds=25.0)], start)["engine_start_seconds"] == 25


def test_each_crash_and_each_refused_request_is_one_event(crashed: Callable[..., PoolPod], start: datetime) -> None:
    digest = "a" * 16 + "b" * 32

    def status(before: ServingPoolStatus, *pods: PoolPod, later: float = 0) -> ServingPoolStatus:
        return ServingPoolStatus(**crash_status(before, pods, start + timedelta(seconds=later)))

    nothing = status(ServingPoolStatus())
    assert crash_events(ServingPoolStatus(), nothing) == []
    pod = crashed("p", 30, digests=(digest,))
    first = status(nothing, pod)
    assert [event.message for event in crash_events(nothing, first)] == [
        "pod p: the engine stopped (killed by SIGKILL); 1 crash of the pool's engines in the past hour"
    ]
    assert first.refused_requests is None
    assert crash_events(first, status(first, pod)) == []
    other = crashed("q", 10, digests=(digest,))
    second = status(first, pod, other)
    refusal = (
        f"request {'a' * 16} to {MODEL} was being processed at 2 crashes of the pool's engines: the gateways refuse it "
        "until 00:59 UTC"
    )
    assert [(event.reason, event.message) for event in crash_events(first, second)] == [
        (
            "EngineCrashed",
            "pod q: the engine stopped (killed by SIGKILL); 2 crashes of the pool's engines in the past hour",
        ),
        ("RequestRefused", refusal),
    ]
    # Pods that are gone no longer report it, and the gateways still refuse it.
    gone = status(second, later=3500)
    assert gone.refused_requests == second.refused_requests
    assert crash_events(second, gone) == []
    assert status(gone, later=3600).refused_requests is None


def test_the_status_is_bounded(crashed: Callable[..., PoolPod], start: datetime) -> None:
    digests = tuple(f"{number:016x}" + "0" * 32 for number in range(256))
    pods = [crashed(name, *range(1, 17), digests=digests, reason="x" * 600) for name in "pq"]
    status = ServingPoolStatus(**crash_status(ServingPoolStatus(), pods, start))
    assert len(status.refused_requests or ()) == 32
    assert len(status.model_dump_json()) < 10_000


def test_a_clock_that_is_wrong_is_harmless(crashed: Callable[..., PoolPod], start: datetime) -> None:
    status = crash_status(ServingPoolStatus(), [crashed("p", -1e12), crashed("q", 1e9)], start)
    assert status["engine_crashes"] == 1
