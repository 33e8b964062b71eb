from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tunesmith.api.conditions import ServingPoolReason, find
from tunesmith.api.pool_base_model import BaseModelArrival, BaseModelOrigin
from tunesmith.autoscale.decide import Decision
from tunesmith.contracts.agent import PodUse
from tunesmith.contracts.claims import model_name_claim
from tunesmith.serving.pod import PoolPod, Problem
from tunesmith.serving.pool import PoolObservation, PoolPlan, plan
from tunesmith.serving.rolling import Cause, Rollout, RolloutHold

if TYPE_CHECKING:
    from tunesmith.api.adapterdeployment import AdapterDeployment
    from tunesmith.api.servingpool import ServingPool, ServingPoolStatus

Build = Callable[..., Any]


@pytest.fixture
def decide(pool: Build, start: datetime) -> Callable[..., PoolPlan]:
    def build(
        pods: Sequence[PoolPod] = (),
        adapters: Sequence[AdapterDeployment] = (),
        *,
        wanted: int = 1,
        deployed: int | None = None,
        slots: int = 4,
        deployment_status: dict[str, Any] | None = None,
        **more: Any,
    ) -> PoolPlan:
        deployment = (
            {"spec": {"replicas": deployed}, "status": deployment_status or {}} if deployed is not None else None
        )
        observation = PoolObservation(
            deployment=deployment, pods=pods, adapters=adapters, decision=Decision(wanted, "spec.replicas"), **more
        )
        return plan(pool(engine={"maxLoras": min(slots, 2), "maxAdapters": slots}), observation, start)

    return build


@pytest.fixture
def serving(adapter: Build, revision: Build) -> Callable[..., AdapterDeployment]:
    """An adapter whose revision `letter` is to be on `copies` pods."""

    def build(name: str, letter: str, copies: int = 1, state: str = "Pending") -> AdapterDeployment:
        entry = revision(letter, f"team/{name}", state)
        status = {
            "revisions": [entry.manifest()],
            "desiredReplicas": copies,
            "pool": {"name": "base", "namespace": "team"},
        }
        return adapter(name, status=status)

    return build


def lists(got: PoolPlan) -> dict[str, list[str]]:
    return {name: [adapter.engine_name[5:] for adapter in assigned] for name, assigned in got.assigned.items()}


def shown(status: ServingPoolStatus) -> dict[str, str]:
    return {condition.type: f"{condition.status} {condition.reason}" for condition in status.conditions}


def test_a_new_pool_has_the_desired_pods(decide: Build) -> None:
    got = decide(wanted=2)
    assert got.replicas == 2
    assert shown(got.status) == {
        "Available": "False NoPodReady",
        "Progressing": "True Scaling",
        "Degraded": "False AsExpected",
        "Updated": "True PodsCurrent",
    }
    assert got.status.phase == "Pending"


def test_each_pod_gets_its_complete_list(decide: Build, serving: Build, pod: Build) -> None:
    got = decide(
        [pod("p"), pod("q", created=pod("p").created + timedelta(1))],
        [serving("one", "a", 2), serving("two", "b")],
        wanted=2,
        deployed=2,
    )
    assert sorted(lists(got)["p"] + lists(got)["q"]) == ["one@" + "a" * 12, "one@" + "a" * 12, "two@" + "b" * 12]
    first = got.assigned["p"][0]
    assert (first.digest, first.uri) == ("sha256:" + "a" * 64, "s3://store/team/job-a/artifact")
    assert (got.status.adapters, got.status.registered_adapters, got.status.adapter_capacity) == (2, 3, 8)


def test_the_use_of_each_pod_is_reported(decide: Build, serving: Build, pod: Build) -> None:
    use = PodUse(
        slots=2,
        active=["one@" + "a" * 12, "two@" + "b" * 12],
        waiting=1,
        disk_bytes=10,
        disk_limit_bytes=100,
        memory_bytes=5,
        memory_limit_bytes=50,
        reloads=7,
    )
    busy = pod("q", holds={"one@" + "a" * 12: "Resident", "two@" + "b" * 12: "Resident"})
    busy = replace(busy, state=busy.state.model_copy(update={"use": use}))
    got = decide([busy, pod("p")], [serving("one", "a"), serving("two", "b")], wanted=2, deployed=2).status
    assert (got.ready, got.active_adapters, got.adapter_slots) == ("2/2", 2, 4)
    assert [(entry.name, entry.registered, entry.active) for entry in got.pods] == [("p", 0, 0), ("q", 2, 2)]
    assert got.pods[1].manifest() == {
        "name": "q",
        "registered": 2,
        "active": 2,
        "waiting": 1,
        "diskBytes": 10,
        "diskLimitBytes": 100,
        "memoryBytes": 5,
        "memoryLimitBytes": 50,
        "reloads": 7,
    }
    silent = replace(busy, is_reporting=False)
    assert decide([silent], [serving("one", "a")], deployed=1).status.active_adapters == 0


