"""Only Secrets that are labelled for it may be named, by the chart's admission policies on a real API server."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

import pytest

from tests.controlplane.manifests import adapter, job, pool
from tests.controlplane.operatorprocess import until
from tests.controlplane.rights import grant
from tunesmith.api.credentials import CREDENTIALS_LABEL
from tunesmith.api.finetunejob import FineTuneJob
from tunesmith.finetune import render
from tunesmith.jobs.settings import JobSettings

if TYPE_CHECKING:
    from tests.controlplane.apiserver import ApiServer

pytestmark = pytest.mark.controlplane
Object = dict[str, Any]
REF = {"secretRef": {"name": "mine"}}
ROWS = {"uri": "s3://data/rows.jsonl"}
SENTENCE = "a secretRef names the Secret mine, which is not labelled tunesmith.dev/credentials=true"
NAMED = {
    "base model": job("", baseModel={"uri": "hf://org/base", **REF}),
    "rows": job("", dataset__train=[ROWS, {**ROWS, **REF}]),
    "held-out rows": job("", dataset__validation=[{**ROWS, **REF}]),
    "rows of a suite": job("", evaluation={"suites": [{"name": "a", "generation": {"dataset": {**ROWS, **REF}}}]}),
    "tasks": job(
        "",
        evaluation={
            "suites": [{"name": "a", "lmEval": {"tasks": ["a"], "taskFolder": {"uri": "s3://data/tasks", **REF}}}]
        },
    ),
    "export": job("", output={"exports": [{"uri": "s3://copies/a"}, {"hub": "org/a", **REF}]}),
    "adapter from elsewhere": adapter("", adapterFrom={"artifact": {"uri": "hf://org/adapter", **REF}}),
    "base model of a pool": pool("", baseModel={"uri": "hf://org/base", **REF}),
}


@pytest.fixture(scope="module")
def guarded(server: ApiServer) -> ApiServer:
    server.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "tunesmith-system"}})
    grant(server, "tunesmith-system")
    return server


@pytest.fixture
def space(guarded: ApiServer) -> str:
    name = f"test-{secrets.token_hex(4)}"
    guarded.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    return name


def secret(namespace: str, name: str = "mine", *, labelled: bool = False) -> Object:
    labels = {CREDENTIALS_LABEL: "true"} if labelled else {}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "stringData": {"HF_TOKEN": "hf_nobodyMayReadThis"},
    }


def refused(server: ApiServer, manifest: Object) -> str:
    """Return what the API server answers to a dry run; empty where it accepts the object."""
    done = server.kubectl("create", "--dry-run=server", "-f", "-", manifest=manifest)
    return done.stderr if done.returncode else ""


@pytest.mark.parametrize("manifest", NAMED.values(), ids=NAMED.keys())
async def test_a_secret_without_the_label_is_refused_wherever_it_is_named(
    guarded: ApiServer, space: str, manifest: Object
) -> None:
    manifest = {**manifest, "metadata": {**manifest["metadata"], "namespace": space}}
    guarded.apply(secret(space))

    async def denied() -> bool:
        return SENTENCE in refused(guarded, manifest)

    # The API server learns of policies and Secrets by watching them.
    await until(denied, "the refusal", seconds=180)
    assert "label --overwrite secret mine tunesmith.dev/credentials=true" in refused(guarded, manifest)
    assert "hf_nobody" not in refused(guarded, manifest)
    guarded.apply(secret(space, labelled=True))

    async def accepted() -> bool:
        return refused(guarded, manifest) == ""

    await until(accepted, "the acceptance once the Secret is labelled")
    guarded.apply(secret(space, "other"))
    assert refused(guarded, manifest) == ""


async def test_a_secret_that_is_created_later_reaches_no_pod(guarded: ApiServer, space: str) -> None:
    manifest = job(space, baseModel={"uri": "hf://org/base", **REF}, output={"reporting": ["MLflow"]})
    created = guarded.get("namespace", space)
    parsed = FineTuneJob.model_validate(
        {**manifest, "metadata": {**manifest["metadata"], "uid": created["metadata"]["uid"]}}
    )
    installation = render.JobInstallation(
        JobSettings(store="s3://tunesmith/store", trainer_image="localhost/trainer:1")
    )
    rendered = render.validation(parsed, installation)
    del rendered["metadata"]["ownerReferences"]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "a", "namespace": space, "labels": rendered["metadata"]["labels"]},
        "spec": rendered["spec"]["template"]["spec"],
    }
    for name in ("tunesmith-store", "tunesmith-reporting"):
        guarded.apply(secret(space, name))
    assert (refused(guarded, rendered), refused(guarded, pod)) == ("", "")
    guarded.apply(secret(space))

    async def denied() -> bool:
        return all(SENTENCE in refused(guarded, item) for item in (rendered, pod))

    await until(denied, "the refusal of Job and pod")
