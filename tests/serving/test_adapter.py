from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tunesmith.api.adapterdeployment import AdapterDeployment, AdapterDeploymentStatus, Revision
from tunesmith.api.conditions import AdapterDeploymentReason as Reason
from tunesmith.api.conditions import find
from tunesmith.autoscale.decide import Decision
from tunesmith.contracts.agent import Residency, ResidencyState
from tunesmith.contracts.claims import model_name_claim
from tunesmith.serving.adapter import AdapterObservation, desired_copies, needs_room, plan, was_never_loaded
from tunesmith.serving.resolve import Artifact, Unresolved

if TYPE_CHECKING:
    from tunesmith.api.servingpool import ServingPool
    from tunesmith.serving.pod import PoolPod

A, B = "team/pirate@aaaaaaaaaaaa", "team/pirate@bbbbbbbbbbbb"
MISSING = Unresolved(Reason.FINE_TUNE_JOB_NOT_FOUND, "waits for FineTuneJob job")
DAMAGED = ("Failed", "adapter_model.safetensors has another SHA-256", True)
Build = Callable[..., Any]


def artifact(letter: str) -> Artifact:
    return Artifact(f"sha256:{letter * 64}", f"s3://store/team/job-{letter}/artifact", "sha256:f", "FineTuneJob job")


@pytest.fixture
def status(adapter: Build, pool: Build, start: datetime) -> Callable[..., AdapterDeploymentStatus]:
    def build(
        source: Artifact | Unresolved,
        pods: Sequence[PoolPod] = (),
        *,
        revisions: Sequence[Revision] = (),
        chosen: ServingPool | Unresolved | None = None,
        copies: int = 1,
        unplaced: dict[str, str] | None = None,
        before: dict[str, Any] | None = None,
        lost_to: Any = None,
    ) -> AdapterDeploymentStatus:
        old = {"revisions": [revision.manifest() for revision in revisions], **(before or {})}
        observation = AdapterObservation(
            artifact=source,
            pool=pool() if chosen is None else chosen,
            lost_to=lost_to,
            pods=pods,
            unplaced=unplaced or {},
            decision=Decision(copies, "spec.replicas"),
            url="http://gateway/v1",
        )
        return plan(adapter(status=old), observation, start)

    return build


def shown(status: AdapterDeploymentStatus) -> dict[str, str]:
    """The conditions without Parity and those of kstatus, which have tests of their own."""
    return {
        condition.type: f"{condition.status} {condition.reason}"
        for condition in status.conditions
        if condition.type not in {"Parity", "Reconciling", "Stalled"}
    }


def message(status: AdapterDeploymentStatus, type_: str) -> str:
    condition = find(status.conditions, type_)
    assert condition is not None
    return condition.message


def names(status: AdapterDeploymentStatus) -> list[str]:
    return [f"{revision.engine_name[-1]} {revision.state} {revision.ready_replicas}" for revision in status.revisions]


def test_an_adapter_without_a_source_waits_and_reports_the_reason(status: Build) -> None:
    got = status(MISSING)
    assert got.phase == "Waiting"
    assert shown(got) == {
        "Resolved": "False FineTuneJobNotFound",
        "Ready": "False FineTuneJobNotFound",
        "Progressing": "False FineTuneJobNotFound",
    }
    assert message(got, "Ready") == "waits for FineTuneJob job"
    assert got.revisions == []
    assert (got.model, got.url) == ("team/pirate", "http://gateway/v1")


def test_without_a_pool_there_is_no_revision(status: Build) -> None:
    got = status(artifact("a"), chosen=Unresolved(Reason.SEVERAL_POOLS, "name one"))
    assert shown(got)["Resolved"] == "False SeveralPools"
    assert got.revisions == []


def test_a_resolved_source_becomes_a_revision(status: Build) -> None:
    got = status(artifact("a"))
    assert names(got) == ["a Pending 0"]
    assert got.revisions[0].engine_name == A
    assert got.revisions[0].uri == "s3://store/team/job-a/artifact"
    assert got.phase == "Loading"
    assert got.pool is not None
    assert got.pool.name == "base"
    assert shown(got) == {
        "Resolved": "True Resolved",
        "Ready": "False PoolNotReady",
        "Progressing": "True PoolNotReady",
    }


