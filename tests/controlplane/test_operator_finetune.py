"""FineTuneJobs on a real API server with the real Job controller; only the kubelet is played."""

from __future__ import annotations

import contextlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import TYPE_CHECKING, Any

import pytest

from tests.controlplane.kubelet import DIGEST, Ending, Running, Waiting, failed, published, result
from tests.controlplane.operatorprocess import STORE, until
from tests.controlplane.trainingworld import KIND, World
from tunesmith.cluster.errors import AlreadyExistsError, NotFoundError

if TYPE_CHECKING:
    from tests.controlplane.operatorprocess import Operator


pytestmark = pytest.mark.controlplane
Object = dict[str, Any]
SAVING = "test.tunesmith.dev/saving"


async def test_a_job_is_validated_trained_and_complete(world: World) -> None:
    world.kubelet.script = published
    submitted = await world.submit()
    await world.until_condition("Complete")
    status = await world.status()
    assert status["phase"] == "Complete"
    assert status["preflight"]["rows"] == 90
    assert status["resolved"]["totalSteps"] == 30
    uid = submitted["metadata"]["uid"]
    assert status["artifact"]["uri"] == f"{STORE}/{world.namespace}/tone-{uid}/artifact"
    assert status["artifact"]["digest"] == DIGEST
    assert status["evaluation"]["loss"] == 1.5
    assert [attempt["outcome"] for attempt in status["attempts"]] == ["Succeeded"]
    assert len(await world.jobs()) == 2
    system = await world.cluster.get("Namespace", "kube-system")
    for item in await world.cluster.list("Job", world.namespace):
        arguments = item["spec"]["template"]["spec"]["containers"][0]["args"]
        assert arguments[arguments.index("--cluster") + 1] == system["metadata"]["uid"]
    conditions = {condition["type"]: condition["status"] for condition in status["conditions"]}
    assert conditions == {"Validated": "True", "Started": "False", "Published": "True", "Complete": "True"}

    async def told() -> bool:
        events = await world.cluster.list("Event", world.namespace, fields="involvedObject.kind=FineTuneJob")
        return {"Valid", "Complete"} <= {event["reason"] for event in events}

    await until(told, "the events Valid and Complete")


async def test_a_finished_job_is_not_run_again_when_its_jobs_are_removed(world: World, operator: Operator) -> None:
    world.kubelet.script = published
    await world.submit()
    await world.until_condition("Complete")
    before = await world.status()
    for name in await world.jobs():
        await world.cluster.delete("Job", name, world.namespace)
    # a later job shows that the operator has seen the deletions
    await world.submit("later")

    async def later_complete() -> bool:
        return (await world.condition("Complete", "later")).get("status") == "True"

    await until(later_complete, "the later job's end")
    operator.kill()
    operator.start()
    await world.submit("latest")

    async def latest_complete() -> bool:
        return (await world.condition("Complete", "latest")).get("status") == "True"

    await until(latest_complete, "the end of the job after the restart")
    assert await world.status() == before
    assert all(name.startswith("late") for name in await world.jobs())


async def test_bad_data_fails_without_a_training_job(world: World) -> None:
    message = "line 3 of s3://data/train.jsonl is not JSON"
    world.kubelet.script = lambda _: failed(2, retryable=False, reason="DatasetInvalid", message=message)
    await world.submit()
    condition = await world.until_condition("Failed")
    assert (condition["reason"], condition["message"]) == ("DatasetInvalid", message)
    assert (await world.condition("Validated"))["status"] == "False"
    assert len(await world.jobs()) == 1


