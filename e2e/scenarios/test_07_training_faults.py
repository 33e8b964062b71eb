"""A training pod is evicted, suspended by its user or held by a queue: the job resumes and completes."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest
import yaml

from e2e.custom_resources import TRAINED_SECONDS, finished_job, job_manifest
from e2e.demo import JOB
from e2e.installation import DEMO, apply, condition, delete, get, in_store, items, kubectl, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from e2e.installation import Object

STEPS = 24
SOME_STEPS = 3
"""Steps before the job is disturbed: enough to resume from, and far from the end."""


@pytest.fixture(scope="module")
def submit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """Return a function that recreates one of this file's jobs with changes to its spec; remove all jobs at the end."""
    rows = tmp_path_factory.mktemp("rows") / "faults.jsonl"
    with rows.open("w") as file:
        for number in range(24):
            turns = [
                {"role": "user", "content": f"What is {number}?"},
                {"role": "assistant", "content": "A number, says the keeper."},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    uri = f"s3://tunesmith/data/{rows.name}"
    in_store("put", str(rows), uri)
    spec = yaml.safe_load(JOB.read_text())["spec"]
    spec |= {
        "dataset": {"train": [{"uri": uri}], "maxLength": 64},
        "method": {"lora": {"rank": 8, "alpha": 16}},
        "hyperparameters": {"maxSteps": STEPS, "learningRate": 1e-3, "batchSize": 4},
        "maxAttempts": 1,
    }

    names: set[str] = set()

    def create(name: str, **parts: object) -> str:
        names.add(name)
        delete("finetunejob", name, DEMO)
        apply(job_manifest(name, spec | parts))
        return name

    yield create
    for name in names:
        delete("finetunejob", name, DEMO)


def reaches(name: str, kind: str, status: str = "True", reason: str = "") -> Object:
    """Wait until the condition has the status, and the reason if one is given; return the job."""

    def holds() -> Object | None:
        job = get("finetunejob", name, DEMO)
        found = condition(job, kind)
        assert condition(job, "Failed")["status"] != "True", condition(job, "Failed")
        return job if found["status"] == status and reason in {"", found["reason"]} else None

    job: Object = until(f"{kind}={status} {reason} of {name}", holds, TRAINED_SECONDS)
    return job


def newest_attempt(name: str) -> str:
    """Return the name of the newest attempt's Job."""
    job = get("finetunejob", name, DEMO) or {}
    return str(job["status"]["attempts"][-1]["name"])


def trains(name: str, steps: int = STEPS) -> tuple[str, int]:
    """Wait for some steps; return the pod and the step, from the log because the status may be 10 s late."""

    def progress() -> tuple[str, int] | None:
        for pod in items("pods", DEMO, f"batch.kubernetes.io/job-name={newest_attempt(name)}"):
            pod_name = pod["metadata"]["name"]
            if pod["status"].get("phase") == "Running":
                log = kubectl("logs", pod_name, "--namespace", DEMO, "--container", "trainer")
                step = max((int(found) for found in re.findall(rf"  step (\d+)/{steps}", log)), default=0)
                if step >= SOME_STEPS:
                    return pod_name, step
        return None

    reaches(name, "Started")
    found: tuple[str, int] = until(f"{name} trains", progress, TRAINED_SECONDS)
    return found


def suspend(kind: str, name: str, *, value: bool) -> None:
    body = json.dumps({"spec": {"suspend": value}})
    kubectl("patch", kind, name, "--namespace", DEMO, "--type=merge", "--patch", body)


def went_on(name: str, before: str, step: int) -> None:
    """Check that the job completed: one attempt stopped at `before`, and the next resumed without repeating a step."""
    job = finished_job(name)
    assert condition(job, "Complete")["status"] == "True", condition(job, "Failed")
    attempts = job["status"]["attempts"]
    assert [attempt["outcome"] for attempt in attempts] == [before, "Succeeded"]
    assert attempts[1]["resumedFromStep"] >= step


@pytest.mark.long
def test_an_evicted_job_resumes(submit: Callable[..., str]) -> None:
    name = submit("evicted")
    pod, step = trains(name)
    eviction = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": pod, "namespace": DEMO},
    }
    path = f"/api/v1/namespaces/{DEMO}/pods/{pod}/eviction"
    kubectl("create", "--raw", path, "--filename", "-", stdin=json.dumps(eviction))
    went_on(name, "Preempted", step)