def test_a_busy_adapter_moves_to_a_pod_with_a_free_slot(decide: Build, serving: Build, pod: Build) -> None:
    names = {name: f"team/{name}@{letter * 12}" for name, letter in (("one", "a"), ("two", "b"), ("three", "c"))}
    pods = [pod("p", holds=dict.fromkeys(names.values(), "Resident")), pod("q")]
    adapters = [serving(name, engine[-1]) for name, engine in names.items()]
    still = decide(pods, adapters, wanted=2, deployed=2)
    assert lists(still)["q"] == []
    moving = decide(pods, adapters, wanted=2, deployed=2, busy=frozenset(names.values()))
    assert len(lists(moving)["q"]) == 1


def test_an_adapter_that_cannot_be_loaded_keeps_no_slot(decide: Build, serving: Build, pod: Build) -> None:
    broken, one = serving("broken", "b", state="Failed"), serving("one", "a")
    held = {"team/broken@" + "b" * 12: ("Failed", "rank 64", True)}
    got = decide([pod("p", holds=held)], [broken, one], deployed=1, slots=1)
    assert lists(got) == {"p": ["one@" + "a" * 12]}
    assert got.unplaced == {}
    assert (got.status.registered_adapters, got.status.adapter_capacity) == (1, 1)
    alone = decide([pod("p", ready=False)], [broken], deployed=1)
    assert lists(alone) == {"p": ["broken@" + "b" * 12]}, "it is retried because no other adapter needs the slot"
    assert (alone.status.registered_adapters, alone.status.adapter_capacity) == (0, 4)
    assert alone.gates == {"p": True}, "the pod does not wait for it"


def test_a_stopping_pod_is_ignored(decide: Build, serving: Build, pod: Build) -> None:
    got = decide([pod("p", stopping=True), pod("q")], [serving("one", "a")], deployed=1)
    assert set(got.assigned) == {"q"}
    assert got.status.replicas == 1


def test_copies_of_a_draining_pod_move(decide: Build, serving: Build, pod: Build) -> None:
    held = {"team/one@" + "a" * 12: "Resident"}
    got = decide([pod("p", holds=held, draining=True), pod("q")], [serving("one", "a")], deployed=1)
    assert lists(got) == {"p": ["one@" + "a" * 12], "q": ["one@" + "a" * 12]}


def test_a_silent_agent_keeps_its_copies_while_its_pod_is_ready(decide: Build, serving: Build, pod: Build) -> None:
    held = {"team/one@" + "a" * 12: "Resident"}
    got = decide([pod("p", holds=held, is_reporting=False), pod("q")], [serving("one", "a")], wanted=2, deployed=2)
    assert lists(got) == {"p": ["one@" + "a" * 12], "q": []}
    lost = decide(
        [pod("p", holds=held, is_reporting=False, ready=False), pod("q")], [serving("one", "a")], wanted=2, deployed=2
    )
    assert lists(lost)["q"] == ["one@" + "a" * 12]


def test_a_stalled_engine_keeps_its_copies(decide: Build, serving: Build, pod: Build) -> None:
    held = {"team/one@" + "a" * 12: "Resident"}
    stalled = pod("p", holds=held, stalled="The engine has processed no token for 6 s.")
    got = decide([stalled, pod("q")], [serving("one", "a")], wanted=2, deployed=2)
    assert lists(got) == {"p": ["one@" + "a" * 12], "q": []}
    assert got.status.ready_replicas == 1


def test_copies_without_a_slot_are_reported(decide: Build, serving: Build, pod: Build) -> None:
    got = decide([pod("p")], [serving("one", "a", 2)], deployed=1)
    assert got.unplaced == {
        "team/one@"
        + "a" * 12: "the pool has 1 pod and two copies never share one: raise its replicas or lower the copies"
    }


