"""FineTuneJobs, and objects beside them, that try to block or to take what is not theirs: on a real API server."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import TYPE_CHECKING, Any

import pytest

from tests.controlplane.kubelet import Ending, Running, Waiting, published
from tests.controlplane.manifests import API, job
from tests.controlplane.operatorprocess import STORE, until
from tests.controlplane.trainingworld import KIND, World
from tunesmith.cluster.errors import ForbiddenError
from tunesmith.contracts.location import owned_name
from tunesmith.contracts.progress import PROGRESS_PORT

if TYPE_CHECKING:
    from tests.controlplane.apiserver import ApiServer


pytestmark = pytest.mark.controlplane
Object = dict[str, Any]
VALIDATING = "app.kubernetes.io/component=validate"


def validates(pod: Object) -> bool:
    return bool(pod["spec"]["containers"][0]["args"][0] == "validate")


def forged_job(namespace: str, owner: Object, suffix: str, component: str) -> Object:
    """A Job that claims to be one of the FineTuneJob's."""
    metadata = owner["metadata"]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": owned_name(metadata["name"], metadata["uid"], suffix),
            "namespace": namespace,
            "labels": {
                "app.kubernetes.io/managed-by": "tunesmith",
                "app.kubernetes.io/component": component,
                "tunesmith.dev/attempt": suffix,
                "tunesmith.dev/finetunejob": metadata["name"],
            },
            "ownerReferences": [
                {
                    "apiVersion": API,
                    "kind": KIND,
                    "name": metadata["name"],
                    "uid": metadata["uid"],
                    "controller": True,
                    "blockOwnerDeletion": False,
                }
            ],
        },
        "spec": {
            "suspend": True,
            "template": {
                "spec": {"restartPolicy": "Never", "containers": [{"name": "trainer", "image": "localhost/none:1"}]}
            },
        },
    }


async def test_a_job_in_another_namespace_is_no_attempt(world: World) -> None:
    """The garbage collector removes such a Job after a while; until then it must neither block nor be stopped."""
    released = asyncio.Event()
    world.kubelet.script = lambda pod: published(pod) if released.is_set() or validates(pod) else Running()
    submitted = await world.submit()
    elsewhere = await world.cluster.create(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"generateName": "other-"}}
    )
    foreign = elsewhere["metadata"]["name"]
    for number in ("1", "2", "99"):
        await world.cluster.create(forged_job(foreign, submitted, number, "train"))
    await world.until_condition("Started")
    attempts = (await world.status())["attempts"]
    assert [attempt["name"] for attempt in attempts] == [owned_name("tone", submitted["metadata"]["uid"], "1")]
    released.set()
    for pod in await world.cluster.list("Pod", world.namespace, labels="app.kubernetes.io/component=train"):
        await world.kubelet.end(pod, published(pod))
    await world.until_condition("Complete")
    assert len((await world.status())["attempts"]) == 1


async def test_a_name_that_is_taken_is_reported_until_it_is_free(world: World) -> None:
    world.kubelet.script = published
    suspended = await world.submit(suspend=True)
    await world.until_condition("Suspended")
    taken = forged_job(world.namespace, suspended, "validate", "validate")
    taken["metadata"]["ownerReferences"] = []
    await world.cluster.create(taken)
    await world.cluster.patch(KIND, "tone", world.namespace, {"spec": {"suspend": False}})
    condition = await world.until_condition("Validated", "Unknown", reason="NameTaken")
    assert "exists and does not belong to this FineTuneJob: delete it" in condition["message"]
    await world.cluster.delete("Job", taken["metadata"]["name"], world.namespace)
    await world.until_condition("Complete")


async def test_a_refused_create_is_a_condition(world: World, server: ApiServer) -> None:
    world.kubelet.script = published
    suspended = await world.submit(suspend=True)
    uid = suspended["metadata"]["uid"]
    await world.until_condition("Suspended")
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "none", "namespace": world.namespace},
        "spec": {"hard": {"count/jobs.batch": "0"}},
    }
    server.apply(quota)

    async def enforced() -> bool:
        found = server.get("resourcequota", "none", "--namespace", world.namespace)
        return bool(found.get("status", {}).get("hard"))

    await until(enforced, "the quota's status")
    await world.cluster.patch(KIND, "tone", world.namespace, {"spec": {"suspend": False}})
    condition = await world.until_condition("Validated", "Unknown", reason="WriteRefused")
    assert owned_name("tone", uid, "validate") in condition["message"]
    assert "quota" in condition["message"]


@pytest.mark.parametrize(
    "changes",
    [
        {"scheduling": {"priorityClassName": "system-node-critical"}},
        {"scheduling": {"tolerations": [{"operator": "Exists"}]}},
        {"resources": {"gpuResource": "devices.kubevirt.io/kvm"}},
    ],
    ids=["priority", "taints", "device"],
)
async def test_scheduling_that_the_installation_does_not_allow_is_refused_at_once(
    world: World, changes: dict[str, Any]
) -> None:
    with pytest.raises(ForbiddenError, match="this installation does not allow"):
        await world.submit(**changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"output": {"exports": [{"uri": f"{STORE}/other/job-1/artifact"}]}}, "is in this installation's store"),
        ({"output": {"exports": [{"uri": STORE.replace("/store", "//%73tore/x")}]}}, "is in this installation's store"),
        ({"dataset": {"train": [{"uri": f"{STORE}/other/job-1/tmp/tokens"}]}}, "is in this installation's store, but"),
        ({"baseModel": {"uri": f"{STORE}/other/job-1/merged"}}, "is in this installation's store, but"),
    ],
    ids=["export", "export, spelled otherwise", "rows", "base model"],
)
async def test_a_location_of_another_namespace_fails_the_job_before_a_pod_starts(
    world: World, changes: dict[str, Any], sentence: str
) -> None:
    await world.submit(**changes)
    condition = await world.until_condition("Failed", reason="NotAllowed")
    assert sentence in condition["message"]
    assert await world.jobs() == []


