from __future__ import annotations

from typing import Any

import pytest

from tunesmith.serving.pod import observe_pod


def pod(**status: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "p", "namespace": "team", "uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z"},
        "status": status,
    }


def container(name: str, **state: Any) -> dict[str, Any]:
    return {"name": name, "image": "registry/x:1", **state}


@pytest.mark.parametrize(
    ("status", "reason", "message"),
    [
        pytest.param(
            {
                "conditions": [
                    {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes"}
                ]
            },
            "Unschedulable",
            "no node takes it: 0/1 nodes",
            id="unschedulable",
        ),
        pytest.param(
            {
                "initContainerStatuses": [
                    container("agent", state={"waiting": {"reason": "ImagePullBackOff", "message": "not found"}})
                ]
            },
            "ImagePullFailed",
            "image registry/x:1 of agent cannot be pulled: not found",
            id="image",
        ),
        pytest.param(
            {
                "initContainerStatuses": [
                    container(
                        "agent",
                        state={
                            "waiting": {
                                "reason": "CreateContainerConfigError",
                                "message": 'secret "tunesmith-store" not found',
                            }
                        },
                    )
                ]
            },
            "ContainerConfiguration",
            'container agent cannot be started: secret "tunesmith-store" not found',
            id="secret",
        ),
        pytest.param(
            {
                "initContainerStatuses": [
                    container(
                        "base-model",
                        state={"waiting": {"reason": "CrashLoopBackOff"}},
                        lastState={"terminated": {"exitCode": 2, "message": "s3://models/x does not exist."}},
                    )
                ]
            },
            "BaseModelUnavailable",
            "the base model cannot be fetched: s3://models/x does not exist.",
            id="base model",
        ),
        pytest.param(
            {
                "containerStatuses": [
                    container(
                        "engine",
                        state={"waiting": {"reason": "CrashLoopBackOff"}},
                        lastState={
                            "terminated": {"exitCode": 1, "message": "Traceback\n  File x\nValueError: bad argument\n"}
                        },
                    )
                ]
            },
            "EngineFailed",
            "the engine ended: ValueError: bad argument",
            id="engine",
        ),
        pytest.param(
            {
                "containerStatuses": [
                    container("engine", state={"terminated": {"exitCode": 137, "reason": "OOMKilled"}})
                ]
            },
            "EngineFailed",
            "the engine ended (out of memory)",
            id="memory",
        ),
        pytest.param(
            {
                "initContainerStatuses": [
                    container(
                        "base-model", state={"terminated": {"exitCode": 3, "message": '{"message": "no bucket"}'}}
                    )
                ]
            },
            "BaseModelUnavailable",
            "the base model cannot be fetched: no bucket",
            id="json",
        ),
    ],
)
def test_problems(status: dict[str, Any], reason: str, message: str) -> None:
    problem = observe_pod(pod(**status)).problem
    assert problem is not None
    assert (problem.reason, problem.message) == (reason, message)


@pytest.mark.parametrize(
    "status",
    [
        {},
        {"initContainerStatuses": [container("base-model", state={"terminated": {"exitCode": 0}})]},
        {"containerStatuses": [container("engine", state={"waiting": {"reason": "PodInitializing"}})]},
        {"containerStatuses": [container("engine", state={"running": {}}, lastState={"terminated": {"exitCode": 1}})]},
    ],
)
def test_no_problem(status: dict[str, Any]) -> None:
    assert observe_pod(pod(**status)).problem is None


def test_what_is_read() -> None:
    manifest = pod(
        podIP="10.0.0.1",
        conditions=[{"type": "Ready", "status": "True"}, {"type": "tunesmith.dev/adapters", "status": "False"}],
    )
    manifest["metadata"]["annotations"] = {"controller.kubernetes.io/pod-deletion-cost": "3"}
    found = observe_pod(manifest)
    assert (found.ready, found.gate, found.address, found.deletion_cost, found.stopping) == (
        True,
        False,
        "10.0.0.1",
        "3",
        False,
    )
    assert observe_pod(pod()).gate is None
    manifest["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert observe_pod(manifest).stopping
    assert observe_pod(pod(phase="Failed")).stopping
