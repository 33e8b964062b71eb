"""Training in two pods gives the same curve as in one, to the fourth digit.

Whether each pod holds the whole base, or the two share it (FSDP2).
"""

from __future__ import annotations

import csv
import json
from typing import TYPE_CHECKING

import pytest
import yaml

from e2e.custom_resources import finished_job, job_manifest
from e2e.demo import JOB
from e2e.installation import DEMO, apply, condition, delete, get, in_store, items, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from e2e.installation import Object

NODES = {
    "one-node": {"nodes": 1},
    "two-nodes": {"nodes": 2},
    "two-that-share": {"nodes": 2, "dataParallelism": "FSDP2"},
}
COLUMNS = ("loss", "gradientNorm", "evaluationLoss")


@pytest.fixture
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Object]]:
    """Create the jobs, wait until they are complete, and remove them at the end."""
    rows = tmp_path_factory.mktemp("rows") / "nodes.jsonl"
    with rows.open("w") as file:
        for number in range(24):
            turns = [
                {"role": "user", "content": f"What is {number}?"},
                {"role": "assistant", "content": f"A number, and {'an odd' if number % 2 else 'an even'} one."},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    uri = f"s3://tunesmith/data/{rows.name}"
    in_store("put", str(rows), uri)
    spec = yaml.safe_load(JOB.read_text())["spec"] | {
        "dataset": {"train": [{"uri": uri}], "maxLength": 64},
        "method": {"lora": {"rank": 8, "alpha": 16, "dropout": 0.1}},
        "hyperparameters": {"maxSteps": 6, "learningRate": 1e-3, "batchSize": 4, "microBatchSize": 2},
        "checkpoint": {"everySteps": 2},
    }
    found = {}
    for name, nodes in NODES.items():
        delete("finetunejob", name, DEMO)
        resources = {"gpus": 0, "cpu": "500m", "memory": "3Gi"} | nodes
        apply(job_manifest(name, spec | {"resources": resources}))
        # one after the other: a small machine has no room for three training pods
        found[name] = finished_job(name)
    yield found
    for name in NODES:
        delete("finetunejob", name, DEMO)


def curve(job: Object) -> list[dict[str, str]]:
    """Return the curves that were published with the artifact."""
    return list(csv.DictReader(in_store("read", f"{job['status']['artifact']['uri']}/metrics.csv").splitlines()))


@pytest.mark.long
def test_training_on_two_nodes_equals_training_on_one(jobs: dict[str, Object]) -> None:
    for job in jobs.values():
        assert condition(job, "Complete")["status"] == "True", condition(job, "Failed")
        assert [attempt["outcome"] for attempt in job["status"]["attempts"]] == ["Succeeded"]
    one = curve(jobs["one-node"])
    for two in (curve(jobs["two-nodes"]), curve(jobs["two-that-share"])):
        assert [point["step"] for point in one] == [point["step"] for point in two]
        for point, expected in zip(two, one, strict=True):
            for name in COLUMNS:
                assert float(point[name] or 0) == pytest.approx(float(expected[name] or 0), rel=1e-4), (point, expected)
    parallelism = {name: job["status"]["resolved"].get("dataParallelism") for name, job in jobs.items()}
    assert parallelism == {"one-node": None, "two-nodes": "DDP", "two-that-share": "FSDP2"}
    pods = items("pods", DEMO, "tunesmith.dev/finetunejob=two-nodes,app.kubernetes.io/component=train")
    assert sorted(pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"] for pod in pods) == ["0", "1"]
    (service,) = items("services", DEMO, "tunesmith.dev/finetunejob=two-nodes")
    delete("finetunejob", "two-nodes", DEMO)

    def gone() -> bool:
        return get("service", service["metadata"]["name"], DEMO) is None

    until("the job's Service is removed with it", gone, 60)
