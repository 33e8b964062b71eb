from __future__ import annotations

from typing import Any

import pytest

from tests.finetune.worlds import job
from tunesmith.finetune.gpu_memory import gpu_memory_bytes

MIB = 2**20
A100, T4 = "81920", "15360"
SPOT = {"key": "spot", "value": "yes", "effect": "NoSchedule"}


def node(
    memory: str | None, *, gpus: str = "1", resource: str = "nvidia.com/gpu", taints: Any = (), **labels: str
) -> dict[str, Any]:
    found = {name.replace("__", "/"): value for name, value in labels.items()}
    if memory is not None:
        found[f"{resource}.memory"] = memory
    return {
        "metadata": {"name": "node", "labels": found},
        "spec": {"taints": list(taints)},
        "status": {"allocatable": {"cpu": "4", resource: gpus}},
    }


CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]], int | None]] = {
    "no nodes": ({}, [], None),
    "one node": ({}, [node(A100)], 81920),
    "the smallest": ({}, [node(A100), node(T4)], 15360),
    "no node has a GPU": ({}, [node(None, gpus="0")], None),
    "a node without a GPU does not count": ({}, [node(A100), node(None, gpus="0")], 81920),
    "a GPU whose memory nobody tells": ({}, [node(A100), node(None)], None),
    "a label that is no number": ({}, [node("80GiB")], None),
    "GPUs that pods share": ({}, [node(A100, **{"nvidia.com__gpu.replicas": "4"})], None),
    "the job trains on the CPU": ({"resources": {"gpus": 0}}, [node(A100)], None),
    "a selector": ({"scheduling": {"nodeSelector": {"pool": "big"}}}, [node(A100, pool="big"), node(T4)], 81920),
    "a selector that fits no node": ({"scheduling": {"nodeSelector": {"pool": "big"}}}, [node(T4)], None),
    "a taint keeps the job off": ({}, [node(A100), node(T4, taints=[SPOT])], 81920),
    "a taint that is tolerated": (
        {"scheduling": {"tolerations": [{"key": "spot", "value": "yes"}]}},
        [node(A100), node(T4, taints=[SPOT])],
        15360,
    ),
    "a taint of another value": (
        {"scheduling": {"tolerations": [{"key": "spot", "value": "no"}]}},
        [node(A100), node(T4, taints=[SPOT])],
        81920,
    ),
    "everything is tolerated": (
        {"scheduling": {"tolerations": [{"operator": "Exists"}]}},
        [node(A100), node(T4, taints=[SPOT])],
        15360,
    ),
    "a taint that only advises": ({}, [node(A100), node(T4, taints=[SPOT | {"effect": "PreferNoSchedule"}])], 15360),
    "a node that is not ready for the moment": (
        {},
        [node(T4, taints=[{"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}])],
        15360,
    ),
    "the taint of GPU nodes": ({}, [node(T4, taints=[{"key": "nvidia.com/gpu", "effect": "NoSchedule"}])], 15360),
    "a MIG profile": (
        {"resources": {"gpuResource": "nvidia.com/mig-1g.10gb"}},
        [node("9856", resource="nvidia.com/mig-1g.10gb"), node(A100)],
        9856,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_memory_of_the_smallest_gpu_that_the_job_may_get(case: str) -> None:
    spec, nodes, mebibytes = CASES[case]
    assert gpu_memory_bytes(job(**spec), nodes) == (None if mebibytes is None else mebibytes * MIB)