def test_the_pod_with_the_fewest_copies_leaves_after_it_was_marked_and_emptied(
    decide: Build, serving: Build, pod: Build
) -> None:
    one, two = "team/one@" + "a" * 12, "team/two@" + "b" * 12
    adapters = [serving("one", "a"), serving("two", "b"), serving("six", "c")]
    six = "team/six@" + "c" * 12

    def old(**more: Any) -> PoolPod:
        return pod("p", **{"holds": {one: "Resident", two: "Resident"}, **more})

    marking = decide([old(), pod("q", holds={six: "Resident"})], adapters, deployed=2)
    assert marking.costs == {"q": -1000}
    assert marking.replicas == 2, "not before q is marked and six is resident elsewhere"
    assert lists(marking)["q"] == ["six@" + "c" * 12]
    moved = {one: "Resident", two: "Resident", six: "Resident"}
    assert decide([old(holds=moved), pod("q", holds={six: "Resident"})], adapters, deployed=2).replicas == 2
    done = decide([old(holds=moved), pod("q", holds={six: "Resident"}, deletion_cost="-1000")], adapters, deployed=2)
    assert done.replicas == 1
    assert lists(done)["q"] == []


def test_a_marked_pod_stays_marked(decide: Build, serving: Build, pod: Build) -> None:
    one = "team/one@" + "a" * 12
    marked = pod("p", holds={one: "Resident"}, deletion_cost="-1000")
    got = decide([marked, pod("q", created=marked.created + timedelta(1))], [serving("one", "a")], deployed=2)
    assert got.costs == {}


def test_a_pool_that_grows_again_removes_the_mark(decide: Build, serving: Build, pod: Build) -> None:
    got = decide([pod("p", deletion_cost="-1000"), pod("q")], [serving("one", "a")], wanted=2, deployed=2)
    assert got.costs == {"p": 0}


def test_scaled_to_zero(decide: Build, pod: Build) -> None:
    marked = decide([pod("p", deletion_cost="-1000")], wanted=0, deployed=1)
    assert marked.replicas == 0
    assert shown(decide(wanted=0, deployed=0).status)["Available"] == "False ScaledToZero"


ONE = "team/one@" + "a" * 12
START = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("state", "gates"),
    [
        pytest.param({"engine": False}, {"p": False}, id="engine starting"),
        pytest.param({}, {}, id="not resident"),
        pytest.param({"holds": {ONE: "Loading"}}, {}, id="loading"),
        pytest.param({"holds": {ONE: "Resident"}}, {"p": True}, id="resident"),
        pytest.param({"holds": {ONE: ("Failed", "flipped byte", True)}}, {"p": True}, id="failed permanently"),
        pytest.param(
            {"holds": {ONE: ("Failed", "no answer", False)}}, {"p": True}, id="failed, and no other pod has it"
        ),
        pytest.param({"holds": {ONE: "Resident"}, "problem_of_agent": "canary"}, {}, id="unfit"),
        pytest.param({"gate": True, "problem_of_agent": "canary"}, {"p": False}, id="closes when it is unfit"),
        pytest.param({"containers_ready_since": START - timedelta(seconds=31)}, {"p": True}, id="loading for too long"),
        pytest.param({"holds": {ONE: "Resident"}, "is_reporting": False}, {}, id="unknown"),
        pytest.param({"gate": True}, {}, id="stays open for the others"),
        pytest.param({"gate": True, "engine": False}, {"p": False}, id="closes when the engine stops"),
    ],
)
def test_the_readiness_gate(
    state: dict[str, Any], gates: dict[str, bool], decide: Build, serving: Build, pod: Build
) -> None:
    built = pod("p", **{"ready": False, "gate": False if "engine" not in state else None, **state})
    assert decide([built], [serving("one", "a")], deployed=1).gates == gates


