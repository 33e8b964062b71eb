from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from tunesmith.api.placement import Toleration
from tunesmith.contracts.quantities import pod_requests
from tunesmith.serving.node_capacity import candidates, has_room


def node(name: str = "n", *, ready: str = "True", **spec: Any) -> dict[str, Any]:
    allocatable = {"cpu": "7910m", "memory": "16331752Ki", "nvidia.com/gpu": "2", "pods": "110"}
    return {
        "metadata": {"name": name},
        "spec": spec,
        "status": {"conditions": [{"type": "Ready", "status": ready}], "allocatable": allocatable},
    }


def pod(cpu: str, gpus: int = 0) -> dict[str, Any]:
    requests = {"cpu": cpu, **({"nvidia.com/gpu": str(gpus)} if gpus else {})}
    return {"containers": [{"resources": {"requests": requests}}]}


def test_requests_of_a_pod() -> None:
    spec = {
        "overhead": {"cpu": "10m"},
        "initContainers": [
            {"resources": {"requests": {"cpu": "3"}}},
            {"restartPolicy": "Always", "resources": {"requests": {"cpu": "50m", "memory": "256Mi"}}},
            {"resources": {"requests": {"cpu": "1"}}},
        ],
        "containers": [{"resources": {"requests": {"cpu": "2", "nvidia.com/gpu": "1"}}}, {}],
    }
    assert pod_requests(spec) == {
        "pods": 1, "cpu": Decimal("3.01"), "memory": 256 * 2**20, "nvidia.com/gpu": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("used", "expected"),
    [
        pytest.param([], True, id="empty"),
        pytest.param([pod("1", 1)], True, id="one GPU is free"),
        pytest.param([pod("1", 1), pod("1", 1)], False, id="no GPU is free"),
        pytest.param([pod("7")], False, id="no CPU is free"),
        pytest.param([pod("1m")] * 110, False, id="as many pods as the node holds"),
        pytest.param([pod("not a quantity")], True, id="unreadable"),
    ],
)
def test_has_room(used: list[dict[str, Any]], expected: bool) -> None:  # noqa: FBT001
    assert has_room(node(), pod_requests(pod("1", 1)), map(pod_requests, used)) is expected


def test_candidates() -> None:
    taint = {"key": "nvidia.com/gpu", "effect": "NoSchedule"}
    nodes = [
        node("tainted", taints=[taint]),
        node("cordoned", unschedulable=True),
        node("lost", ready="Unknown"),
        node("b"),
        node("a", taints=[{**taint, "effect": "PreferNoSchedule"}]),
    ]
    requests = pod_requests(pod("1", 1))
    assert candidates(nodes, requests, []) == ["a", "b"]
    tolerations = [Toleration(key="nvidia.com/gpu", operator="Exists")]
    assert candidates(nodes, requests, tolerations) == ["a", "b", "tainted"]
    assert candidates(nodes, pod_requests(pod("8")), tolerations) == []