async def test_a_pre_emption_is_followed_by_a_pause(world: World) -> None:
    disruptions = iter([True, True])

    def script(pod: Object) -> Ending:
        disrupted = not validates(pod) and next(disruptions, False)
        return Ending(exit_code=137, disrupted=True) if disrupted else published(pod)

    world.kubelet.script = script
    submitted = await world.submit(maxAttempts=1)
    await world.until_condition("Complete")
    outcomes = [attempt["outcome"] for attempt in (await world.status())["attempts"]]
    assert outcomes == ["Preempted", "Preempted", "Succeeded"]
    names = [owned_name("tone", submitted["metadata"]["uid"], number) for number in ("1", "2", "3")]
    created = [
        datetime.fromisoformat((await world.cluster.get("Job", name, world.namespace))["metadata"]["creationTimestamp"])
        for name in names
    ]
    # Times of the API server are whole seconds.
    assert (created[1] - created[0]).total_seconds() >= 4
    assert (created[2] - created[1]).total_seconds() >= 9


async def test_a_container_that_cannot_start_fails_the_attempt_and_not_the_job(world: World) -> None:
    broken = iter([True])

    def script(pod: Object) -> Ending | Waiting:
        if not validates(pod) and next(broken, False):
            return Waiting("InvalidImageName", "couldn't parse image name")
        return published(pod)

    world.kubelet.script = script
    await world.submit(maxAttempts=2)
    await world.until_condition("Complete")
    attempts = (await world.status())["attempts"]
    assert [(attempt["outcome"], attempt.get("reason")) for attempt in attempts] == [
        ("Failed", "ImagePullFailed"),
        ("Succeeded", None),
    ]


SAMPLES = (
    b'{"stage": "Training", "step": 1, "totalSteps": 30, "updateTime": "2030-01-01T00:00:00"}',
    b'{"stage": "Training", "step": 1, "totalSteps": 30, "updateTime": "2099-01-01T00:00:00Z", "loss": NaN}',
    b'{"stage": "Training", "step": 10000000000000000000000000, "updateTime": "2026-01-01T00:00:00Z"}',
    b'{"stage": "Training", "step": 1e25}',
    b"[" * 60000,
    b'{"stage": "Training", "step": 3, "totalSteps": 30, "learningRate": 1e400, "etaSeconds": 9007199254740992}',
    b'{"stage": "Evaluating", "step": 30, "totalSteps": 30, "updateTime": "0001-01-01T00:00:00+14:00"}',
)


async def test_reports_of_a_pod_never_block_the_status(world: World) -> None:
    asked: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = SAMPLES[min(len(asked), len(SAMPLES) - 1)]
            asked.append(len(body))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the standard library's name
            pass

    server = ThreadingHTTPServer(("127.0.0.3", PROGRESS_PORT), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    world.kubelet.script = lambda pod: published(pod) if validates(pod) else Running(pod_ip="127.0.0.3")
    try:
        await world.submit()

        async def evaluating() -> bool:
            return bool((await world.status()).get("progress", {}).get("stage") == "Evaluating")

        await until(evaluating, "the last sample")
    finally:
        server.shutdown()
        server.server_close()
    assert len(asked) >= len(SAMPLES)
    status = await world.status()
    assert status["gpuSeconds"] < 60
    (pod,) = await world.cluster.list("Pod", world.namespace, labels="app.kubernetes.io/component=train")
    hostile = published(pod).message.replace(
        '"Succeeded"', '"Succeeded", "message": "\\u001b[2J\\u0000", "metrics": {"a": NaN}'
    )
    await world.kubelet.end(pod, Ending(message=hostile))
    await world.until_condition("Complete")
    assert (await world.status())["artifact"]["uri"].startswith(STORE)


async def test_a_deeply_nested_object_does_not_affect_others(world: World, server: ApiServer) -> None:
    """The API server accepts 10,000 levels in a field without a schema; Python's parser gives up at 1,000."""
    world.kubelet.script = published
    levels = '{"a":' * 4000 + "1" + "}" * 4000
    marker = "MARKER"
    manifest = job(world.namespace, "deep", method={"peft": {"type": "LOHA", "config": {"target_modules": marker}}})
    done = server.kubectl(
        "create", "--validate=false", "-f", "-", manifest=json.dumps(manifest).replace(f'"{marker}"', levels)
    )
    assert done.returncode == 0, done.stderr

    async def reported() -> bool:
        found = server.kubectl("get", "ftj", "deep", "--namespace", world.namespace, "-o", "jsonpath={.status}").stdout
        return "InvalidSpec" in found and "nested more than 8 levels deep" in found

    await until(reported, "the condition of the deep job")
    await world.submit()
    await world.until_condition("Complete")
    server.kubectl("delete", "ftj", "deep", "--namespace", world.namespace)