async def test_a_job_that_does_not_fit_its_nodes_gets_no_training_pod(world: World) -> None:
    labels = {"nvidia.com/gpu.memory": "15360", "namespace": world.namespace}
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"generateName": "gpu-", "labels": labels}}
    name = (await world.cluster.create(node))["metadata"]["name"]
    status = {"status": {"allocatable": {"nvidia.com/gpu": "1"}}}
    await world.cluster.patch("Node", name, None, status, type_="merge", subresource="status")
    preflight = {
        "estimatedPeakBytes": 30 * 2**30,
        "verdict": "WillNotFit",
        "suggestion": "method.qlora instead of lora",
    }

    def script(pod: Object) -> Ending:
        arguments = pod["spec"]["containers"][0]["args"]
        memory = int(arguments[arguments.index("--gpu-memory-bytes") + 1])
        told = preflight | {"gpuMemoryBytes": memory}
        message = json.dumps({"outcome": "Failed", "reason": "WillNotFit", "message": "30 GiB", "preflight": told})
        return Ending(2, message, "Error")

    world.kubelet.script = script
    await world.submit(scheduling={"nodeSelector": {"namespace": world.namespace}})
    condition = await world.until_condition("Failed")
    assert condition["reason"] == "WillNotFit"
    assert (await world.status())["preflight"] == preflight | {"gpuMemoryBytes": 15 * 2**30}
    assert len(await world.jobs()) == 1


async def test_values_resolved_by_validation_reach_every_attempt(world: World) -> None:
    decided = {"microBatchSize": 2, "gradientCheckpointing": True, "totalSteps": 30}
    told = []

    def script(pod: Object) -> Ending:
        if pod["spec"]["containers"][0]["args"][0] == "validate":
            return Ending(message=json.dumps({"outcome": "Succeeded", "resolved": decided}))
        told.append(pod["spec"]["volumes"][0]["configMap"]["name"])
        if len(told) == 1:
            return failed(3, retryable=True, reason="StoreUnavailable", message="the store does not answer")
        return published(pod)

    world.kubelet.script = script
    await world.submit()
    await world.until_condition("Complete", seconds=240)
    manifests = [await world.cluster.get("ConfigMap", name, world.namespace) for name in told]
    assert [json.loads(item["data"]["job.yaml"])["status"] for item in manifests] == [{"resolved": decided}] * 2


async def test_a_job_starts_from_another_one_and_an_expired_job_is_deleted(world: World) -> None:
    world.kubelet.script = published
    await world.submit("second", continueFrom={"fineTuneJob": {"name": "tone"}})

    async def waits() -> bool:
        return (await world.condition("Validated", "second")).get("reason") == "WaitingForAdapter"

    await until(waits, "the second job to wait")
    first = await world.submit(ttlSecondsAfterFinished=0)

    async def complete() -> bool:
        return (await world.condition("Complete", "second")).get("status") == "True"

    await until(complete, "the end of the second job")
    artifact = {"uri": f"{STORE}/{world.namespace}/tone-{first['metadata']['uid']}/artifact", "digest": DIGEST}
    assert (await world.status("second"))["resolved"]["continuedFrom"] == artifact
    manifests = [
        json.loads(item["data"]["job.yaml"])["spec"]["continueFrom"]
        for item in await world.cluster.list("ConfigMap", world.namespace)
        if item["metadata"]["name"].startswith("second-")
    ]
    assert manifests == [{"artifact": artifact}] * 2

    async def expired() -> bool:
        return await world.cluster.find(KIND, "tone", world.namespace) is None

    await until(expired, "the deletion of the first job")
    events = await world.cluster.list("Event", world.namespace, fields="reason=Expired")
    assert [event["involvedObject"]["name"] for event in events] == ["tone"]
    assert artifact["uri"] in events[0]["message"]


async def test_a_retryable_failure_is_retried_until_attempts_are_exhausted(world: World) -> None:
    def script(pod: Object) -> Ending:
        if pod["spec"]["containers"][0]["args"][0] == "validate":
            return published(pod)
        return failed(3, retryable=True, reason="StoreUnavailable", message="the store does not answer")

    world.kubelet.script = script
    await world.submit(maxAttempts=2)
    condition = await world.until_condition("Failed", seconds=240)
    assert condition["reason"] == "AttemptsExhausted"
    assert "2 of 2 attempts failed; the last: StoreUnavailable: the store does not answer" in condition["message"]
    attempts = (await world.status())["attempts"]
    assert [attempt["reason"] for attempt in attempts] == ["StoreUnavailable"] * 2
    assert len(await world.jobs()) == 3


