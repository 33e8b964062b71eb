"""Imports of adapters: the Job in `golden/import.yaml`, and what follows from its state."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tunesmith.api.adapterdeployment import ImportedAdapter
from tunesmith.api.conditions import FailureReason
from tunesmith.api.finetunejob_status import ArtifactStatus, ServableStatus
from tunesmith.api.pool_base_model import BaseModelArtifact
from tunesmith.contracts.refusal import Refusal, RefusalCause
from tunesmith.contracts.result import Outcome, TrainerResult
from tunesmith.jobs.observe import JobView, PodView
from tunesmith.jobs.settings import JobSettings
from tunesmith.serving.imports import ImportBase, ImportPlan, base_of, import_job, is_import_of, job_name, plan_import
from tunesmith.serving.resolve import Artifact, Candidates, Unresolved

if TYPE_CHECKING:
    from collections.abc import Callable

    from tunesmith.api.adapterdeployment import AdapterDeployment
    from tunesmith.api.servingpool import ServingPool

GOLDEN = Path(__file__).parent / "golden" / "import.yaml"
STORE = "s3://tunesmith/store"
NOW = datetime(2026, 11, 30, 12, tzinfo=UTC)
DIGEST = f"sha256:{'a' * 64}"
SETTINGS = JobSettings(trainer_image="registry/trainer@sha256:1", store=STORE)
RESULT = TrainerResult(
    outcome=Outcome.SUCCEEDED,
    message="imported hf://org/doors (PEFT, rank 8)",
    artifact=ArtifactStatus(uri="s3://elsewhere/x", digest=DIGEST, size_bytes=7, servable=ServableStatus(vllm=True)),
    imported=ImportedAdapter(base_model_fingerprint="sha256:f", rank=8, parity=True, missed_gates=1),
)


def elsewhere(adapter: Callable[..., Any], uri: str = "hf://org/doors", **artifact: Any) -> AdapterDeployment:
    built: AdapterDeployment = adapter(adapterFrom={"artifact": {"uri": uri, **artifact}})
    return built


def decide(
    adapter: AdapterDeployment, *pools: ServingPool, jobs: dict[str, JobView] | None = None, **more: Any
) -> ImportPlan:
    source = adapter.spec.adapter_from.artifact
    assert source is not None
    candidates = more.pop("candidates", Candidates(own=pools))
    return plan_import(adapter, source, candidates, jobs or {}, more.pop("now", NOW), STORE, **more)


def named(adapter: AdapterDeployment, pool: ServingPool) -> str:
    assert adapter.spec.adapter_from.artifact is not None
    base = base_of(pool)
    assert base is not None
    return job_name(adapter, adapter.spec.adapter_from.artifact, base)


def finished(name: str, result: TrainerResult | None, *, code: int = 0) -> JobView:
    message = "" if result is None else result.termination_message()
    pod = PodView("pod", NOW, finished_at=NOW, exit_code=code, termination_message=message)
    return JobView(name, NOW, succeeded=code == 0, failed=code != 0, finished_at=NOW, pods=(pod,))


def reason(found: ImportPlan) -> str:
    assert isinstance(found.artifact, Unresolved)
    return found.artifact.reason


def message(found: ImportPlan) -> str:
    assert isinstance(found.artifact, Unresolved)
    return found.artifact.message


def test_the_job_is_rendered_as_the_golden_file(adapter: Callable[..., Any], pool: Callable[..., Any]) -> None:
    wanted = elsewhere(adapter, "pvc://adapters/doors", digest=DIGEST)
    base = pool(baseModel={"uri": "hf://org/base", "revision": "main", "secretRef": {"name": "hub"}})
    assert wanted.spec.adapter_from.artifact is not None
    base_model = ImportBase("hf://org/base", "main", "hub")
    assert base_of(base) == base_model
    rendered = import_job(
        wanted, wanted.spec.adapter_from.artifact, base_model, SETTINGS, "0f0e0d0c-0000-4000-8000-00000000000c"
    )
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(yaml.safe_dump(rendered, sort_keys=False))
    assert rendered == yaml.safe_load(GOLDEN.read_text()), "UPDATE_GOLDEN=1 writes it again"
    assert is_import_of(wanted, rendered)
    assert not is_import_of(elsewhere(lambda **spec: adapter("other", **spec)), rendered)


def test_images_are_mounted_beside_the_claims(adapter: Callable[..., Any]) -> None:
    wanted = elsewhere(adapter, "oci://registry/doors:1/adapter")
    assert wanted.spec.adapter_from.artifact is not None
    base = ImportBase("oci://registry/base:1")
    pod = import_job(wanted, wanted.spec.adapter_from.artifact, base, SETTINGS)["spec"]["template"]["spec"]
    images = {volume["name"]: volume["image"]["reference"] for volume in pod["volumes"] if "image" in volume}
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert {mounts[name]: reference for name, reference in images.items()} == {
        "/mnt/claims/_adapter": "registry/doors:1",
        "/mnt/claims/_base": "registry/base:1",
    }


def test_a_job_is_created_for_the_base_model_of_the_only_pool(
    adapter: Callable[..., Any], pool: Callable[..., Any]
) -> None:
    found = decide(elsewhere(adapter), pool())
    assert (reason(found), found.create, found.delete) == ("Importing", base_of(pool()), ())


def test_names_differ_by_adapter_uri_secret_and_base_model(
    adapter: Callable[..., Any], pool: Callable[..., Any]
) -> None:
    base, other = pool(), pool(baseModel={"uri": "s3://models/other"})
    adapters = [
        elsewhere(adapter),
        elsewhere(adapter, "hf://org/other"),
        elsewhere(adapter, secretRef={"name": "hub"}),
        elsewhere(lambda **spec: adapter("x" * 60, modelName="x", **spec)),
    ]
    names = {named(item, of) for item in adapters for of in (base, other)}
    assert len(names) == 2 * len(adapters)
    assert max(map(len, names)) <= 63


def test_without_a_name_several_pools_are_ambiguous(adapter: Callable[..., Any], pool: Callable[..., Any]) -> None:
    found = decide(elsewhere(adapter), pool("a"), pool("b"))
    assert reason(found) == "SeveralPools"
    assert "ServingPools team/a and team/b: name one of them in spec.pool" in message(found)
    assert reason(decide(elsewhere(adapter))) == "NoMatchingPool"


def test_a_running_job_states_what_it_waits_for(adapter: Callable[..., Any], pool: Callable[..., Any]) -> None:
    wanted, base = elsewhere(adapter), pool()
    name = named(wanted, base)
    waiting = JobView(name, NOW, pods=(PodView("pod", NOW, unschedulable="no node has 8Gi"),))
    found = decide(wanted, base, jobs={name: waiting})
    assert (reason(found), found.create, found.delete) == ("Importing", None, ())
    assert "waits for a node: no node has 8Gi" in message(found)
    running = JobView(name, NOW, pods=(PodView("pod", NOW, running=True),))
    assert message(decide(wanted, base, jobs={name: running})) == f"Job {name} imports hf://org/doors"


def test_the_artifact_is_at_the_computed_location(adapter: Callable[..., Any], pool: Callable[..., Any]) -> None:
    wanted, base = elsewhere(adapter), pool()
    name = named(wanted, base)
    found = decide(wanted, base, jobs={name: finished(name, RESULT)})
    folder = f"{STORE}/team/pirate-uid-pirate/import-{name.rpartition('-')[2]}/artifact"
    assert found.artifact == Artifact(DIGEST, folder, "sha256:f", "import of hf://org/doors", rank=8, missed_gates=1)
    assert found.record is not None
    assert found.record.artifact is not None
    assert found.record.artifact.uri == folder
    assert found.record.message == RESULT.message


def test_a_recorded_import_lasts_without_its_job_and_its_pool(
    adapter: Callable[..., Any], pool: Callable[..., Any]
) -> None:
    wanted, base = elsewhere(adapter), pool()
    name = named(wanted, base)
    record = decide(wanted, base, jobs={name: finished(name, RESULT)}).record
    done = wanted.model_copy(update={"status": wanted.status.model_copy(update={"adapter_import": record})})
    for pools in ((base,), (), (pool("a"), pool("b"))):
        found = decide(done, *pools)
        assert isinstance(found.artifact, Artifact)
        assert (found.record, found.create) == (record, None)
    moved = done.model_copy(update={"spec": elsewhere(adapter, "hf://org/other").spec})
    assert decide(moved, base).create is not None
    other = pool("other", baseModel={"uri": "s3://models/other"})
    spec = done.spec.model_copy(update={"pool": adapter(pool={"name": "other"}).spec.pool})
    elsewhere_served = done.model_copy(update={"spec": spec})
    found = decide(elsewhere_served, candidates=Candidates(named=other, admitted=True))
    assert found.create == base_of(other)


def test_an_adapter_that_the_engine_cannot_load_is_not_servable(
    adapter: Callable[..., Any], pool: Callable[..., Any]
) -> None:
    wanted, base = elsewhere(adapter), pool()
    name = named(wanted, base)
    assert RESULT.artifact is not None
    dora = RESULT.artifact.model_copy(update={"servable": ServableStatus(vllm=False, reason="it uses DoRA")})
    found = decide(wanted, base, jobs={name: finished(name, RESULT.model_copy(update={"artifact": dora}))})
    assert reason(found) == "NotServable"
    assert "it uses DoRA" in message(found)


def test_a_fault_of_the_adapter_is_not_tried_again(adapter: Callable[..., Any], pool: Callable[..., Any]) -> None:
    wanted, base = elsewhere(adapter), pool()
    name = named(wanted, base)
    failed = TrainerResult(outcome=Outcome.FAILED, reason=FailureReason.INVALID_SPEC, message="it is a pickle file")
    for now in (NOW, NOW + timedelta(days=1)):
        found = decide(wanted, base, jobs={name: finished(name, failed, code=2)}, now=now)
        assert (reason(found), found.delete, found.requeue_after) == ("ImportFailed", (), None)
        assert "hf://org/doors could not be imported: it is a pickle file" in message(found)
        assert f"delete Job {name}" in message(found)
        assert found.record is not None
        assert found.record.artifact is None


def test_an_outage_is_tried_again_after_a_while(adapter: Callable[..., Any], pool: Callable[..., Any]) -> None:
    wanted, base = elsewhere(adapter), pool()
    name = named(wanted, base)
    outage = TrainerResult(
        outcome=Outcome.FAILED, reason=FailureReason.STORAGE_UNAVAILABLE, message="the store is silent", retryable=True
    )
    early = decide(wanted, base, jobs={name: finished(name, outage, code=3)})
    assert (reason(early), early.delete, early.requeue_after) == ("ImportFailed", (), timedelta(minutes=10))
    late = decide(wanted, base, jobs={name: finished(name, outage, code=3)}, now=NOW + timedelta(minutes=10))
    assert late.delete == (name,)
    assert late.create is None
    assert decide(wanted, base).create is not None


def test_a_lost_report_is_read_again_by_another_job(adapter: Callable[..., Any], pool: Callable[..., Any]) -> None:
    wanted, base = elsewhere(adapter), pool()
    name = named(wanted, base)
    lost = decide(wanted, base, jobs={name: replace(finished(name, None), pods=())})
    assert (reason(lost), lost.delete) == ("Importing", (name,))
    terminating = replace(finished(name, None), deleting=True)
    assert decide(wanted, base, jobs={name: terminating}).create is None


def test_jobs_of_an_earlier_spec_are_deleted(adapter: Callable[..., Any], pool: Callable[..., Any]) -> None:
    old = JobView("old", NOW)
    assert decide(elsewhere(adapter), pool(), jobs={"old": old}).delete == ("old",)


def test_a_refused_job_is_a_state(adapter: Callable[..., Any], pool: Callable[..., Any]) -> None:
    refusal = Refusal("create", "Job", "the API server refuses Job team/x: quota exceeded", RefusalCause.QUOTA)
    found = decide(elsewhere(adapter), pool(), refusal=refusal)
    assert reason(found) == "ImportRefused"
    assert "quota exceeded" in message(found)
    assert found.requeue_after is not None


def test_a_pool_of_a_trained_model_is_waited_for(adapter: Callable[..., Any], pool: Callable[..., Any]) -> None:
    trained = pool(baseModel={"from": {"fineTuneJob": {"name": "whole"}}})
    assert reason(decide(elsewhere(adapter), trained)) == "PoolNotReported"
    published = BaseModelArtifact(digest=DIGEST, uri=f"{STORE}/team/whole-1/merged")
    status = trained.status.model_copy(update={"base_model_artifact": published})
    found = decide(elsewhere(adapter), trained.model_copy(update={"status": status}))
    assert found.create == ImportBase(published.uri)


@pytest.mark.parametrize(
    ("uri", "base", "expected"),
    [
        (f"{STORE}/other/doors-1/artifact", {}, "NotAllowed"),
        (f"{STORE}/team/doors-1/artifact", {}, "Importing"),
        ("hf://org/doors", {"namespace": "ml", "baseModel": {"uri": "pvc://models/base"}}, "ImportFailed"),
        ("hf://org/doors", {"baseModel": {"uri": "pvc://models/base"}}, "Importing"),
        ("oci://registry/doors:1", {"baseModel": {"uri": "oci://registry/base:1"}}, "Importing"),
    ],
)
def test_what_the_namespace_may_not_read_is_not_imported(
    adapter: Callable[..., Any], pool: Callable[..., Any], uri: str, base: dict[str, Any], expected: str
) -> None:
    found = decide(elsewhere(adapter, uri), pool(**base))
    assert reason(found) == expected
    assert (found.create is not None) == (expected == "Importing")
