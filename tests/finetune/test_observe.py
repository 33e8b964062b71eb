from __future__ import annotations

from typing import Any

import pytest
from plan_cases import NODE_FULL
from worlds import NOW, UID, job

from tunesmith.contracts.location import owned_name
from tunesmith.finetune.classify import ending, obstacle
from tunesmith.finetune.observe import observe

Object = dict[str, Any]
TIME = "2026-11-24T11:59:00Z"


def kube_job(component: str, uid: str, attempt: str | None = None, **status: Any) -> Object:
    labels = {"app.kubernetes.io/component": component}
    if attempt is not None:
        labels["tunesmith.dev/attempt"] = attempt
    metadata = {
        "name": owned_name("tone", UID, attempt or component),
        "namespace": "team",
        "uid": uid,
        "creationTimestamp": TIME,
        "labels": labels,
        "ownerReferences": [{"kind": "FineTuneJob", "name": "tone", "uid": UID, "controller": True}],
    }
    return {"metadata": metadata, "status": status}


def kube_pod(owner: str, name: str, status: Object, created: str = TIME, index: str | None = None) -> Object:
    metadata = {
        "name": name,
        "namespace": "team",
        "creationTimestamp": created,
        "labels": {} if index is None else {"batch.kubernetes.io/job-completion-index": index},
        "ownerReferences": [{"kind": "Job", "uid": owner, "name": f"tone-{owner}", "controller": True}],
    }
    return {"metadata": metadata, "spec": {"nodeName": "node1"}, "status": status}


def terminated(**state: Any) -> Object:
    return {"containerStatuses": [{"name": "trainer", "state": {"terminated": state}}]}


def test_jobs_are_told_apart_and_get_their_own_pods() -> None:
    seen = observe(
        job(),
        [kube_job("train", "two", "2"), kube_job("validate", "zero"), kube_job("train", "one", "1")],
        [kube_pod("one", "a", {}), kube_pod("zero", "b", {}), kube_pod("stranger", "c", {})],
        None,
        NOW,
    )
    assert seen.validation is not None
    assert [pod.name for pod in seen.validation.pods] == ["b"]
    assert list(seen.attempts) == [1, 2]
    assert [pod.name for pod in seen.attempts[1].pods] == ["a"]


ANOTHER = "0f0e0d0c-0000-4000-8000-000000000002"
FORGED = {
    "in another namespace": {"namespace": "foreign"},
    "of a FineTuneJob of that name that is gone": {
        "ownerReferences": [{"kind": "FineTuneJob", "name": "tone", "uid": ANOTHER, "controller": True}]
    },
    "of a FineTuneJob with another name": {
        "ownerReferences": [{"kind": "FineTuneJob", "name": "other", "uid": UID, "controller": True}]
    },
    "owned, and not controlled": {"ownerReferences": [{"kind": "FineTuneJob", "name": "tone", "uid": UID}]},
    "of another kind": {"ownerReferences": [{"kind": "Pod", "name": "tone", "uid": UID, "controller": True}]},
    "without an owner": {"ownerReferences": []},
    "with a name of its own": {"name": "tone-1"},
    "with the name of another attempt": {"name": owned_name("tone", UID, "2")},
    "with a number that is none": {
        "name": owned_name("tone", UID, "²"),
        "labels": {"app.kubernetes.io/component": "train", "tunesmith.dev/attempt": "²"},
    },
}


@pytest.mark.parametrize("changes", FORGED.values(), ids=FORGED.keys())
@pytest.mark.parametrize("attempt", [None, "1"], ids=["validation", "attempt"])
def test_a_job_that_only_looks_like_its_own_is_not_counted(changes: Object, attempt: str | None) -> None:
    forged = kube_job("validate" if attempt is None else "train", "one", attempt)
    forged["metadata"] |= changes
    seen = observe(job(), [forged], [kube_pod("one", "a", {})], None, NOW)
    assert (seen.validation, seen.attempts) == (None, {})