async def test_a_user_error_while_training_is_not_retried(world: World) -> None:
    def script(pod: Object) -> Ending:
        if pod["spec"]["containers"][0]["args"][0] == "validate":
            return published(pod)
        return failed(2, retryable=False, reason="LossDiverged", message="the loss is not a number at step 7")

    world.kubelet.script = script
    await world.submit()
    assert (await world.until_condition("Failed"))["reason"] == "LossDiverged"
    assert len((await world.status())["attempts"]) == 1


async def test_a_preempted_attempt_is_not_counted(world: World) -> None:
    def script(pod: Object) -> Ending:
        labels = pod["metadata"]["labels"]
        if labels.get("tunesmith.dev/attempt") in {"1", "2"}:
            return Ending(exit_code=137, reason="Error", disrupted=True)
        return published(pod)

    world.kubelet.script = script
    await world.submit(maxAttempts=1)
    await world.until_condition("Complete")
    outcomes = [attempt["outcome"] for attempt in (await world.status())["attempts"]]
    assert outcomes == ["Preempted", "Preempted", "Succeeded"]


async def test_out_of_memory_fails_with_advice(world: World) -> None:
    def script(pod: Object) -> Ending:
        if pod["spec"]["containers"][0]["args"][0] == "validate":
            return published(pod)
        return Ending(exit_code=137, reason="OOMKilled")

    world.kubelet.script = script
    await world.submit()
    condition = await world.until_condition("Failed")
    assert condition["reason"] == "OutOfMemory"
    assert "raise it, or lower hyperparameters.microBatchSize" in condition["message"]


async def test_a_failed_export_of_a_complete_job_is_reported(world: World) -> None:
    denied = {"reason": "AccessDenied", "message": "access to the export hf://org/tone was denied"}
    mounted: list[str] = []

    def script(pod: Object) -> Ending:
        mounted.extend(volume.get("secret", {}).get("secretName", "") for volume in pod["spec"]["volumes"])
        told = json.loads(published(pod).message)
        return Ending(message=result(**told, **({"exports": [{}, denied]} if "artifact" in told else {})))

    world.kubelet.script = script
    exports = [{"uri": "s3://copies/tone"}, {"hub": "org/tone", "secretRef": {"name": "hub"}}]
    await world.submit(output={"exports": exports})
    await world.until_condition("Complete")
    assert mounted.count("hub") == 2  # of the validation and of the attempt
    condition = await world.condition("Exported")
    assert (condition["status"], condition["reason"]) == ("False", "ExportFailed")
    assert condition["message"] == f"1 of 2 exports failed: {denied['message']}"
    assert (await world.status())["artifact"]["exports"] == [
        {"uri": "s3://copies/tone", "exported": True},
        {"hub": "org/tone", "exported": False, **denied},
    ]


async def test_an_artifact_at_another_location_is_rejected(world: World) -> None:
    def script(pod: Object) -> Ending:
        ending = published(pod)
        return Ending(message=ending.message.replace(f"{STORE}/{world.namespace}", f"{STORE}/somebody-else"))

    world.kubelet.script = script
    await world.submit()
    condition = await world.until_condition("Failed")
    assert condition["reason"] == "InternalError"
    assert "artifact" not in await world.status()


async def test_a_missing_secret_is_reported_while_the_job_waits(world: World) -> None:
    world.kubelet.script = lambda _: Waiting("CreateContainerConfigError", 'secret "tunesmith-store" not found')
    await world.submit()
    condition = await world.until_condition("Validated", "Unknown", reason="SecretNotFound")
    assert 'secret "tunesmith-store" not found; create it in the pod\'s namespace' in condition["message"]


async def test_an_attempt_whose_job_is_deleted_is_followed_by_another(world: World) -> None:
    def script(pod: Object) -> Ending | Running:
        if pod["metadata"]["labels"].get("tunesmith.dev/attempt") == "1":
            return Running()
        return published(pod)

    world.kubelet.script = script
    await world.submit()
    await world.until_condition("Started")
    name = (await world.status())["attempts"][0]["name"]
    await world.cluster.delete("Job", name, world.namespace)
    await world.until_condition("Complete")
    attempts = (await world.status())["attempts"]
    assert [attempt["outcome"] for attempt in attempts] == ["Failed", "Succeeded"]
    assert attempts[0]["message"] == f"Job {name} was deleted while it was running"


