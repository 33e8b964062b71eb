"""Replacement of pods: its start, the use of a surge pod, and the interruptions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tunesmith.api.conditions import ServingPoolReason
from tunesmith.serving.pod import PoolPod, Problem
from tunesmith.serving.render import deployment
from tunesmith.serving.rolling import (
    Cause,
    Rollout,
    cause_of,
    find_hold,
    interruption,
    needs_room_check,
    observe_rollout,
    stamped,
    surge,
)
from tunesmith.serving.settings import PoolSettings

if TYPE_CHECKING:
    from tunesmith.api.servingpool import ServingPool

Build = Callable[..., Any]
OLD = PoolSettings(store="s3://x", agent_image="agent:1", engine_image="engine:1")
NEW = OLD.model_copy(update={"agent_image": "agent:2", "engine_image": "engine:2"})
UNSCHEDULABLE = Problem(ServingPoolReason.UNSCHEDULABLE, "it cannot be scheduled: 0/3 nodes")


def made(pool: ServingPool, settings: PoolSettings = OLD, cause: Cause = Cause.SPEC) -> dict[str, Any]:
    return stamped(deployment(pool, settings, 2), pool, cause)


def template(manifest: dict[str, Any]) -> str:
    return str(manifest["spec"]["template"]["metadata"]["annotations"]["tunesmith.dev/template"])


@pytest.fixture
def observed(start: datetime) -> Callable[..., Rollout]:
    def observe(
        wanted: ServingPool,
        deployed: dict[str, Any] | None,
        pods: Sequence[PoolPod] = (),
        settings: PoolSettings = OLD,
        *,
        later: timedelta = timedelta(0),
    ) -> Rollout:
        return observe_rollout(wanted, deployment(wanted, settings, 2), deployed, pods, start + later)

    return observe


def test_nothing_changed(observed: Build, pool: Build, pod: Build) -> None:
    deployed = made(pool())
    found = observed(pool(), deployed, [pod("p", template=template(deployed))])
    assert (found.change, found.outdated, found.unfinished, found.serves) == (None, frozenset(), False, True)


@pytest.mark.parametrize(
    ("spec", "settings", "change"),
    [
        pytest.param({"drainSeconds": 5}, OLD, Cause.SPEC, id="the user changed the pods"),
        pytest.param({}, NEW, Cause.INSTALLATION, id="the installation changed the images"),
        pytest.param({"replicas": 7}, NEW, Cause.INSTALLATION, id="scaling does not change the pods"),
        pytest.param({"drainSeconds": 5}, NEW, Cause.SPEC, id="both"),
        pytest.param({"allowedNamespaces": {"from": "All"}}, OLD, None, id="who may attach"),
    ],
)
def test_cause_of_a_changed_template(
    spec: dict[str, Any], settings: PoolSettings, change: Cause | None, observed: Build, pool: Build, pod: Build
) -> None:
    found = observed(pool(**spec), made(pool()), [pod("p")], settings)
    assert found.change is change
    assert found.is_waiting is (change is Cause.INSTALLATION)


def test_a_deployment_of_a_release_without_stamps_waits_its_turn(observed: Build, pool: Build, pod: Build) -> None:
    assert observed(pool(), deployment(pool(), OLD, 2), [pod("p")]).is_waiting


def test_a_pool_without_a_serving_pod_does_not_wait(observed: Build, pool: Build, pod: Build) -> None:
    for broken in (
        pod("p", ready=False),
        pod("p", is_reporting=False),
        pod("p", engine=False),
        pod("p", stopping=True),
    ):
        assert not observed(pool(), made(pool()), [broken], NEW).is_waiting


def test_progress_and_failure(observed: Build, pool: Build, pod: Build) -> None:
    deployed = made(pool(), NEW, Cause.INSTALLATION)
    new = template(deployed)
    old = pod("old", template="before")
    found = observed(pool(), deployed, [old, pod("new", template=new, ready=False)], NEW)
    assert (found.outdated, found.active, found.failure) == ({"old"}, True, None)
    bad = pod("new", template=new, ready=False, problem=Problem(ServingPoolReason.ENGINE_FAILED, "the engine stopped"))
    assert observed(pool(), deployed, [old, bad], NEW).failure == "pod new: the engine stopped"
    assert not observed(pool(), deployed, [pod("new", template=new)], NEW).active


def test_a_surge_pod_without_room_is_abandoned_before_it_counts_as_a_failure(
    observed: Build, pool: Build, pod: Build
) -> None:
    deployed = made(pool(), NEW, Cause.INSTALLATION)
    pods = [
        pod("old", template="before"),
        pod("new", template=template(deployed), ready=False, problem=UNSCHEDULABLE),
    ]
    at_first, later, late = (
        observed(pool(), deployed, pods, NEW, later=timedelta(seconds=seconds)) for seconds in (59, 61, 181)
    )
    assert (at_first.is_unschedulable, at_first.failure) == (False, None)
    assert (later.is_unschedulable, later.failure) == (True, None)
    assert late.failure == "pod new: it cannot be scheduled: 0/3 nodes"
    explicit = pool(rollingUpdate={"maxSurge": 1})
    assert surge(explicit, 1, at_first, deployed, has_room=None) == 1
    assert surge(explicit, 1, later, deployed, has_room=None) == 0


A, B, C = (Rollout(f"team/{name}", change=Cause.INSTALLATION, serves=True) for name in "abc")


OTHER = replace(A, pool="zoo/d")


def active(rollout: Rollout, failure: str | None = None) -> Rollout:
    return replace(rollout, change=None, cause=Cause.INSTALLATION, unfinished=True, failure=failure)


@pytest.mark.parametrize(
    ("rollout", "others", "sentence"),
    [
        pytest.param(A, [C, A, B], None, id="the first by name begins"),
        pytest.param(B, [C, A, B], "waits for the update of ServingPool team/a (position 2 of 3)", id="second"),
        pytest.param(B, [active(A), C, B], "waits for the update of ServingPool team/a (position 1 of 2)",
                     id="one is being replaced"),
        pytest.param(B, [replace(A, change=None), B, C], None, id="the first is done"),
        pytest.param(B, [replace(A, serves=False), B], None, id="the first does not serve"),
        pytest.param(
            B,
            [active(A, "pod x: no image y"), B],
            "the update of ServingPool team/a is failing: pod x: no image y; other pools wait until it is fixed",
            id="one fails",
        ),
        pytest.param(replace(B, change=Cause.SPEC), [active(A, "x"), B], None, id="a change of the spec does not wait"),
        pytest.param(OTHER, [active(A, "x"), B, OTHER], None, id="a failure in another namespace alone stops no pool"),
        pytest.param(
            OTHER,
            [active(A, "x"), active(replace(OTHER, pool="third/e"), "y"), OTHER],
            "the update of ServingPool team/a is failing: x; other pools wait until it is fixed",
            id="failures in two namespaces stop all pools",
        ),
        pytest.param(
            OTHER,
            [active(A, "x"), B, active(replace(OTHER, pool="other/c")), OTHER],
            "waits for the update of ServingPool other/c (position 1 of 1)",
            id="one at a time beside a failure",
        ),
        pytest.param(
            B, [replace(active(A, "x"), cause=Cause.SPEC), B], None, id="a failure caused by a spec stops no pool"
        ),
    ],
)  # fmt: skip
def test_one_pool_at_a_time(rollout: Rollout, others: list[Rollout], sentence: str | None) -> None:
    found = find_hold(rollout, others, complete=True)
    assert (None if found is None else found.message) == sentence
    assert found is None or found.failed is ("is failing" in found.message)


def test_a_pool_that_does_not_serve_never_blocks_an_update_of_the_installation() -> None:
    assert cause_of(A) is Cause.INSTALLATION
    assert cause_of(replace(A, serves=False)) is Cause.SPEC
    assert cause_of(replace(A, change=None, cause=Cause.INSTALLATION, serves=False)) is Cause.INSTALLATION
    assert cause_of(Rollout("team/new")) is Cause.SPEC


def test_no_replacement_starts_before_all_pools_are_known() -> None:
    found = find_hold(A, [A], complete=False)
    assert found is not None
    assert found.message == "waits until all pools have been observed"


@pytest.mark.parametrize(
    ("chosen", "replicas", "has_room", "expected"),
    [
        pytest.param(None, 1, None, 1, id="one pod"),
        pytest.param(None, 3, True, 1, id="room"),
        pytest.param(None, 3, False, 0, id="no room"),
        pytest.param(None, 3, None, 0, id="unknown"),
        pytest.param(0, 1, True, 0, id="chosen 0"),
        pytest.param(1, 3, False, 1, id="chosen 1"),
    ],
)
def test_surge(
    chosen: int | None,
    replicas: int,
    has_room: Any,
    expected: int,
    pool: Build,
) -> None:
    wanted = pool(rollingUpdate={"maxSurge": chosen} if chosen is not None else {})
    rollout = Rollout("team/base", change=Cause.INSTALLATION, serves=True)
    assert surge(wanted, replicas, rollout, made(wanted), has_room=has_room) == expected
    assert needs_room_check(wanted, replicas, rollout) is (chosen is None and replicas > 1)


def test_the_strategy_is_unchanged_while_no_pod_is_replaced(pool: Build) -> None:
    settled = Rollout("team/base", serves=True)
    for value in (0, 1):
        deployed = stamped(deployment(pool(), OLD, 3, value), pool(), Cause.SPEC)
        assert surge(pool(), 3, settled, deployed, has_room=None) == value
    assert not needs_room_check(pool(), 3, settled)
    assert surge(pool(), 1, settled, None, has_room=None) == 1


def test_interruption(pool: Build, pod: Build) -> None:
    first, second = pod("p", holds={"t/a@1": "Resident", "t/b@1": "Resident"}), pod("q", holds={"t/a@1": "Resident"})
    both = frozenset({"p", "q"})
    assert interruption(pool(), [first], frozenset({"p"}), 1, 3) == (
        "each pod stops after its replacement is ready and has loaded its adapters; running requests (3 now) have 60 s "
        "to finish"
    )
    assert interruption(pool(), [first], frozenset({"p"}), 0, None).startswith(
        "the pool's only serving pod stops before its replacement starts, because no surge pod is possible: "
    )
    assert interruption(pool(), [first, second], both, 0, None) == (
        "each pod stops before its replacement starts, one at a time; 1 adapter is on one pod only and may have to be "
        "loaded again; running requests have 60 s to finish"
    )
    assert interruption(pool(), [pod("p", ready=False)], frozenset({"p"}), 0, 0) == "no serving pod is replaced"