@pytest.mark.parametrize(
    ("holds", "ready", "expected"),
    [
        ({}, True, {"Ready": "False Loading", "Progressing": "True Loading"}),
        ({A: "Downloading"}, True, {"Ready": "False Loading", "Progressing": "True Loading"}),
        ({A: "Resident"}, True, {"Ready": "True Resident", "Progressing": "False Settled"}),
        ({A: "Resident"}, False, {"Ready": "False Loading", "Progressing": "True Loading"}),
        ({A: DAMAGED}, True, {"Ready": "False RevisionFailed", "Progressing": "False RevisionFailed"}),
        (
            {A: ("Failed", "the store cannot be reached", False)},
            True,
            {"Ready": "False Loading", "Progressing": "True Loading"},
        ),
    ],
)
def test_conditions_follow_agent_reports(
    holds: dict[str, Any],
    ready: bool,  # noqa: FBT001 - a column of the table
    expected: dict[str, str],
    status: Build,
    pod: Build,
) -> None:
    got = status(artifact("a"), [pod("p", holds=holds, ready=ready)])
    assert shown(got) == {"Resolved": "True Resolved", **expected}


def test_the_agents_message_about_a_damaged_artifact_is_reported(status: Build, pod: Build) -> None:
    got = status(artifact("a"), [pod("p", holds={A: DAMAGED})])
    assert got.phase == "Failed"
    assert message(got, "Ready") == (
        "revision aaaaaaaaaaaa cannot be loaded: adapter_model.safetensors has another SHA-256 (pod p)"
    )
    assert got.revisions[0].message == "adapter_model.safetensors has another SHA-256 (pod p)"


def test_copies_are_counted_by_pods(status: Build, pod: Build) -> None:
    got = status(
        artifact("a"),
        [pod("p", holds={A: "Resident"}), pod("q", holds={A: "Resident"}, ready=False), pod("r", holds={A: "Loading"})],
        copies=3,
    )
    assert (got.desired_replicas, got.replicas, got.ready_replicas) == (3, 2, 1)
    assert shown(got)["Progressing"] == "True Loading"


def test_loads_and_bytes_are_listed_by_pod(status: Build, pod: Build) -> None:
    def loaded(name: str, seconds: float, **more: Any) -> Any:
        entry = Residency(
            engine_name=A,
            digest=artifact("a").digest,
            state=more.pop("state", ResidencyState.RESIDENT),
            size_bytes=5000,
            loads=2,
            load_seconds=seconds,
        )
        built = pod(name)
        return replace(built, state=built.state.model_copy(update={"adapters": [entry]}))

    got = status(artifact("a"), [loaded("q", 0.5), loaded("p", 0.25), loaded("r", 0.1, state=ResidencyState.LOADING)])
    (first,) = got.revisions
    assert first.size_bytes == 5000
    assert [(found.name, found.loads, found.load_seconds) for found in first.pods] == [("p", 2, 0.25), ("q", 2, 0.5)]


def test_a_missing_slot_is_reported(status: Build, pod: Build) -> None:
    got = status(artifact("a"), [pod("p")], unplaced={A: "all 1 slots are taken"})
    assert shown(got)["Ready"] == "False PoolFull"
    assert message(got, "Ready") == "no pod has room for revision aaaaaaaaaaaa: all 1 slots are taken"


def test_an_adapter_with_more_copies_than_pods_serves_and_reports_the_missing_slot(status: Build, pod: Build) -> None:
    got = status(artifact("a"), [pod("p", holds={A: "Resident"})], copies=2, unplaced={A: "the pool has 1 pod"})
    assert shown(got) == {"Resolved": "True Resolved", "Ready": "True Resident", "Progressing": "True PoolFull"}
    assert got.revisions[0].message == "the pool has 1 pod"


def test_a_silent_agent_is_unknown_not_failed(status: Build, pod: Build) -> None:
    got = status(artifact("a"), [pod("p", holds={A: "Resident"}, is_reporting=False)])
    assert shown(got)["Ready"] == "Unknown AgentSilent"
    assert got.ready_replicas == 0


def test_an_adapter_whose_name_is_taken_keeps_no_revision(
    status: Build, pod: Build, adapter: Build, revision: Build
) -> None:
    got = status(
        artifact("a"),
        [pod("p", holds={A: "Resident"})],
        revisions=[revision("a")],
        lost_to=model_name_claim(adapter("older")),
    )
    assert shown(got) == dict.fromkeys(("Resolved", "Ready", "Progressing"), "False ModelNameTaken")
    assert message(got, "Ready") == (
        "the model name team/pirate belongs to AdapterDeployment team/older, "
        "which is older: choose another spec.modelName"
    )
    assert (got.revisions, got.model, got.pool) == ([], None, None)