@pytest.mark.parametrize(
    "changes",
    [
        {"namespace": "foreign"},
        {"ownerReferences": [{"kind": "Job", "uid": "one", "name": "tone"}]},
        {"ownerReferences": [{"kind": "ReplicaSet", "uid": "one", "name": "tone", "controller": True}]},
    ],
    ids=["in another namespace", "not controlled", "of another kind"],
)
def test_a_pod_that_only_names_the_jobs_uid_is_not_counted(changes: Object) -> None:
    pod = kube_pod("one", "a", terminated(exitCode=2, message=FAULT))
    pod["metadata"] |= changes
    seen = observe(job(), [kube_job("train", "one", "1")], [pod], None, NOW)
    assert seen.attempts[1].pods == ()


def test_a_pods_index_that_is_no_number_is_0() -> None:
    pod = kube_pod("one", "a", {}, index="²")
    assert observe(job(), [kube_job("train", "one", "1")], [pod], None, NOW).attempts[1].pods[0].index == 0


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
    assert observe(job(), [], pods, None, NOW).lingering == ("saves",)


def test_the_newest_pod_speaks_for_a_job() -> None:
    pods = [
        kube_pod("zero", "new", terminated(exitCode=0, finishedAt=TIME), "2026-11-24T11:59:30Z"),
        kube_pod("zero", "old", terminated(exitCode=3, finishedAt=TIME)),
    ]
    seen = observe(job(), [kube_job("validate", "zero")], pods, None, NOW)
    assert seen.validation is not None
    assert seen.validation.exit_code == 0


def evicted(message: str) -> Object:
    return {"reason": "Evicted", "phase": "Failed", "message": message}