async def test_a_deleted_job_takes_everything_with_it(world: World) -> None:
    def script(pod: Object) -> Ending | Running:
        return published(pod) if pod["spec"]["containers"][0]["args"][0] == "validate" else Running()

    world.kubelet.script = script
    await world.submit()
    await world.until_condition("Started")
    await world.cluster.delete(KIND, "tone", world.namespace)

    async def gone() -> bool:
        kinds = ("Job", "Pod", KIND)
        left = [item for kind in kinds for item in await world.cluster.list(kind, world.namespace)]
        names = {item["metadata"]["name"] for item in await world.cluster.list("ConfigMap", world.namespace)}
        return not left and names <= {"kube-root-ca.crt"}

    await until(gone, "the removal of everything that the job owned")


async def test_a_suspended_job_stops_and_resumes_with_another_attempt(world: World) -> None:
    def script(pod: Object) -> Ending | Running:
        return Running() if pod["metadata"]["labels"].get("tunesmith.dev/attempt") == "1" else published(pod)

    world.kubelet.script = script
    await world.submit(maxAttempts=1)
    await world.until_condition("Started")
    await world.cluster.patch(KIND, "tone", world.namespace, {"spec": {"suspend": True}})
    await world.until_condition("Suspended")
    assert (await world.status())["phase"] == "Suspended"
    await world.cluster.patch(KIND, "tone", world.namespace, {"spec": {"suspend": False}})
    await world.until_condition("Complete")
    outcomes = [attempt["outcome"] for attempt in (await world.status())["attempts"]]
    assert outcomes == ["Suspended", "Succeeded"]


async def hold(world: World, attempt: int) -> Object:
    """The attempt's pod, held back at its deletion as one that saves a checkpoint is: by a finalizer of this test."""

    async def there() -> bool:
        return bool(await world.cluster.list("Pod", world.namespace, labels=f"tunesmith.dev/attempt={attempt}"))

    await until(there, f"the pod of attempt {attempt}")
    [pod] = await world.cluster.list("Pod", world.namespace, labels=f"tunesmith.dev/attempt={attempt}")
    finalizers = [*pod["metadata"].get("finalizers", []), SAVING]
    return await world.cluster.patch(
        "Pod", pod["metadata"]["name"], world.namespace, {"metadata": {"finalizers": finalizers}}
    )


async def stopping(world: World, pod: Object) -> None:
    """Returns when the pod is being deleted."""

    async def told() -> bool:
        found = await world.cluster.get("Pod", pod["metadata"]["name"], world.namespace)
        return "deletionTimestamp" in found["metadata"]

    await until(told, "the deletion of the attempt's pod")


SAVED = Ending(
    exit_code=143,
    message=result(outcome="Preempted", message="stopped by SIGTERM at step 7 of 30", retryable=True),
    reason="Error",
)


async def let_go(world: World, pod: Object) -> None:
    """The pod saved, and ends as the trainer does after SIGTERM."""
    await world.kubelet.end(pod, SAVED)
    found = await world.cluster.get("Pod", pod["metadata"]["name"], world.namespace)
    left = [name for name in found["metadata"]["finalizers"] if name != SAVING]
    await world.cluster.patch("Pod", pod["metadata"]["name"], world.namespace, {"metadata": {"finalizers": left}})