def test_a_new_digest_is_added_beside_the_serving_one(status: Build, pod: Build, revision: Build) -> None:
    got = status(artifact("b"), [pod("p", holds={A: "Resident"})], revisions=[revision("a", state="Resident", ready=1)])
    assert names(got) == ["b Pending 0", "a Resident 1"]
    assert shown(got)["Ready"] == "True PreviousRevision"
    assert shown(got)["Progressing"] == "True Loading"


def test_the_old_revision_stays_until_the_new_one_is_on_every_pod(status: Build, pod: Build, revision: Build) -> None:
    both, old = pod("p", holds={A: "Resident", B: "Resident"}), pod("q", holds={A: "Resident", B: "Loading"})
    known = [revision("b"), revision("a")]
    assert names(status(artifact("b"), [both, old], revisions=known, copies=2)) == ["b Resident 1", "a Resident 2"]
    done = [both, pod("q", holds={A: "Resident", B: "Resident"})]
    assert names(status(artifact("b"), done, revisions=known, copies=2)) == ["b Resident 2"]


def test_the_old_revision_keeps_serving_if_the_new_one_is_damaged(status: Build, pod: Build, revision: Build) -> None:
    got = status(artifact("b"), [pod("p", holds={A: "Resident", B: DAMAGED})], revisions=[revision("b"), revision("a")])
    assert names(got) == ["b Failed 0", "a Resident 1"]
    assert got.phase == "Ready"
    assert shown(got)["Ready"] == "True PreviousRevision"
    assert shown(got)["Progressing"] == "False RevisionFailed"


def test_a_failed_revision_stays_failed_until_it_is_resident(status: Build, pod: Build, revision: Build) -> None:
    failed = revision("a", state="Failed").model_copy(update={"message": "damaged (pod p)"})
    before = {"pool": {"name": "base", "namespace": "team"}, "observedGeneration": 1}

    def then(*pods: PoolPod, **more: Any) -> tuple[str, str | None]:
        got = status(artifact("a"), pods, revisions=[failed], before={**before, **more}, unplaced={A: "no slot"})
        return str(got.revisions[0].state), got.revisions[0].message

    assert then(pod("p")) == ("Failed", "damaged (pod p)"), "it has no slot"
    assert then(pod("q", holds={A: "Loading"})) == ("Failed", "damaged (pod p)"), "it is retried"
    assert then(pod("q", holds={A: DAMAGED}))[1] == "adapter_model.safetensors has another SHA-256 (pod q)"
    assert then(pod("q", holds={A: "Resident"}))[0] == "Resident"
    assert then(pod("p"), observedGeneration=0)[0] == "Pending", "the spec has changed"
    assert then(pod("p"), pool={"name": "other", "namespace": "team"})[0] == "Pending", "it has another pool"


def test_of_older_revisions_only_the_serving_one_stays(status: Build, pod: Build, revision: Build) -> None:
    known = [revision("b", state="Failed"), revision("a")]
    got = status(artifact("c"), [pod("p", holds={A: "Resident", B: DAMAGED})], revisions=known)
    assert names(got) == ["c Pending 0", "a Resident 1"]


def test_back_to_an_earlier_digest(status: Build, pod: Build, revision: Build) -> None:
    got = status(
        artifact("a"), [pod("p", holds={A: "Resident", B: "Resident"})], revisions=[revision("b"), revision("a")]
    )
    assert names(got) == ["a Resident 1"]


def test_a_revision_keeps_serving_after_its_source_is_deleted(status: Build, pod: Build, revision: Build) -> None:
    got = status(MISSING, [pod("p", holds={A: "Resident"})], revisions=[revision("a")])
    assert names(got) == ["a Resident 1"]
    assert shown(got) == {
        "Resolved": "False FineTuneJobNotFound",
        "Ready": "True Resident",
        "Progressing": "False Settled",
    }
    assert message(got, "Resolved") == "waits for FineTuneJob job; revision aaaaaaaaaaaa keeps serving"


def test_a_deleted_pool_is_removed_from_the_status(status: Build, revision: Build) -> None:
    before = {"pool": {"name": "base", "namespace": "team"}}
    deleted = status(
        artifact("a"), revisions=[revision("a")], before=before, chosen=Unresolved(Reason.POOL_NOT_FOUND, "waits")
    )
    assert deleted.pool is None
    other = status(
        artifact("a"), revisions=[revision("a")], before=before, chosen=Unresolved(Reason.BASE_MODEL_MISMATCH, "no")
    )
    assert other.pool is not None