@pytest.mark.parametrize(
    ("name", "status", "expected"),
    [
        ("evicted by the kubelet", {"reason": "Evicted", "phase": "Failed"}, "Preempted"),
        ("evicted from a full node", evicted(NODE_FULL), "Failed"),
        ("evicted for a full volume", evicted('Usage of EmptyDir volume "work" exceeds the limit "1Gi". '), "Failed"),
        ("evicted at its limit", evicted("Container trainer exceeded its local ephemeral storage limit "), "Failed"),
        ("evicted for its memory", evicted(NODE_FULL.replace("ephemeral-storage", "memory")), "Failed"),
        ("evicted for others", evicted("The node was low on resource: ephemeral-storage. "), "Preempted"),
        ("refused by a full node", evicted("The node had condition: [DiskPressure]. "), "Preempted"),
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
        job(), [kube_job("train", "one", "1", conditions=[failed])], [kube_pod("one", "a", status)], None, NOW
    )
    assert ending(seen.attempts[1], "attempt 1").outcome == expected, name


FAILED = {"type": "Failed", "status": "True", "lastTransitionTime": TIME}
LOST = (
    '{"outcome": "Failed", "reason": "InternalError", "message": "rank 1 is gone", "retryable": true, "lostPeer": true}'
)
FAULT = '{"outcome": "Failed", "reason": "DatasetInvalid", "message": "line 3 is not JSON"}'
OUTAGE = '{"outcome": "Failed", "reason": "StoreUnavailable", "message": "no answer", "retryable": true}'
STOPPED = '{"outcome": "Preempted", "message": "stopped by SIGTERM", "retryable": true}'
DISRUPTED = {"conditions": [{"type": "DisruptionTarget", "status": "True"}]}


def dead(exit_code: int, message: str = "", second: int = 0, reason: str = "Error", **more: Any) -> Object:
    """The status of a pod that ended at that second."""
    ended = f"2026-11-24T11:59:{second:02}Z"
    return {**terminated(exitCode=exit_code, message=message, reason=reason, finishedAt=ended), **more}


@pytest.mark.parametrize(
    ("name", "first", "second", "expected", "message"),
    [
        ("a peer's fault", dead(3, LOST, 1), dead(2, FAULT, 2), ("DatasetInvalid", False), "line 3"),
        ("a fault and an outage", dead(3, OUTAGE, 1), dead(2, FAULT, 2), ("DatasetInvalid", False), "line 3"),
        ("a peer out of memory", dead(3, LOST), dead(137, reason="OOMKilled"), ("OutOfMemory", False), "more memory"),
        ("a peer's outage", dead(143, STOPPED, 1), dead(3, OUTAGE, 2), ("StoreUnavailable", True), "no answer"),
        ("a peer that died", dead(143, STOPPED, 9), dead(139, second=8), ("InternalError", True), "exit code 139"),
        ("a peer that is gone", dead(3, LOST), {}, ("InternalError", True), "rank 1 is gone"),
        ("a peer that was stopped", dead(3, LOST, 1), dead(143, STOPPED, 2), (None, True), "pre-empted"),
        ("a peer that was evicted", dead(3, LOST, 1), dead(137, second=2, **DISRUPTED), (None, True), "pre-empted"),
        ("a peer that was done", dead(3, OUTAGE, 2), dead(0, "{}", 1), ("StoreUnavailable", True), "no answer"),
    ],
)
def test_which_of_two_pods_ended_an_attempt(
    name: str, first: Object, second: Object, expected: tuple[str | None, bool], message: str
) -> None:
    pods = [kube_pod("one", "b", second, index="1"), kube_pod("one", "a", first, index="0")]
    seen = observe(job(), [kube_job("train", "one", "1", conditions=[FAILED])], pods, None, NOW)
    end = ending(seen.attempts[1], "attempt 1")
    assert (end.reason, end.retryable) == expected, name
    assert end.outcome == ("Failed" if end.reason else "Preempted")
    assert message in end.message


def test_the_first_pod_reports_for_all() -> None:
    complete = {"type": "Complete", "status": "True", "lastTransitionTime": TIME}
    done = '{"outcome": "Succeeded", "message": "held-out loss 3 to 1"}'
    other = '{"outcome": "Succeeded", "message": "rank 1 of 2 is done"}'
    pods = [
        kube_pod("one", "older", dead(143, STOPPED), "2026-11-24T11:00:00Z", index="0"),  # stopped by a queue
        kube_pod("one", "b", dead(0, other), index="1"),
        kube_pod("one", "a", dead(0, done), index="0"),
    ]
    seen = observe(job(), [kube_job("train", "one", "1", conditions=[complete])], pods, None, NOW)
    end = ending(seen.attempts[1], "attempt 1")
    assert end.outcome == "Succeeded"
    assert end.result is not None
    assert end.result.message == "held-out loss 3 to 1"


def test_an_attempt_runs_once_all_its_pods_run() -> None:
    running = {"containerStatuses": [{"name": "trainer", "state": {"running": {"startedAt": TIME}}}]}
    unplaced = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no GPU is free"}
    several = {**kube_job("train", "one", "1"), "spec": {"parallelism": 2}}
    first = kube_pod("one", "a", running, index="0")
    waiting = kube_pod("one", "b", {"conditions": [unplaced]}, index="1")
    for pods, expected in (
        ([first], "has 1 of 2 pods: "),
        ([first, waiting], "pod b waits for a node: no GPU is free"),
    ):
        wait = obstacle(observe(job(), [several], pods, None, NOW).attempts[1], NOW)
        assert wait is not None
        assert expected in wait.message
    both = [first, kube_pod("one", "b", running, index="1")]
    assert obstacle(observe(job(), [several], both, None, NOW).attempts[1], NOW) is None


@pytest.mark.parametrize(
    ("conditions", "told"),
    [
        ([], ""),
        ([("QuotaReserved", "False", "insufficient unused quota for gpu")], "insufficient unused quota for gpu"),
        (
            [("Evicted", "True", "Preempted to accommodate a workload"), ("QuotaReserved", "False", "no quota left")],
            "Preempted to accommodate a workload; no quota left",
        ),
        ([("Evicted", "False", "was preempted"), ("QuotaReserved", "True", "quota reserved in team")], ""),
    ],
    ids=["nothing yet", "no quota", "pre-empted", "admitted"],
)
def test_why_a_queue_holds_a_job_back(conditions: list[tuple[str, str, str]], told: str) -> None:
    waiting = {**kube_job("train", "one", "1"), "spec": {"suspend": True}}
    entries = [{"type": type_, "status": status, "message": message} for type_, status, message in conditions]
    workloads = [
        {"metadata": {"labels": {"kueue.x-k8s.io/job-uid": uid}}, "status": {"conditions": said}}
        for uid, said in (("one", entries), ("other", [{"type": "QuotaReserved", "status": "False", "message": "no"}]))
    ]
    assert observe(job(), [waiting], [], None, NOW, workloads).attempts[1].held_back == told
