"""Rendered objects against files. `GOLDEN=write pytest tests/finetune/test_render.py` writes them anew."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.finetune.worlds import STORE, job
from tunesmith.api.finetunejob import FineTuneJob
from tunesmith.api.finetunejob_status import FineTuneJobStatus
from tunesmith.contracts.location import CLAIMS_FOLDER
from tunesmith.contracts.network import NetworkPolicySettings
from tunesmith.finetune.observe import TRAIN, VALIDATE
from tunesmith.finetune.render import JobInstallation, attempt, configuration, isolation, rank_network, validation
from tunesmith.jobs.settings import JobSettings
from tunesmith.storage.schemes import STORE_KEYS

GOLDEN = Path(__file__).parent / "golden"
SETTINGS = JobSettings(
    store=STORE,
    trainer_image="registry.example/trainer@sha256:1",
    lm_eval_tasks="/opt/tasks",
    allowed_addresses=("10.0.0.7/32",),
)
INSTALLATION = JobInstallation(SETTINGS, cluster="0f0e0d0c-0000-4000-8000-00000000000c")
NETWORK = NetworkPolicySettings(namespace="tunesmith-system", instance="tunesmith")
EVERYTHING = job(
    baseModel={"uri": "hf://org/base", "secretRef": {"name": "hub"}},
    dataset={
        "train": [{"uri": "s3://a/b.jsonl", "secretRef": {"name": "mine"}}, {"uri": "pvc://data/c.jsonl"}],
        "validation": [{"uri": "s3://a/d.jsonl", "secretRef": {"name": "mine"}}, {"uri": "pvc://models/d.jsonl"}],
    },
    output={"exports": [{"hub": "org/tone", "secretRef": {"name": "push"}}, {"uri": "s3://a/tone"}]},
    resources={"gpus": 1, "cpu": "4", "memory": "32Gi"},
    scheduling={
        "nodeSelector": {"pool": "gpu"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "priorityClassName": "batch",
        "runtimeClassName": "nvidia",
    },
)
SEVERAL = job(resources={"gpus": 4, "nodes": 2}, scheduling={"queue": "team"})
RENDERED = {
    "configuration": configuration(EVERYTHING, VALIDATE),
    "validation": validation(EVERYTHING, INSTALLATION, 80 * 2**30),
    "attempt-gpu": attempt(EVERYTHING, 2, INSTALLATION),
    "attempt-nodes": attempt(SEVERAL, 1, INSTALLATION),
    "isolation": isolation(EVERYTHING, NETWORK),
    "rank_network": [*isolation(SEVERAL, NETWORK), *rank_network(SEVERAL)],
    "attempt-cpu": attempt(job(resources={"gpus": 0, "cpu": "1", "memory": "4Gi"}), 1, INSTALLATION),
}


@pytest.mark.parametrize("name", RENDERED)
def test_rendered_as_the_golden_file(name: str) -> None:
    path = GOLDEN / f"{name}.yaml"
    if os.environ.get("GOLDEN") == "write":
        path.write_text(yaml.safe_dump(RENDERED[name], sort_keys=False))
    assert RENDERED[name] == yaml.safe_load(path.read_text())


def test_the_trainer_reads_the_manifest_back() -> None:
    text: str = RENDERED["configuration"]["data"]["job.yaml"]
    read = FineTuneJob.model_validate(yaml.safe_load(text))
    assert (read.spec, read.metadata.uid) == (EVERYTHING.spec, EVERYTHING.metadata.uid)


def test_what_validation_resolved_goes_into_the_manifest_of_every_attempt() -> None:
    resolved = {"microBatchSize": 2, "gradientCheckpointing": True, "targetModules": ["q_proj"], "totalSteps": 9}
    validated = EVERYTHING.model_copy(update={"status": FineTuneJobStatus.model_validate({"resolved": resolved})})
    for number in (1, 2):
        volumes = attempt(validated, number, INSTALLATION)["spec"]["template"]["spec"]["volumes"]
        frozen = configuration(validated, TRAIN)
        assert volumes[0]["configMap"]["name"] == frozen["metadata"]["name"]
        assert FineTuneJob.model_validate(yaml.safe_load(frozen["data"]["job.yaml"])).status == validated.status
    assert "status" not in yaml.safe_load(configuration(validated, VALIDATE)["data"]["job.yaml"])


def test_one_node_needs_no_rank_network() -> None:
    assert rank_network(EVERYTHING) == []


def test_without_network_policies_only_pods_on_several_nodes_are_isolated() -> None:
    unwanted = replace(NETWORK, policies=False)
    assert isolation(EVERYTHING, unwanted) == []
    assert isolation(SEVERAL, unwanted) == isolation(SEVERAL, NETWORK)


def test_training_pods_accept_requests_for_metrics() -> None:
    monitoring = {"namespaceSelector": {"matchLabels": {"team": "sre"}}}
    [policy] = isolation(EVERYTHING, replace(NETWORK, metrics_from=(monitoring,)))
    assert policy["spec"]["ingress"][0]["from"] == [NETWORK.component("operator"), monitoring]


def test_pods_contain_no_secret_value_and_no_token() -> None:
    for name in ("validation", "attempt-gpu"):
        pod: dict[str, Any] = RENDERED[name]["spec"]["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert "AWS_" not in json.dumps(pod["containers"])


def test_a_referenced_secret_is_mounted_with_store_keys_only() -> None:
    named = job(
        baseModel={"uri": "s3://a/base", "secretRef": {"name": "db-password"}}, output={"reporting": ["MLflow"]}
    )
    for rendered in (validation(named, INSTALLATION), attempt(named, 1, INSTALLATION)):
        volumes = {volume["name"]: volume for volume in rendered["spec"]["template"]["spec"]["volumes"]}
        items = volumes["secret-0"]["secret"]["items"]
        assert [item["key"] for item in items] == list(STORE_KEYS)
        assert "items" not in volumes["secret-1"]["secret"]


def test_task_folders_are_mounted_and_run_only_where_the_platform_allows_them() -> None:
    folders = [{"uri": "s3://a/tasks", "secretRef": {"name": "tasks"}}, {"uri": "pvc://tasks/mine"}]
    suites = [
        {"name": f"t{number}", "lmEval": {"tasks": ["a"], "taskFolder": folder}}
        for number, folder in enumerate(folders)
    ]
    asking = job(evaluation={"suites": suites})
    for allowed in (False, True):
        installation = JobInstallation(SETTINGS.model_copy(update={"allow_task_folders": allowed}))
        for rendered in (validation(asking, installation), attempt(asking, 1, installation)):
            pod = rendered["spec"]["template"]["spec"]
            assert ("--allow-task-code" in pod["containers"][0]["args"]) is allowed
            places = {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
            assert {"/etc/tunesmith/secrets/tasks", f"{CLAIMS_FOLDER}/tasks"} <= places


@pytest.mark.parametrize(("reporting", "mounted"), [(["MLflow"], True), (["WandB"], True), (["TensorBoard"], False)])
def test_the_reporting_secret_is_mounted_if_a_tracker_has_a_server(reporting: list[str], *, mounted: bool) -> None:
    asking = job(output={"reporting": reporting})
    for rendered in (validation(asking, INSTALLATION), attempt(asking, 1, INSTALLATION)):
        pod = rendered["spec"]["template"]["spec"]
        secrets = [volume["secret"] for volume in pod["volumes"] if "secret" in volume]
        assert secrets == ([{"secretName": "tunesmith-reporting", "optional": True}] if mounted else [])
        places = [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]]
        assert ("/etc/tunesmith/secrets/tunesmith-reporting" in places) is mounted