async def test_the_next_attempt_waits_for_a_pod_that_is_saving(world: World) -> None:
    def script(pod: Object) -> Ending | Running:
        return Running() if pod["metadata"]["labels"].get("tunesmith.dev/attempt") == "1" else published(pod)

    world.kubelet.script = script
    await world.submit(maxAttempts=1)
    await world.until_condition("Started")
    pod = await hold(world, 1)
    await world.cluster.patch(KIND, "tone", world.namespace, {"spec": {"suspend": True}})
    await stopping(world, pod)
    generation = (await world.cluster.patch(KIND, "tone", world.namespace, {"spec": {"suspend": False}}))["metadata"][
        "generation"
    ]

    async def seen() -> bool:
        return (await world.status()).get("observedGeneration") == generation

    await until(seen, "the operator's look at the resumed job")
    assert (await world.condition("Suspended"))["reason"] == "Stopping"
    assert len(await world.jobs()) == 2, "validation and one attempt"
    await let_go(world, pod)
    await world.until_condition("Complete")
    outcomes = [attempt["outcome"] for attempt in (await world.status())["attempts"]]
    assert outcomes == ["Suspended", "Succeeded"]


async def test_the_next_attempt_waits_for_a_pod_whose_job_was_deleted(world: World) -> None:
    def script(pod: Object) -> Ending | Running:
        return Running() if pod["metadata"]["labels"].get("tunesmith.dev/attempt") == "1" else published(pod)

    world.kubelet.script = script
    await world.submit()
    await world.until_condition("Started")
    pod = await hold(world, 1)
    await world.cluster.delete("Job", (await world.status())["attempts"][0]["name"], world.namespace)
    waits = await world.until_condition("Started", "False", reason="Stopping")
    assert f"attempt 2 waits for pod {pod['metadata']['name']}" in waits["message"]
    await let_go(world, pod)
    await world.until_condition("Complete")
    outcomes = [attempt["outcome"] for attempt in (await world.status())["attempts"]]
    assert outcomes == ["Failed", "Succeeded"]


async def test_a_queue_evicts_a_running_attempt_and_admits_the_next(world: World) -> None:
    """As Kueue pre-empts. Here the Job controller sees that the pod failed before it is gone, and fails the Job."""

    def script(pod: Object) -> Ending | Running:
        return Running() if pod["metadata"]["labels"].get("tunesmith.dev/attempt") == "1" else published(pod)

    world.kubelet.script = script
    await world.submit(scheduling__queue="team", maxAttempts=1)
    await world.until_condition("Admitted", "False")
    first = (await world.status())["attempts"][0]["name"]
    await world.cluster.patch("Job", first, world.namespace, {"spec": {"suspend": False}})
    await world.until_condition("Started")
    pod = await hold(world, 1)
    await world.cluster.patch("Job", first, world.namespace, {"spec": {"suspend": True}})
    await stopping(world, pod)
    await world.kubelet.end(pod, SAVED)

    async def queued_again() -> bool:
        attempts = (await world.status())["attempts"]
        return len(attempts) == 2 and (await world.status())["phase"] == "Queued"

    await until(queued_again, "the second attempt in the queue")
    await let_go(world, pod)
    second = (await world.status())["attempts"][1]["name"]
    assert (await world.cluster.get("Job", second, world.namespace))["spec"]["suspend"] is True
    await world.cluster.patch("Job", second, world.namespace, {"spec": {"suspend": False}})
    await world.until_condition("Complete")
    outcomes = [attempt["outcome"] for attempt in (await world.status())["attempts"]]
    assert outcomes == ["Preempted", "Succeeded"]


async def test_a_job_over_its_deadline_is_stopped(world: World) -> None:
    def script(pod: Object) -> Ending | Running:
        return published(pod) if pod["spec"]["containers"][0]["args"][0] == "validate" else Running()

    world.kubelet.script = script
    await world.submit(activeDeadlineSeconds=2)
    assert (await world.until_condition("Failed"))["reason"] == "DeadlineExceeded"