def test_another_model_name_starts_with_new_revisions(status: Build, pod: Build, revision: Build) -> None:
    other = "team/sailor@aaaaaaaaaaaa"
    got = status(artifact("a"), [pod("p", holds={other: "Resident"})], revisions=[revision("a", "team/sailor")])
    assert [entry.engine_name for entry in got.revisions] == [A]


def test_transition_times_and_reasons_stay_while_nothing_changes(
    adapter: Build, pool: Build, pod: Build, start: datetime
) -> None:
    def observed(copies: int, reason: str) -> AdapterObservation:
        return AdapterObservation(
            artifact("a"), pool(), None, [pod("p", holds={A: "Resident"})], {}, Decision(copies, reason), ""
        )

    first = plan(adapter(), observed(1, "3 requests"), start)
    again = plan(adapter(status=first.manifest()), observed(1, "4 requests"), start + timedelta(minutes=5))
    assert again == first
    more = plan(adapter(status=first.manifest()), observed(2, "9 requests"), start + timedelta(minutes=5))
    assert more.desired_reason == "9 requests"


def test_desired_copies(revision: Build) -> None:
    def desired(*revisions: Revision) -> list[tuple[str, int]]:
        return [(entry.engine_name[-1], copies) for entry, copies in desired_copies(revisions, 3)]

    assert desired() == []
    assert desired(revision("a")) == [("a", 3)]
    assert desired(revision("b"), revision("a", state="Resident", ready=2)) == [("a", 2), ("b", 3)]
    assert desired(revision("b"), revision("a")) == [("a", 1), ("b", 3)]
    assert desired(revision("b", state="Failed"), revision("a", state="Resident", ready=1)) == [("a", 3), ("b", 1)]
    assert desired_copies([revision("a", state="Idle")], 0) == [(revision("a", state="Idle"), 0)]


def test_an_idle_adapter_is_ready_for_the_next_request(status: Build, pod: Build, revision: Build) -> None:
    """It stays so while its pods unload it and afterwards."""
    for pods in ([pod("p", holds={A: "Resident"})], [pod("p")], []):
        for state in ("Resident", "Idle"):
            got = status(artifact("a"), pods, revisions=[revision("a", state=state)], copies=0)
            assert shown(got) == {
                "Resolved": "True Resolved",
                "Ready": "True ScaledToZero",
                "Progressing": "False Settled",
            }
            assert (got.phase, got.revisions[0].state, got.desired_replicas) == ("Idle", "Idle", 0)


def test_an_idle_adapter_that_is_needed_again_is_being_loaded(status: Build, pod: Build, revision: Build) -> None:
    idle = revision("a", state="Idle")
    waiting = status(artifact("a"), [pod("p")], revisions=[idle])
    assert (waiting.phase, waiting.revisions[0].state) == ("Loading", "Pending")
    resident = status(artifact("a"), [pod("p", holds={A: "Resident"})], revisions=[idle])
    assert (resident.phase, resident.revisions[0].state) == ("Ready", "Resident")


def test_a_new_revision_of_an_idle_adapter_must_be_loaded_once(
    adapter: Build, status: Build, pod: Build, revision: Build
) -> None:
    got = status(artifact("b"), [pod("p")], revisions=[revision("a", state="Idle")], copies=0)
    assert names(got) == ["b Pending 0", "a Idle 0"]
    assert was_never_loaded(adapter(status=got.manifest()))
    loaded = status(artifact("b"), [pod("p", holds={B: "Resident"})], revisions=got.revisions)
    assert names(loaded) == ["b Resident 1"]
    assert not was_never_loaded(adapter(status=loaded.manifest()))


def test_an_adapter_that_cannot_be_loaded_needs_no_room(adapter: Build, revision: Build) -> None:
    def needs(*revisions: Revision) -> bool:
        return needs_room(adapter(status={"revisions": [entry.manifest() for entry in revisions]}))

    assert not needs()
    assert not needs(revision("a", state="Failed"))
    assert needs(revision("a"))
    assert needs(revision("b", state="Failed"), revision("a", state="Resident", ready=1))


def test_the_status_of_an_adapter_fits_the_crd(status: Build, pod: Build, adapter: Build) -> None:
    got = status(artifact("a"), [pod("p", holds={A: "Resident"})])
    document = got.manifest()
    assert AdapterDeployment.model_validate({**adapter().manifest(), "status": document}).status == got
