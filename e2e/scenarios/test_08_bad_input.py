"""Mistakes of users that only the cluster can detect: each is reported with its reason and affects nothing else."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import yaml

from e2e.custom_resources import adapter_manifest, finished_job, job_manifest
from e2e.demo import JOB
from e2e.installation import (
    DEMO,
    apply,
    condition,
    delete,
    get,
    in_store,
    items,
    kubectl,
    restricted_namespace,
    store_secret,
    until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from e2e.installation import Object

DENIED = "demo-denied"
SPEC = yaml.safe_load(JOB.read_text())["spec"]


def changed(**parts: object) -> Object:
    return {**copy.deepcopy(SPEC), **parts}


@pytest.fixture(scope="module")
def bad_jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Object]]:
    """Apply all bad jobs at once; return them when each has finished."""
    rows: Path = tmp_path_factory.mktemp("rows") / "malformed.jsonl"
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    rows.write_text(good + good + "{not json\n" + good)
    in_store("put", str(rows), "s3://tunesmith/data/malformed.jsonl")
    (rows.parent / "empty.jsonl").write_text("")
    in_store("put", str(rows.parent / "empty.jsonl"), "s3://tunesmith/data/empty.jsonl")
    apply(restricted_namespace(DENIED))
    apply(store_secret(DENIED, AWS_SECRET_ACCESS_KEY="wrong"))

    def data(name: str) -> Object:
        return changed(dataset={"train": [{"uri": f"s3://tunesmith/data/{name}"}]})

    jobs = {
        "wrong-credentials": job_manifest("wrong-credentials", SPEC, DENIED),
        "no-data": job_manifest("no-data", data("nowhere.jsonl")),
        "malformed": job_manifest("malformed", data("malformed.jsonl")),
        "empty": job_manifest("empty", data("empty.jsonl")),
        "no-base": job_manifest("no-base", changed(baseModel={"uri": "s3://tunesmith/models/nowhere"})),
    }
    apply(*jobs.values())
    yield {name: finished_job(name, job["metadata"]["namespace"]) for name, job in jobs.items()}
    for name, job in jobs.items():
        delete("finetunejob", name, job["metadata"]["namespace"])
    kubectl("delete", "namespace", DENIED, "--wait=false")


@pytest.mark.parametrize(
    ("name", "reason", "message"),
    [
        ("wrong-credentials", "AccessDenied", "s3://tunesmith/"),
        ("no-data", "DatasetNotFound", "nowhere.jsonl"),
        ("malformed", "DatasetInvalid", "line 3"),
        ("empty", "DatasetInvalid", "empty.jsonl"),
        ("no-base", "BaseModelNotFound", "s3://tunesmith/models/nowhere"),
    ],
)
def test_a_bad_job_fails_before_training_with_a_reason(
    bad_jobs: dict[str, Object], name: str, reason: str, message: str
) -> None:
    failed = condition(bad_jobs[name], "Failed")
    assert (failed["status"], failed["reason"]) == ("True", reason)
    assert message in failed["message"]
    assert "Traceback" not in failed["message"]
    assert not bad_jobs[name]["status"].get("attempts")


def test_an_adapter_reports_that_its_job_failed(bad_jobs: dict[str, Object]) -> None:
    apply(adapter_manifest("of-failed", bad_jobs["malformed"]["metadata"]["name"]))
    try:
        resolved = until("of-failed reports the reason", lambda: waits("of-failed", "malformed"), 60)
        assert "fail" in resolved["message"].lower()
    finally:
        delete("adapterdeployment", "of-failed", DEMO)


def test_an_adapter_waits_for_a_job_that_does_not_exist() -> None:
    apply(adapter_manifest("early", "not-there-yet"))
    try:
        assert until("early reports the missing job", lambda: waits("early", "not-there-yet"), 60)
    finally:
        delete("adapterdeployment", "early", DEMO)


def waits(adapter: str, word: str) -> Object | None:
    """Return the condition Resolved if it is False and its message contains the word."""
    resolved = condition(get("adapterdeployment", adapter, DEMO), "Resolved")
    return resolved if resolved["status"] == "False" and word in resolved["message"] else None


def test_the_older_of_two_claims_on_a_name_wins(main_adapter: str, pool: str) -> None:
    owner = get("adapterdeployment", main_adapter, DEMO) or {}
    job = owner["spec"]["adapterFrom"]["fineTuneJob"]["name"]
    apply(adapter_manifest("usurper", job, pool, modelName=owner["spec"].get("modelName", main_adapter)))
    try:

        def taken() -> bool:
            usurper = get("adapterdeployment", "usurper", DEMO)
            return "ModelNameTaken" in {
                entry["reason"] for entry in ((usurper or {}).get("status") or {}).get("conditions", [])
            }

        assert until("the second claim is refused", taken, 60)
        assert condition(get("adapterdeployment", main_adapter, DEMO), "Ready")["status"] == "True"
    finally:
        delete("adapterdeployment", "usurper", DEMO)


def test_deleting_a_job_while_it_trains_leaves_nothing() -> None:
    name = "deleted"
    labels = f"tunesmith.dev/finetunejob={name}"
    delete("finetunejob", name, DEMO)
    apply(job_manifest(name, changed(hyperparameters={**SPEC["hyperparameters"], "seed": 7})))

    def training() -> bool:
        status = (get("finetunejob", name, DEMO) or {}).get("status") or {}
        return (status.get("progress") or {}).get("stage") == "Training"

    until("the job trains", training, 300)
    delete("finetunejob", name, DEMO)
    for kind in ("jobs", "pods", "configmaps"):
        until(f"no {kind} are left", lambda kind=kind: not items(kind, DEMO, labels), 90)