@pytest.mark.parametrize(
    ("pods", "conditions", "phase"),
    [
        pytest.param(
            ["ready"],
            {"Available": "True PodsReady", "Progressing": "False Settled", "Degraded": "False AsExpected"},
            "Available",
            id="well",
        ),
        pytest.param(
            ["problem"],
            {"Available": "False ImagePullFailed", "Progressing": "True Scaling", "Degraded": "True ImagePullFailed"},
            "Degraded",
            id="image",
        ),
        pytest.param(
            ["silent"],
            {"Available": "Unknown AgentSilent", "Progressing": "False Settled", "Degraded": "True AgentSilent"},
            "Degraded",
            id="silent",
        ),
    ],
)
def test_conditions(pods: list[str], conditions: dict[str, str], phase: str, decide: Build, pod: Build) -> None:
    kinds = {
        "ready": lambda: pod("p"),
        "problem": lambda: pod(
            "p", ready=False, problem=Problem(ServingPoolReason.IMAGE_PULL_FAILED, "image x cannot be pulled")
        ),
        "silent": lambda: pod("p", is_reporting=False),
    }
    got = decide([kinds[kind]() for kind in pods], deployed=1).status
    assert shown(got) == {**conditions, "Updated": "True PodsCurrent"}
    assert got.phase == phase


def test_a_pods_problem_names_the_pod(decide: Build, pod: Build) -> None:
    got = decide(
        [pod("p", ready=False, problem=Problem(ServingPoolReason.UNSCHEDULABLE, "it cannot be scheduled: 0/1"))],
        deployed=1,
    )
    degraded = find(got.status.conditions, "Degraded")
    assert degraded is not None
    assert degraded.message == "pod p: it cannot be scheduled: 0/1"


def test_refused_pods_are_reported(decide: Build) -> None:
    failure = {"conditions": [{"type": "ReplicaFailure", "status": "True", "message": "exceeded quota"}]}
    got = decide(deployed=1, deployment_status=failure).status
    degraded = find(got.conditions, "Degraded")
    assert degraded is not None
    assert (degraded.reason, degraded.message) == ("PodsRefused", "the API server refuses the pods: exceeded quota")


def test_an_invalid_spec_is_reported_in_every_condition(decide: Build) -> None:
    got = decide(invalid="engine.args must not contain --port").status
    assert set(shown(got).values()) == {"False InvalidSpec", "True InvalidSpec"}


def test_a_rollout_is_progress(decide: Build, pod: Build) -> None:
    got = decide(
        [pod("p"), pod("q")], wanted=2, deployed=2, deployment_status={"replicas": 2, "updatedReplicas": 1}
    ).status
    assert shown(got)["Progressing"] == "True RollingOut"


def test_a_base_whose_name_is_taken_is_degraded(decide: Build, adapter: Build, pod: Build) -> None:
    got = decide([pod("p")], deployed=1, lost_to=model_name_claim(adapter("smol"))).status
    degraded = find(got.conditions, "Degraded")
    assert degraded is not None
    assert degraded.message == (
        "the model name team/smol belongs to AdapterDeployment team/smol, which "
        "is older: the base model cannot be called by this name"
    )


def test_the_fingerprint_is_taken_from_the_pods(pool: Build, pod: Build, start: datetime) -> None:
    def fingerprint(known: str | None, *pods: PoolPod) -> str | None:
        resource: ServingPool = pool(fingerprint=known)
        return plan(resource, PoolObservation(None, pods, (), Decision(1, "")), start).status.base_model_fingerprint

    assert fingerprint(None) is None
    assert fingerprint(None, pod("p")) == "sha256:f"
    assert fingerprint("sha256:f") == "sha256:f", "kept while no pod is there"
    assert fingerprint("sha256:old", pod("p")) == "sha256:f"


def test_the_arrival_of_the_base_model_is_that_of_the_newest_pod(pool: Build, pod: Build, start: datetime) -> None:
    def arrived(origin: str, seconds: float) -> BaseModelArrival:
        return BaseModelArrival(
            origin=BaseModelOrigin(origin), seconds=seconds, size_bytes=7, downloaded_bytes=7 if seconds else 0
        )

    resource: ServingPool = pool()
    pods = [
        pod("first", base_model=arrived("Download", 90.0)),
        pod("second", created=start + timedelta(minutes=5), base_model=arrived("Cache", 2.5)),
        pod("third", created=start + timedelta(minutes=9)),
    ]
    status = plan(resource, PoolObservation(None, pods, (), Decision(3, "")), start).status
    assert status.base_model is not None
    assert (status.base_model.pod, status.base_model.origin, status.base_model.seconds) == ("second", "Cache", 2.5)
    later = resource.model_copy(update={"status": status})
    assert plan(later, PoolObservation(None, (), (), Decision(0, "")), start).status.base_model == status.base_model


