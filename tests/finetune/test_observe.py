from __future__ import annotations

from typing import Any

import pytest

from tests.finetune.plan_cases import NODE_FULL
from tests.finetune.worlds import NOW, UID, job
from tunesmith.contracts.location import owned_name
from tunesmith.finetune.observe import observe
from tunesmith.jobs.classify import find_obstacle, job_outcome

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


def test_jobs_are_distinguished_and_get_their_own_pods() -> None:
    observation = observe(
        job(),
        [kube_job("train", "two", "2"), kube_job("validate", "zero"), kube_job("train", "one", "1")],
        [kube_pod("one", "a", {}), kube_pod("zero", "b", {}), kube_pod("stranger", "c", {})],
        None,
        NOW,
    )
    assert observation.validation is not None
    assert [pod.name for pod in observation.validation.pods] == ["b"]
    assert list(observation.attempts) == [1, 2]
    assert [pod.name for pod in observation.attempts[1].pods] == ["a"]


ANOTHER = "0f0e0d0c-0000-4000-8000-000000000002"
FORGED = {
    "in another namespace": {"namespace": "foreign"},
    "of a deleted FineTuneJob of that name": {
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
    "with an invalid number": {
        "name": owned_name("tone", UID, "²"),
        "labels": {"app.kubernetes.io/component": "train", "tunesmith.dev/attempt": "²"},
    },
}


@pytest.mark.parametrize("changes", FORGED.values(), ids=FORGED.keys())
@pytest.mark.parametrize("attempt", [None, "1"], ids=["validation", "attempt"])
def test_a_job_that_only_resembles_its_own_is_ignored(changes: Object, attempt: str | None) -> None:
    forged = kube_job("validate" if attempt is None else "train", "one", attempt)
    forged["metadata"] |= changes
    observation = observe(job(), [forged], [kube_pod("one", "a", {})], None, NOW)
    assert (observation.validation, observation.attempts) == (None, {})


@pytest.mark.parametrize(
    "changes",
    [
        {"namespace": "foreign"},
        {"ownerReferences": [{"kind": "Job", "uid": "one", "name": "tone"}]},
        {"ownerReferences": [{"kind": "ReplicaSet", "uid": "one", "name": "tone", "controller": True}]},
    ],
    ids=["in another namespace", "not controlled", "of another kind"],
)
def test_a_pod_that_only_names_the_jobs_uid_is_ignored(changes: Object) -> None:
    pod = kube_pod("one", "a", terminated(exitCode=2, message=FAULT))
    pod["metadata"] |= changes
    observation = observe(job(), [kube_job("train", "one", "1")], [pod], None, NOW)
    assert observation.attempts[1].pods == ()


def test_an_invalid_pod_index_is_0() -> None:
    pod = kube_pod("one", "a", {}, index="²")
    assert observe(job(), [kube_job("train", "one", "1")], [pod], None, NOW).attempts[1].pods[0].index == 0


def attempts_pod(name: str, uid: str, phase: str) -> Object:
    """Return a pod of the first attempt of the FineTuneJob with that uid; the Job is deleted."""
    pod = kube_pod("gone", name, {"phase": phase})
    pod["metadata"]["labels"] = {"tunesmith.dev/attempt": "1"}
    pod["metadata"]["ownerReferences"][0]["name"] = owned_name("tone", uid, "1")
    return pod


def test_a_pod_that_outlives_its_job_is_observed_until_it_terminates() -> None:
    pods = [
        attempts_pod("saves", UID, "Running"),
        attempts_pod("saved", UID, "Failed"),
        attempts_pod("of-another-job-of-that-name", "0f0e0d0c-0000-4000-8000-000000000002", "Running"),
    ]
    assert observe(job(), [], pods, None, NOW).lingering == ("saves",)


def test_the_newest_pod_determines_the_result() -> None:
    pods = [
        kube_pod("zero", "new", terminated(exitCode=0, finishedAt=TIME), "2026-11-24T11:59:30Z"),
        kube_pod("zero", "old", terminated(exitCode=3, finishedAt=TIME)),
    ]
    observation = observe(job(), [kube_job("validate", "zero")], pods, None, NOW)
    assert observation.validation is not None
    assert observation.validation.exit_code == 0


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
        ("a message that is not a result", terminated(exitCode=1, message="{"), "Failed"),
    ],
)
def test_outcome_of_a_pod(name: str, status: Object, expected: str) -> None:
    failed = {"type": "Failed", "status": "True", "lastTransitionTime": TIME}
    observation = observe(
        job(), [kube_job("train", "one", "1", conditions=[failed])], [kube_pod("one", "a", status)], None, NOW
    )
    assert job_outcome(observation.attempts[1], "attempt 1").outcome == expected, name


FAILED = {"type": "Failed", "status": "True", "lastTransitionTime": TIME}
LOST = (
    '{"outcome": "Failed", "reason": "InternalError", "message": "rank 1 is gone", "retryable": true, "lostPeer": true}'
)
FAULT = '{"outcome": "Failed", "reason": "DatasetInvalid", "message": "line 3 is not JSON"}'
OUTAGE = '{"outcome": "Failed", "reason": "StoreUnavailable", "message": "no answer", "retryable": true}'
STOPPED = '{"outcome": "Preempted", "message": "stopped by SIGTERM", "retryable": true}'
DISRUPTED = {"conditions": [{"type": "DisruptionTarget", "status": "True"}]}


