"""A training pod that is evicted, suspended by its user or held back by a queue: the job goes on and completes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from custom_resources import TRAINED_SECONDS, finished_job
from installation import DEMO, apply, condition, delete, get, kubectl, until

if TYPE_CHECKING:
    from installation import Object


def submit(manifest: Object, **spec: object) -> str:
    """The job anew, with other fields of its spec."""
    name = str(manifest["metadata"]["name"])
    delete("finetunejob", name, DEMO)
    apply(manifest | {"spec": manifest["spec"] | spec})
    return name


def patch(kind: str, name: str, **spec: object) -> None:
    kubectl("patch", kind, name, "--namespace", DEMO, "--type=merge", "-p", json.dumps({"spec": spec}))


def reaches(name: str, kind: str, status: str = "True") -> Object:
    """The job once the condition holds."""

    def holds() -> Object | None:
        job = get("finetunejob", name, DEMO)
        return job if condition(job, kind)["status"] == status else None

    job: Object = until(f"{kind}={status} of {name}", holds, TRAINED_SECONDS)
    return job


def outcomes(job: Object) -> list[str]:
    assert condition(job, "Complete")["status"] == "True", condition(job, "Failed")
    return [attempt["outcome"] for attempt in job["status"]["attempts"]]


def test_an_evicted_job_goes_on(second_manifest: Object) -> None:
    name = submit(second_manifest, maxAttempts=1)
    attempt = reaches(name, "Started")["status"]["attempts"][0]["name"]
    pod = kubectl("get", "pods", "--namespace", DEMO, "-l", f"batch.kubernetes.io/job-name={attempt}", "-o", "name")
    eviction = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": pod.strip().removeprefix("pod/"), "namespace": DEMO},
    }
    path = f"/api/v1/namespaces/{DEMO}/pods/{eviction['metadata']['name']}/eviction"
    kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(eviction))
    assert outcomes(finished_job(name)) == ["Preempted", "Succeeded"]


def test_a_suspended_job_goes_on(second_manifest: Object) -> None:
    name = submit(second_manifest, maxAttempts=1)
    reaches(name, "Started")
    patch("finetunejob", name, suspend=True)
    assert reaches(name, "Suspended")["status"]["phase"] == "Suspended"
    patch("finetunejob", name, suspend=False)
    assert outcomes(finished_job(name)) == ["Suspended", "Succeeded"]


def test_a_queue_admits_a_job(second_manifest: Object) -> None:
    name = submit(second_manifest, scheduling={"queue": "team"})
    queued = reaches(name, "Admitted", "False")
    assert queued["status"]["phase"] == "Queued"
    patch("job", queued["status"]["attempts"][0]["name"], suspend=False)
    assert outcomes(finished_job(name)) == ["Succeeded"]
