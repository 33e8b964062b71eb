"""Plays the kubelet for pods of FineTuneJobs: real pods on a real API server, made by the real Job controller."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from tunesmith.cluster.errors import ConflictError, NotFoundError

if TYPE_CHECKING:
    from tunesmith.cluster.client import Cluster

Object = dict[str, Any]
DIGEST = "sha256:" + "a" * 64


@dataclass(frozen=True)
class Ending:
    """How a pod ends."""

    exit_code: int = 0
    message: str = ""
    reason: str = "Completed"
    disrupted: bool = False


@dataclass(frozen=True)
class Waiting:
    """A pod whose container does not start."""

    reason: str
    message: str


@dataclass(frozen=True)
class Running:
    """A pod that runs until it is told otherwise."""

    pod_ip: str = "127.0.0.1"


Script = Callable[[Object], Ending | Waiting | Running | None]


def result(**fields: Any) -> str:
    """A termination message."""
    return json.dumps(fields)


def published(pod: Object) -> Ending:
    """What a trainer says after it published: the place is the one it was given."""
    arguments = pod["spec"]["containers"][0]["args"]
    if arguments[0] == "validate":
        return Ending(
            message=result(
                outcome="Succeeded",
                preflight={"rows": 90, "validationRows": 10, "droppedRows": 0, "tokens": 1234},
                resolved={"learningRate": 2e-4, "batchSize": 8, "totalSteps": 30},
            )
        )
    artifact = {
        "uri": arguments[arguments.index("--output") + 1],
        "digest": DIGEST,
        "sizeBytes": 1000,
        "servable": {"vllm": True},
    }
    evaluation = {"baseLoss": 3.0, "loss": 1.5, "lossReductionPercent": 50.0}
    return Ending(message=result(outcome="Succeeded", artifact=artifact, evaluation=evaluation))


def failed(exit_code: int, *, retryable: bool, reason: str, message: str) -> Ending:
    """What a trainer says when it failed."""
    text = result(outcome="Failed", reason=reason, message=message, retryable=retryable)
    return Ending(exit_code=exit_code, message=text, reason="Error")


@dataclass
class Kubelet:
    """Gives every pod of the namespaces the status that the script says; None leaves it pending."""

    cluster: Cluster
    script: Script
    namespace: str | None = None
    seen: set[str] = field(default_factory=set)
    """Uids of the pods that were played."""

    async def run(self) -> None:
        """Play until cancelled."""
        async with asyncio.TaskGroup() as group:
            async for event in self.cluster.watch(
                "Pod", self.namespace, labels="app.kubernetes.io/managed-by=tunesmith"
            ):
                uid = event.object.get("metadata", {}).get("uid")
                if event.type == "ADDED" and uid not in self.seen:
                    self.seen.add(uid)
                    group.create_task(self._play(event.object))

    async def _play(self, pod: Object) -> None:
        what = self.script(pod)
        if what is None:
            return
        if isinstance(what, Waiting):
            state: Object = {"waiting": {"reason": what.reason, "message": what.message}}
            await self.set_status(pod, "Pending", state)
        elif isinstance(what, Running):
            await self.set_status(pod, "Running", {"running": {"startedAt": now()}}, pod_ip=what.pod_ip)
        else:
            await self.end(pod, what)

    async def end(self, pod: Object, how: Ending) -> None:
        """End a pod."""
        state = {
            "terminated": {
                "exitCode": how.exit_code,
                "reason": how.reason,
                "message": how.message,
                "startedAt": now(),
                "finishedAt": now(),
            }
        }
        phase = "Failed" if how.exit_code or how.disrupted else "Succeeded"
        await self.set_status(pod, phase, state, disrupted=how.disrupted)

    async def set_status(
        self, pod: Object, phase: str, state: Object, *, disrupted: bool = False, pod_ip: str | None = None
    ) -> None:
        """Write a pod's status as its kubelet would."""
        conditions = [{"type": "PodScheduled", "status": "True", "lastTransitionTime": now()}]
        if disrupted:
            conditions.append(
                {
                    "type": "DisruptionTarget",
                    "status": "True",
                    "reason": "EvictionByEvictionAPI",
                    "lastTransitionTime": now(),
                }
            )
        container = {"name": "trainer", "image": "t", "imageID": "", "ready": False, "restartCount": 0, "state": state}
        status = {"phase": phase, "conditions": conditions, "containerStatuses": [container]}
        if pod_ip is not None:
            status |= {"podIP": pod_ip, "podIPs": [{"ip": pod_ip}]}
        metadata = pod["metadata"]
        while True:
            try:
                fresh = await self.cluster.get("Pod", metadata["name"], metadata["namespace"])
                await self.cluster.replace_status({**fresh, "status": {**fresh["status"], **status}})
            except ConflictError:
                continue
            except NotFoundError:
                return
            return


def now() -> str:
    """The time as Kubernetes writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