async def says_why(world: World, uid: str, why: str) -> None:
    """Kueue says in a Workload why it does not admit the Job; its API is as much of Kueue's as is read."""
    group, kind = "kueue.x-k8s.io", {"kind": "Workload", "plural": "workloads", "singular": "workload"}
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {"name": "v1beta1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    definition = {"group": group, "scope": "Namespaced", "names": kind, "versions": [version]}
    with contextlib.suppress(AlreadyExistsError):
        await world.cluster.create(
            {
                "apiVersion": "apiextensions.k8s.io/v1",
                "kind": "CustomResourceDefinition",
                "metadata": {
                    "name": f"workloads.{group}",
                    "annotations": {"api-approved.kubernetes.io": "unapproved, a part for tests"},
                },
                "spec": definition,
            }
        )
    workload = {
        "apiVersion": f"{group}/v1beta1",
        "kind": "Workload",
        "metadata": {"name": "waits", "namespace": world.namespace, "labels": {f"{group}/job-uid": uid}},
        "status": {"conditions": [{"type": "QuotaReserved", "status": "False", "message": why}]},
    }

    async def served() -> bool:
        with contextlib.suppress(NotFoundError):
            await world.cluster.create(workload)
            return True
        return False

    async def told() -> bool:
        return (await world.condition("Admitted"))["message"].endswith(f"waits for queue team to admit it: {why}")

    await until(served, "the API of Workloads", seconds=180)
    await until(told, "why the queue holds the job back", seconds=180)


async def test_a_queue_admits_suspends_and_admits_a_job_again(world: World) -> None:
    started = 0

    def script(pod: Object) -> Ending | Running:
        nonlocal started
        training = "tunesmith.dev/attempt" in pod["metadata"]["labels"]
        started += training
        return Running() if training and started == 1 else published(pod)

    async def suspend(name: str, *, value: bool) -> None:
        await world.cluster.patch("Job", name, world.namespace, {"spec": {"suspend": value}})

    world.kubelet.script = script
    await world.submit(scheduling__queue="team")
    queued = await world.until_condition("Admitted", "False")
    assert "waits for queue team to admit it" in queued["message"]
    name = (await world.status())["attempts"][0]["name"]
    waiting = await world.cluster.get("Job", name, world.namespace)
    assert waiting["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    await says_why(world, waiting["metadata"]["uid"], "insufficient unused quota for nvidia.com/gpu")
    await suspend(name, value=False)
    await world.until_condition("Started")
    await suspend(name, value=True)
    await world.until_condition("Admitted", "False")
    assert (await world.status())["phase"] == "Queued"
    await suspend(name, value=False)
    await world.until_condition("Complete")


async def test_twenty_jobs_are_deleted_without_a_store(world: World) -> None:
    """Nothing that a deletion waits for is outside the cluster: the store of these tests does not exist."""

    def script(pod: Object) -> Ending | Running:
        return published(pod) if pod["spec"]["containers"][0]["args"][0] == "validate" else Running()

    world.kubelet.script = script
    names = [f"job-{number}" for number in range(20)]
    for name in names:
        await world.submit(name)

    async def all_run() -> bool:
        items = await world.cluster.list(KIND, world.namespace)
        return all(item.get("status", {}).get("phase") == "Running" for item in items)

    await until(all_run, "twenty running jobs", seconds=240)
    for name in names:
        await world.cluster.delete(KIND, name, world.namespace)

    async def gone() -> bool:
        return not any([await world.cluster.list(kind, world.namespace) for kind in (KIND, "Job", "Pod")])

    await until(gone, "the deletion of twenty jobs", seconds=180)


async def test_progress_is_pulled_into_the_status(world: World) -> None:
    documents = [{"stage": "Training", "step": 3, "totalSteps": 30, "loss": 2.5, "etaSeconds": 60}]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(documents[0]).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    # an address of its own: the port is fixed
    trainer = ThreadingHTTPServer(("127.77.0.1", 8080), Handler)
    Thread(target=trainer.serve_forever, daemon=True).start()
    try:

        def script(pod: Object) -> Ending | Running:
            validating = pod["spec"]["containers"][0]["args"][0] == "validate"
            return published(pod) if validating else Running(pod_ip="127.77.0.1")

        world.kubelet.script = script
        await world.submit()

        async def at(stage: str, step: int) -> bool:
            progress = (await world.status()).get("progress", {})
            return (progress.get("stage"), progress.get("step")) == (stage, step)

        await until(lambda: at("Training", 3), "progress at step 3")
        documents[0] = {"stage": "Publishing", "step": 30, "totalSteps": 30}
        await until(lambda: at("Publishing", 30), "progress at step 30")
        assert (await world.status())["phase"] == "Running"
    finally:
        trainer.shutdown()
        trainer.server_close()


async def test_every_pod_is_admitted_where_pod_security_is_restricted(world: World) -> None:
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    await world.cluster.patch("Namespace", world.namespace, None, {"metadata": {"labels": labels}})
    world.kubelet.script = published
    sources = [{"uri": "pvc://claim/x.jsonl"}, {"uri": "s3://data/y.jsonl", "secretRef": {"name": "mine"}}]
    await world.submit(resources__gpus=0, dataset__train=sources)
    await world.until_condition("Complete")


def index_of(pod: Object) -> int | None:
    """The pod's place in an Indexed Job; None in another."""
    index = pod["metadata"]["labels"].get("batch.kubernetes.io/job-completion-index")
    return None if index is None else int(index)


async def test_a_job_on_two_nodes_is_one_attempt(world: World) -> None:
    """Both pods run, find each other by name, and the first one reports."""
    others = json.dumps({"outcome": "Succeeded", "message": "rank 1 of 2 is done"})

    def script(pod: Object) -> Ending | Running:
        return Running() if index_of(pod) == 0 else Ending(message=others) if index_of(pod) == 1 else published(pod)

    world.kubelet.script = script
    submitted = await world.submit(resources__nodes=2, resources__gpus=0)
    await world.until_condition("Started")
    (attempt,) = (await world.status())["attempts"]
    pods = await world.cluster.list("Pod", world.namespace, labels=f"batch.kubernetes.io/job-name={attempt['name']}")
    first, second = sorted(pods, key=lambda pod: index_of(pod) or 0)
    assert (first["spec"]["hostname"], second["spec"]["hostname"]) == (f"{attempt['name']}-0", f"{attempt['name']}-1")
    (service,) = await world.cluster.list("Service", world.namespace, labels="tunesmith.dev/finetunejob=tone")
    environment = {entry["name"]: entry.get("value") for entry in second["spec"]["containers"][0]["env"]}
    assert environment["MASTER_ADDR"] == f"{first['spec']['hostname']}.{service['metadata']['name']}"
    assert first["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    (policy,) = await world.cluster.list("NetworkPolicy", world.namespace)
    for item in (service, policy):
        assert [owner["uid"] for owner in item["metadata"]["ownerReferences"]] == [submitted["metadata"]["uid"]]
        selector = item["spec"].get("selector") or item["spec"]["podSelector"]["matchLabels"]
        assert selector.items() <= first["metadata"]["labels"].items()
    await world.kubelet.end(first, published(first))
    await world.until_condition("Complete")
    status = await world.status()
    assert status["artifact"]["digest"] == DIGEST
    assert [attempt["outcome"] for attempt in status["attempts"]] == ["Succeeded"]


async def test_losing_one_of_two_pods_fails_the_attempt(world: World) -> None:
    lost = json.dumps(
        {"outcome": "Failed", "reason": "InternalError", "message": "lost", "retryable": True, "lostPeer": True}
    )

    def script(pod: Object) -> Ending | Running:
        attempt = pod["metadata"]["labels"].get("tunesmith.dev/attempt")
        if attempt == "1":  # evicted
            return Ending(exit_code=137, disrupted=True) if index_of(pod) == 1 else Running()
        if attempt == "2":  # one fails for a reason, the other because of that
            reason = failed(3, retryable=True, reason="StoreUnavailable", message="the store does not answer")
            return reason if index_of(pod) == 1 else Ending(exit_code=3, message=lost, reason="Error")
        return published(pod)

    world.kubelet.script = script
    await world.submit(resources__nodes=2, resources__gpus=0, maxAttempts=2)
    await world.until_condition("Complete", seconds=240)
    outcomes = [(attempt["outcome"], attempt.get("reason")) for attempt in (await world.status())["attempts"]]
    assert outcomes[0] == ("Preempted", None)
    assert outcomes[1] in {("Failed", "StoreUnavailable"), ("Failed", "InternalError")}  # whose pod is left
    assert outcomes[2] == ("Succeeded", None)
