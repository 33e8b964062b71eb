"""Base model of a pool that comes from a FineTuneJob: its artifact, the reasons to wait, and the pods that it gives."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.serving.test_render import SETTINGS
from tests.serving.test_resolve import artifact, condition
from tunesmith.api.conditions import find
from tunesmith.api.method import Method
from tunesmith.api.output import Output
from tunesmith.api.pool_base_model import BaseModelArtifact
from tunesmith.autoscale.decide import Decision
from tunesmith.serving.adapter import AdapterObservation
from tunesmith.serving.adapter import plan as plan_adapter
from tunesmith.serving.pool import PoolObservation, plan
from tunesmith.serving.render import deployment
from tunesmith.serving.resolve import Artifact, Candidates, Unresolved, choose, resolve_artifact
from tunesmith.serving.rolling import Cause, observe_rollout, stamped
from tunesmith.serving.trained_base import BaseModelProblem, forbidden_job, resolve_base, with_base

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from tunesmith.api.adapterdeployment import AdapterDeployment
    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith.api.servingpool import ServingPool
    from tunesmith.serving.pod import PoolPod

    Build = Callable[..., Any]

DIGEST = "sha256:" + "a" * 64


@pytest.fixture
def trained_pool(pool: Build) -> Build:
    def build(**more: Any) -> ServingPool:
        found: ServingPool = pool(baseModel={"from": {"fineTuneJob": {"name": "job", **more.pop("job", {})}}}, **more)
        return found

    return build


@pytest.fixture
def complete(job: Build) -> Build:
    def build(*, uid: str = "uid-job", merge: str = "Original", full: bool = False) -> FineTuneJob:
        done: FineTuneJob = job(conditions=[condition("Complete")], artifact=artifact(vllm=False, reason="DoRA"))
        method = Method.model_validate({"full": {}} if full else {"lora": {}})
        output = Output.model_validate({"merge": "None" if full else merge})
        spec = done.spec.model_copy(update={"requested_method": method, "output": output})
        return done.model_copy(update={"spec": spec, "metadata": done.metadata.model_copy(update={"uid": uid})})

    return build


@pytest.mark.parametrize(
    ("changes", "folder"), [({}, "merged"), ({"merge": "Dequantized"}, "merged"), ({"full": True}, "artifact")]
)
def test_the_whole_model_is_at_a_computed_location(
    changes: dict[str, Any], folder: str, trained_pool: Build, complete: Build
) -> None:
    assert resolve_base(trained_pool(), complete(**changes), "s3://store") == BaseModelArtifact(
        digest=DIGEST, uri=f"s3://store/team/job-uid-job/{folder}"
    )


def test_a_job_without_a_whole_model_is_a_problem_with_a_remedy(trained_pool: Build, complete: Build) -> None:
    found = resolve_base(trained_pool(), complete(merge="None"), "s3://store")
    assert isinstance(found, BaseModelProblem)
    assert found.reason == "NoWholeModel"
    assert "create it again with output.merge: Original" in found.message


@pytest.mark.parametrize(
    ("status", "reason", "message"),
    [
        (None, "FineTuneJobNotFound", "waits for FineTuneJob job, which does not exist in namespace team: create it"),
        ({}, "FineTuneJobRunning", "waits for FineTuneJob job, which is Pending"),
        (
            {"conditions": [condition("Failed", "GateFailed", "loss 3.2 is above 2.0")], "artifact": artifact()},
            "FineTuneJobFailed",
            "FineTuneJob job failed with GateFailed: loss 3.2 is above 2.0; create it again",
        ),
    ],
)
def test_a_pool_waits_for_its_job_and_keeps_the_artifact_it_has(
    status: dict[str, Any] | None, reason: str, message: str, trained_pool: Build, job: Build, start: datetime
) -> None:
    new = trained_pool()
    source = None if status is None else job(**status)
    found = resolve_base(new, source, "s3://store")
    assert found == BaseModelProblem(found.reason, message)
    observation = PoolObservation(None, (), (), Decision(1, "as desired"), base_problem=found)
    conditions = plan(with_base(new, found), observation, start).status.conditions
    shown = {entry.type: f"{entry.status} {entry.reason}" for entry in conditions}
    failed = reason == "FineTuneJobFailed"
    assert shown == {
        "Available": f"False {reason}",
        "Progressing": f"False {reason}",
        "Degraded": f"True {reason}" if failed else "False AsExpected",
        "Updated": f"False {reason}",
        "Resolved": f"False {reason}",
    }
    recorded = BaseModelArtifact(digest=DIGEST, uri="s3://store/team/job-old/merged")
    old = new.model_copy(update={"status": new.status.model_copy(update={"base_model_artifact": recorded})})
    found = resolve_base(old, source, "s3://store")
    assert isinstance(found, BaseModelProblem)
    assert found.message == f"{message}; the pods keep artifact aaaaaaaaaaaa"
    kept = with_base(old, found)
    assert kept.spec.base_model.uri == recorded.uri
    status_now = plan(kept, PoolObservation(None, (), (), Decision(1, "x"), base_problem=found), start).status
    assert status_now.base_model_artifact == recorded
    resolved, available = find(status_now.conditions, "Resolved"), find(status_now.conditions, "Available")
    assert resolved is not None
    assert (resolved.status, resolved.reason) == ("False", reason)
    assert available is not None
    assert available.reason == "NoPodReady"


def test_a_job_that_was_trained_again_replaces_the_pods(trained_pool: Build, complete: Build, start: datetime) -> None:
    pool = trained_pool()
    first = with_base(pool, resolve_base(pool, complete(), "s3://store"))
    rendered = deployment(first, SETTINGS, 1)
    template = rendered["spec"]["template"]
    assert template["metadata"]["annotations"]["tunesmith.dev/base-model"] == DIGEST
    fetch = template["spec"]["initContainers"][0]["args"]
    assert fetch[fetch.index("--uri") + 1] == "s3://store/team/job-uid-job/merged"
    assert fetch[fetch.index("--artifact-digest") + 1] == DIGEST
    current = stamped(rendered, first, Cause.SPEC)
    assert observe_rollout(first, rendered, current, (), start).change is None
    second = with_base(first, resolve_base(first, complete(uid="uid-again"), "s3://store"))
    assert observe_rollout(second, deployment(second, SETTINGS, 1), current, (), start).change is Cause.SPEC


def test_pools_of_tenants_serve_only_jobs_of_their_own_namespace(trained_pool: Build) -> None:
    assert forbidden_job(trained_pool(), ("platform",)) is None
    foreign = forbidden_job(trained_pool(job={"namespace": "other"}), ("platform",))
    assert foreign is not None
    assert "sharedPoolNamespaces" in foreign
    assert forbidden_job(trained_pool(namespace="platform", job={"namespace": "other"}), ("platform",)) is None


def test_a_base_with_a_uri_is_unchanged(pool: Build) -> None:
    plain = pool()
    assert resolve_base(plain, None, "s3://store") is None
    assert with_base(plain, None) is plain


NEW, OLD = f"team/pirate@{'a' * 12}", f"team/pirate@{'b' * 12}"


def test_a_whole_model_is_served_by_the_pool_whose_base_it_is(
    trained_pool: Build, pool: Build, adapter: Build, complete: Build
) -> None:
    plain, whole = pool("other"), trained_pool()
    published = resolve_artifact(adapter(), "job", complete(), "s3://store")
    assert isinstance(published, Artifact)
    assert choose(adapter(), published, Candidates(own=[plain, whole])) is whole
    named = adapter(pool={"name": "base"})
    assert choose(named, published, Candidates(whole, admitted=True)) is whole
    refused = choose(adapter(pool={"name": "other"}), published, Candidates(plain, admitted=True))
    none = choose(adapter(), published, Candidates(own=[plain]))
    assert isinstance(refused, Unresolved)
    assert refused == none
    assert refused.reason == "NotServable"
    assert refused.message.startswith("the engine cannot load the adapter of FineTuneJob job: DoRA. Its whole model is")
    assert "{fineTuneJob: {name: job, namespace: team}}" in refused.message
    several = choose(adapter(), published, Candidates(own=[whole, trained_pool(name="second")]))
    assert isinstance(several, Unresolved)
    assert several.reason == "SeveralPools"
    foreign = choose(named, published, Candidates(whole, admitted=False))
    assert isinstance(foreign, Unresolved)
    assert foreign.reason == "PoolNotAllowed"


def test_an_adapter_that_was_merged_too_is_loaded_unless_its_model_is_the_base(
    trained_pool: Build, pool: Build, adapter: Build, complete: Build
) -> None:
    published = resolve_artifact(adapter(), "job", complete(), "s3://store")
    assert isinstance(published, Artifact)
    loadable = replace(published, refusal=None, fingerprint="sha256:f")
    plain = pool("other")
    assert choose(adapter(), loadable, Candidates(own=[plain])) is plain
    whole = trained_pool(fingerprint="sha256:g")
    assert choose(adapter(pool={"name": "base"}), loadable, Candidates(whole, admitted=True)) is whole


@pytest.fixture
def deployed(adapter: Build, trained_pool: Build, complete: Build, start: datetime) -> Build:
    """The status of an AdapterDeployment of the whole model on these pods, after one that served an older artifact."""

    def build(pods: list[PoolPod], *before: dict[str, Any]) -> AdapterDeployment:
        status = {"revisions": list(before), "pool": {"name": "base", "namespace": "team"}}
        made: AdapterDeployment = adapter(status=status)
        observation = AdapterObservation(
            artifact=resolve_artifact(made, "job", complete(), "s3://store"),
            pool=trained_pool(),
            lost_to=None,
            pods=pods,
            unplaced={},
            decision=Decision(len(pods), "the base of all pods"),
            url="",
        )
        return made.model_copy(update={"status": plan_adapter(made, observation, start)})

    return build


def test_pods_answer_under_the_revision_that_is_their_base(
    deployed: Build, trained_pool: Build, pod: Build, start: datetime
) -> None:
    old = {
        "digest": "sha256:" + "b" * 64,
        "uri": "s3://store/team/job-old/merged",
        "engineName": OLD,
        "baseModel": True,
        "state": "Resident",
        "readyReplicas": 2,
    }
    pods = [
        pod("p", base_artifact="sha256:" + "b" * 64, holds={OLD: "Resident"}),
        pod("q", base_artifact=DIGEST, ready=False),
        pod("r", base_artifact=DIGEST, holds={NEW: "Resident"}),
    ]
    served = deployed(pods, old)
    revisions = served.status.revisions
    assert [(entry.engine_name, entry.base_model, entry.ready_replicas) for entry in revisions] == [
        (NEW, True, 1),
        (OLD, True, 1),
    ]
    assert revisions[0].uri == "s3://store/team/job-uid-job/merged"
    progressing = find(served.status.conditions, "Progressing")
    assert progressing is not None
    assert progressing.message == "the pods of the pool get revision aaaaaaaaaaaa as their base model"
    assert find(served.status.conditions, "Parity") is None
    observation = PoolObservation(None, pods, [served], Decision(3, "as desired"))
    got = plan(trained_pool(engine={"maxLoras": 1, "maxAdapters": 1}), observation, start)
    assert {name: [entry.engine_name for entry in entries] for name, entries in got.assigned.items()} == {
        "p": [OLD],
        "q": [NEW],
        "r": [NEW],
    }
    assert (got.status.registered_adapters, got.unplaced) == (0, {})
    settled = deployed([pod(name, base_artifact=DIGEST, holds={NEW: "Resident"}) for name in "qr"], old)
    assert [entry.engine_name for entry in settled.status.revisions] == [NEW]
    assert settled.status.desired_replicas == settled.status.ready_replicas == 2