def dead(exit_code: int, message: str = "", second: int = 0, reason: str = "Error", **more: Any) -> Object:
    """Return the status of a pod that terminated at that second."""
    finished_at = f"2026-11-24T11:59:{second:02}Z"
    return {**terminated(exitCode=exit_code, message=message, reason=reason, finishedAt=finished_at), **more}


@pytest.mark.parametrize(
    ("name", "first", "second", "expected", "message"),
    [
        ("a peer's user error", dead(3, LOST, 1), dead(2, FAULT, 2), ("DatasetInvalid", False), "line 3"),
        ("a user error and an outage", dead(3, OUTAGE, 1), dead(2, FAULT, 2), ("DatasetInvalid", False), "line 3"),
        ("a peer out of memory", dead(3, LOST), dead(137, reason="OOMKilled"), ("OutOfMemory", False), "more memory"),
        ("a peer's outage", dead(143, STOPPED, 1), dead(3, OUTAGE, 2), ("StoreUnavailable", True), "no answer"),
        (
            "a peer that died",
            dead(143, STOPPED, 9),
            dead(139, second=8),
            ("InternalError", True),
            "exited with code 139",
        ),
        ("a peer that disappeared", dead(3, LOST), {}, ("InternalError", True), "rank 1 is gone"),
        ("a peer that was stopped", dead(3, LOST, 1), dead(143, STOPPED, 2), (None, True), "pre-empted"),
        ("a peer that was evicted", dead(3, LOST, 1), dead(137, second=2, **DISRUPTED), (None, True), "pre-empted"),
        ("a peer that was done", dead(3, OUTAGE, 2), dead(0, "{}", 1), ("StoreUnavailable", True), "no answer"),
    ],
)
def test_the_pod_that_caused_the_failure_determines_the_outcome(
    name: str, first: Object, second: Object, expected: tuple[str | None, bool], message: str
) -> None:
    pods = [kube_pod("one", "b", second, index="1"), kube_pod("one", "a", first, index="0")]
    observation = observe(job(), [kube_job("train", "one", "1", conditions=[FAILED])], pods, None, NOW)
    outcome = job_outcome(observation.attempts[1], "attempt 1")
    assert (outcome.reason, outcome.retryable) == expected, name
    assert outcome.outcome == ("Failed" if outcome.reason else "Preempted")
    assert message in outcome.message


def test_the_first_pod_reports_for_all() -> None:
    complete = {"type": "Complete", "status": "True", "lastTransitionTime": TIME}
    done = '{"outcome": "Succeeded", "message": "held-out loss 3 to 1"}'
    other = '{"outcome": "Succeeded", "message": "rank 1 of 2 is done"}'
    pods = [
        kube_pod("one", "older", dead(143, STOPPED), "2026-11-24T11:00:00Z", index="0"),  # stopped by a queue
        kube_pod("one", "b", dead(0, other), index="1"),
        kube_pod("one", "a", dead(0, done), index="0"),
    ]
    observation = observe(job(), [kube_job("train", "one", "1", conditions=[complete])], pods, None, NOW)
    outcome = job_outcome(observation.attempts[1], "attempt 1")
    assert outcome.outcome == "Succeeded"
    assert outcome.result is not None
    assert outcome.result.message == "held-out loss 3 to 1"


@pytest.mark.parametrize(
    ("name", "phases", "status", "succeeded"),
    [
        ("all have succeeded", ("Succeeded", "Succeeded"), {}, True),
        ("one still runs", ("Succeeded", "Running"), {}, False),
        ("one is missing", ("Succeeded",), {}, False),
        ("one has failed", ("Succeeded", "Failed"), {}, False),
        ("the Job has failed", ("Succeeded", "Succeeded"), {"conditions": [FAILED]}, False),
    ],
)
def test_a_job_succeeds_with_its_pods(name: str, phases: tuple[str, ...], status: Object, *, succeeded: bool) -> None:
    done = {"Succeeded": dead(0, "{}"), "Failed": dead(1), "Running": {}}
    pods = [
        kube_pod("one", f"pod-{index}", {**done[phase], "phase": phase}, index=str(index))
        for index, phase in enumerate(phases)
    ]
    train = {**kube_job("train", "one", "1", **status), "spec": {"parallelism": 2}}
    attempt = observe(job(), [train], pods, None, NOW).attempts[1]
    assert (attempt.succeeded, attempt.finished) == (succeeded, succeeded or bool(status)), name


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
        obstacle = find_obstacle(observe(job(), [several], pods, None, NOW).attempts[1], NOW)
        assert obstacle is not None
        assert expected in obstacle.message
    both = [first, kube_pod("one", "b", running, index="1")]
    assert find_obstacle(observe(job(), [several], both, None, NOW).attempts[1], NOW) is None


@pytest.mark.parametrize(
    ("conditions", "expected"),
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
def test_the_reason_why_a_queue_holds_a_job_back(conditions: list[tuple[str, str, str]], expected: str) -> None:
    waiting = {**kube_job("train", "one", "1"), "spec": {"suspend": True}}
    entries = [{"type": type_, "status": status, "message": message} for type_, status, message in conditions]
    workloads = [
        {"metadata": {"labels": {"kueue.x-k8s.io/job-uid": uid}}, "status": {"conditions": reported}}
        for uid, reported in (
            ("one", entries),
            ("other", [{"type": "QuotaReserved", "status": "False", "message": "no"}]),
        )
    ]
    assert observe(job(), [waiting], [], None, NOW, workloads).attempts[1].held_back == expected