@pytest.mark.long
def test_a_suspended_job_resumes(submit: Callable[..., str]) -> None:
    name = submit("suspended")
    pod, step = trains(name)
    suspend("finetunejob", name, value=True)
    stopped = reaches(name, "Suspended")
    assert stopped["status"]["phase"] == "Suspended"
    left = (get("pod", pod, DEMO) or {}).get("status", {}).get("phase")
    assert left in {None, "Failed"}, f"the job is reported as suspended while its pod is {left}"
    suspend("finetunejob", name, value=False)
    went_on(name, "Suspended", step)


@pytest.mark.long
def test_a_queue_admits_suspends_and_admits_a_job_again(submit: Callable[..., str]) -> None:
    """Like Kueue, the test writes only `suspend` of the Job."""
    name = submit("queued", scheduling={"queue": "team"})
    mine = f"tunesmith.dev/finetunejob={name},app.kubernetes.io/component=train"

    def queued() -> list[str]:
        """Return the Jobs that the queue may admit."""
        jobs = items("jobs", DEMO, f"{mine},kueue.x-k8s.io/queue-name=team")
        finished = {"Complete", "Failed", "FailureTarget"}
        return [
            job["metadata"]["name"]
            for job in jobs
            if job["spec"]["suspend"]
            and not finished & {entry["type"] for entry in job["status"].get("conditions", [])}
        ]

    def admit(_: Object | None = None) -> None:
        for job in queued():
            suspend("job", job, value=False)

    waits = reaches(name, "Admitted", "False", "Queued")
    assert waits["status"]["phase"] == "Queued"
    assert "waits for queue team to admit it" in condition(waits, "Admitted")["message"]
    assert queued() == [newest_attempt(name)]
    assert not items("pods", DEMO, mine)
    admit()
    _, step = trains(name)
    suspend("job", newest_attempt(name), value=True)
    assert reaches(name, "Admitted", "False", "Queued")["status"]["phase"] == "Queued"

    def finished() -> bool:
        return all(pod["status"]["phase"] in {"Succeeded", "Failed"} for pod in items("pods", DEMO, mine))

    until("the pod saves and exits", finished, 180)
    # The Job resumes or is replaced, depending on whether its controller observed the pod's exit.
    job = finished_job(name, while_waiting=admit)
    assert condition(job, "Complete")["status"] == "True", condition(job, "Failed")
    attempts = job["status"]["attempts"]
    assert [attempt["outcome"] for attempt in attempts] in (["Succeeded"], ["Preempted", "Succeeded"])
    assert attempts[-1]["resumedFromStep"] >= step


@pytest.fixture
def store_down() -> Iterator[Callable[[], None]]:
    """Stop the S3 server; start it again at the end."""

    def scale(replicas: int) -> None:
        kubectl("scale", "deployment/s3", f"--replicas={replicas}", "--namespace", "s3")

    def stop() -> None:
        scale(0)
        until("the S3 server is gone", lambda: not items("pods", "s3", "app.kubernetes.io/name=s3"), 60)

    yield stop
    scale(1)
    kubectl("rollout", "status", "deployment/s3", "--namespace", "s3", "--timeout=120s")


@pytest.mark.long
def test_twenty_jobs_are_deleted_while_the_store_is_down(
    submit: Callable[..., str], store_down: Callable[[], None]
) -> None:
    """One trains, some validate, most wait for room on the node; a minute later nothing is left of them."""
    names = [f"deleted-{number}" for number in range(20)]
    first = submit(names[0], hyperparameters={"maxSteps": 1000, "batchSize": 4}, checkpoint={"everySteps": 1})
    trains(first, 1000)
    for name in names[1:]:
        submit(name)
    mine = f"tunesmith.dev/finetunejob in ({','.join(names)})"
    until("a Job for each", lambda: len(items("jobs", DEMO, mine)) > len(names), 120)
    store_down()
    kubectl("delete", "finetunejob", *names, "--namespace", DEMO, "--timeout=60s", seconds=90)
    until("none of their Jobs and pods is left", lambda: not items("jobs,pods", DEMO, mine), 60)
