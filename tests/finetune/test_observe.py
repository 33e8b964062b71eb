from __future__ import annotations

from typing import Any

import pytest
from worlds import NOW, UID, manifest

from tunesmith.contracts.location import owned_name
from tunesmith.finetune.classify import ending
from tunesmith.finetune.observe import observe

Object = dict[str, Any]
TIME = "2026-11-24T11:59:00Z"


def kube_job(component: str, uid: str, attempt: str | None = None, **status: Any) -> Object:
    labels = {"app.kubernetes.io/component": component}
    if attempt is not None:
        labels["tunesmith.dev/attempt"] = attempt
    metadata = {"name": f"tone-{uid}", "uid": uid, "creationTimestamp": TIME, "labels": labels}
    return {"metadata": metadata, "status": status}


def kube_pod(owner: str, name: str, status: Object, created: str = TIME) -> Object:
    metadata = {
        "name": name,
        "creationTimestamp": created,
        "ownerReferences": [{"uid": owner, "name": f"tone-{owner}"}],
    }
    return {"metadata": metadata, "spec": {"nodeName": "node1"}, "status": status}


def terminated(**state: Any) -> Object:
    return {"containerStatuses": [{"name": "trainer", "state": {"terminated": state}}]}


def test_jobs_are_told_apart_and_get_their_own_pods() -> None:
    seen = observe(
        manifest(),
        [kube_job("train", "two", "2"), kube_job("validate", "zero"), kube_job("train", "one", "1")],
        [kube_pod("one", "a", {}), kube_pod("zero", "b", {}), kube_pod("stranger", "c", {})],
        None,
        NOW,
    )
    assert seen.validation is not None
    assert [pod.name for pod in seen.validation.pods] == ["b"]
    assert list(seen.attempts) == [1, 2]
    assert [pod.name for pod in seen.attempts[1].pods] == ["a"]


def attempts_pod(name: str, uid: str, phase: str) -> Object:
    """A pod of the first attempt of the FineTuneJob with that uid; the Job is gone."""
    pod = kube_pod("gone", name, {"phase": phase})
    pod["metadata"]["labels"] = {"tunesmith.dev/attempt": "1"}
    pod["metadata"]["ownerReferences"][0]["name"] = owned_name("tone", uid, "1")
    return pod


def test_a_pod_that_outlives_its_job_is_seen_until_it_has_ended() -> None:
    pods = [
        attempts_pod("saves", UID, "Running"),
        attempts_pod("saved", UID, "Failed"),
        attempts_pod("of-another-job-of-that-name", "0f0e0d0c-0000-4000-8000-000000000002", "Running"),
    ]
    assert observe(manifest(), [], pods, None, NOW).lingering == ("saves",)


def test_the_newest_pod_speaks_for_a_job() -> None:
    pods = [
        kube_pod("zero", "new", terminated(exitCode=0, finishedAt=TIME), "2026-11-24T11:59:30Z"),
        kube_pod("zero", "old", terminated(exitCode=3, finishedAt=TIME)),
    ]
    seen = observe(manifest(), [kube_job("validate", "zero")], pods, None, NOW)
    assert seen.validation is not None
    assert seen.validation.exit_code == 0


@pytest.mark.parametrize(
    ("name", "status", "expected"),
    [
        ("evicted by the kubelet", {"reason": "Evicted", "phase": "Failed"}, "Preempted"),
        (
            "evicted by the API",
            {**terminated(exitCode=137), "conditions": [{"type": "DisruptionTarget", "status": "True"}]},
            "Preempted",
        ),
        ("out of memory", terminated(exitCode=137, reason="OOMKilled"), "Failed"),
        ("a message that is no result", terminated(exitCode=1, message="{"), "Failed"),
    ],
)
def test_how_a_pod_ended(name: str, status: Object, expected: str) -> None:
    failed = {"type": "Failed", "status": "True", "lastTransitionTime": TIME}
    seen = observe(
        manifest(), [kube_job("train", "one", "1", conditions=[failed])], [kube_pod("one", "a", status)], None, NOW
    )
    assert ending(seen.attempts[1], "attempt 1").outcome == expected, name