def test_a_surge_pod_is_filled_before_the_outdated_pod_leaves(decide: Build, serving: Build, pod: Build) -> None:
    """The Deployment removes the old pod as soon as the new one is ready, and its gate is what makes it ready."""
    rollout = Rollout("team/base", outdated=frozenset({"old"}), unfinished=True)
    old = pod("old", holds={ONE: "Resident"}, template="1")

    def at(state: str | None) -> PoolPlan:
        held = {} if state is None else {ONE: state}
        new = pod("new", ready=False, gate=False, holds=held, template="2", created=START + timedelta(seconds=1))
        return decide([old, new], [serving("one", "a")], deployed=1, rollout=rollout, max_surge=1)

    starting = at(None)
    assert lists(starting) == {"old": ["one@" + "a" * 12], "new": ["one@" + "a" * 12]}
    assert (starting.gates, starting.costs, starting.replicas) == ({}, {"old": -1000}, 1)
    assert at("Loading").gates == {}
    done = at("Resident")
    assert done.gates == {"new": True}
    assert lists(done)["old"] == ["one@" + "a" * 12], "gateways send requests to ready pods only"
    assert shown(done.status)["Updated"] == "False RollingOut"


def test_a_replacement_that_fails_leaves_the_old_pod_serving(decide: Build, serving: Build, pod: Build) -> None:
    rollout = Rollout("team/base", outdated=frozenset({"old"}), unfinished=True, failure="pod new: image y is missing")
    new = pod("new", ready=False, gate=None, engine=False, template="2")
    got = decide(
        [pod("old", holds={ONE: "Resident"}), new],
        [serving("one", "a"), serving("two", "b")],
        deployed=1,
        rollout=rollout,
        max_surge=1,
    )
    assert lists(got)["old"] == ["one@" + "a" * 12, "two@" + "b" * 12], "including later adapters"
    updated = find(got.status.conditions, "Updated")
    assert updated is not None
    assert (updated.reason, updated.message) == (
        "UpdateFailed",
        "pod new: image y is missing; 1 pod with the previous settings keeps running",
    )


def test_without_a_surge_pod_the_next_one_is_emptied_first(decide: Build, serving: Build, pod: Build) -> None:
    rollout = Rollout("team/base", outdated=frozenset({"p", "q"}), unfinished=True)
    adapters = [serving("one", "a"), serving("two", "b")]
    two = "team/two@" + "b" * 12
    new = pod("new", ready=False, gate=False, template="2")
    pods = [pod("p", holds={ONE: "Resident"}), pod("q", holds={two: "Resident"}), new]
    got = decide(pods, adapters, wanted=3, deployed=3, rollout=rollout)
    assert got.costs == {"p": -1000}
    assert "one@" + "a" * 12 in [*lists(got)["q"], *lists(got)["new"]]
    assert lists(got)["p"] == ["one@" + "a" * 12], "until it is resident elsewhere"
    assert got.gates == {}, "a ready pod would let the Deployment remove p"
    full = decide(pods, adapters, wanted=3, deployed=3, rollout=rollout, slots=1)
    assert full.replicas == 3


def test_a_pool_that_waits_for_its_turn_reports_it(decide: Build, pod: Build) -> None:
    rollout = Rollout("team/base", change=Cause.INSTALLATION, serves=True)
    got = decide(
        [pod("p")],
        deployed=1,
        rollout=rollout,
        hold=RolloutHold("waits for the update of ServingPool team/a"),
        running=4,
    )
    updated = find(got.status.conditions, "Updated")
    assert updated is not None
    assert updated.reason == "UpdatePending"
    assert updated.message == (
        "the installation changed, and the pods have to be replaced: waits for the update of ServingPool team/a. When "
        "the replacement begins, the pool's only serving pod stops before its replacement starts, because no surge pod "
        "is possible: no request is answered until the replacement is ready; running requests (4 now) have 60 s to "
        "finish"
    )
    blocked = decide([pod("p")], deployed=1, rollout=rollout, hold=RolloutHold("x fails", failed=True)).status
    assert shown(blocked)["Updated"] == "False UpdateBlocked"
