"""Observed state of a Job and its pods."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from tunesmith.contracts.result import TrainerResult

if TYPE_CHECKING:
    from collections.abc import Iterable

CONTAINER = "trainer"
COMPONENT_LABEL = "app.kubernetes.io/component"
ATTEMPT_LABEL = "tunesmith.dev/attempt"
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
NUMBER = re.compile(r"[0-9]{1,9}")
"""Pattern of the number of an attempt or an index."""
_EXIT_CODE = re.compile(r"exit code (\d+)")

Object = dict[str, Any]


@dataclass(frozen=True)
class PodView:
    """A pod of a Job. Times are UTC."""

    name: str
    created: datetime
    index: int = 0
    """Index among the pods that a Job runs at the same time."""
    node: str | None = None
    scheduled: datetime | None = None
    unschedulable: str | None = None
    """The scheduler's message, if no node fits the pod."""
    waiting_reason: str | None = None
    """Reason why its container does not start, such as ImagePullBackOff."""
    waiting_message: str = ""
    started: datetime | None = None
    running: bool = False
    succeeded: bool = False
    """True if all its containers finished successfully."""
    finished_at: datetime | None = None
    exit_code: int | None = None
    out_of_memory: bool = False
    disrupted: bool = False
    """True if it was evicted or pre-empted, or its node disappeared."""
    deadline_exceeded: bool = False
    """True if it was stopped at the pod's activeDeadlineSeconds."""
    eviction: str = ""
    """The kubelet's message, if it evicted the pod."""
    termination_message: str = ""

    @property
    def result(self) -> TrainerResult | None:
        """The trainer's result; None if it is missing or cannot be read."""
        return TrainerResult.parse(self.termination_message)


@dataclass(frozen=True)
class JobView:
    """A Job with its pods, oldest first."""

    name: str
    created: datetime
    succeeded: bool = False
    """True if the Job controller marked it as complete, or is about to: it does so a second after the pods' end."""
    failed: bool = False
    failure_message: str = ""
    """The Job controller's message, with the exit code or disruption if a rule of the pod failure policy matched."""
    finished_at: datetime | None = None
    size: int = 1
    """Number of pods that it runs at the same time."""
    suspended: bool = False
    """True if a queue holds it back."""
    held_back: str = ""
    """Kueue's reason for holding it back; empty if it reports none."""
    deleting: bool = False
    """True if it was deleted and its pods are terminating."""
    refused: str = ""
    """Reason why a ResourceQuota leaves no room for its missing pods; empty if every quota has room."""
    pods: tuple[PodView, ...] = ()

    @property
    def finished(self) -> bool:
        """True if it succeeded, or the Job controller marked it as failed."""
        return self.succeeded or self.failed

    @property
    def members(self) -> tuple[PodView, ...]:
        """Newest pod of each index, in order of index: the pods that run, or ran, together."""
        newest = {pod.index: pod for pod in self.pods}
        return tuple(newest[index] for index in sorted(newest))

    @property
    def pod(self) -> PodView | None:
        """Newest pod of index 0, which reports for all pods of the attempt."""
        return next((pod for pod in self.members if pod.index == 0), None)

    @property
    def exit_code(self) -> int | None:
        """Exit code of the newest pod, or from the Job's record if the pod is gone."""
        if self.pod is not None and self.pod.exit_code is not None:
            return self.pod.exit_code
        match = _EXIT_CODE.search(self.failure_message)
        return int(match.group(1)) if match else None

    @property
    def disrupted(self) -> bool:
        """True if a disruption stopped it, not the program."""
        return any(pod.disrupted for pod in self.members) or "DisruptionTarget" in self.failure_message


def view(job: Object, pods: Iterable[Object], held: str = "", refused: str = "") -> JobView:
    """Return the observed state of a Job.

    Args:
        job: the Job.
        pods: its pods.
        held: Kueue's reason for holding it back; empty if it reports none.
        refused: reason why a ResourceQuota leaves no room for its pods; empty if every quota has room.
    """
    conditions = {
        condition["type"]: condition
        for condition in job.get("status", {}).get("conditions") or ()
        if condition["status"] == "True"
    }
    failed = conditions.get("Failed")
    finished = failed or conditions.get("Complete") or {}
    found = JobView(
        name=job["metadata"]["name"],
        created=_required(job["metadata"]["creationTimestamp"]),
        succeeded="Complete" in conditions,
        failed=failed is not None,
        failure_message=(failed or {}).get("message", ""),
        finished_at=_time(finished.get("lastTransitionTime")),
        size=job.get("spec", {}).get("parallelism", 1),
        suspended=bool(job.get("spec", {}).get("suspend")),
        held_back=held,
        deleting="deletionTimestamp" in job["metadata"],
        refused=refused,
        pods=tuple(sorted((_pod(pod) for pod in pods), key=lambda pod: (pod.created, pod.name))),
    )
    all_succeeded = len(found.members) == found.size and all(pod.succeeded for pod in found.members)
    return replace(found, succeeded=True) if all_succeeded and not found.finished else found


def index_of(pod: Object) -> int:
    """Return the pod's index among the pods that its Job runs at the same time; 0 for a single pod."""
    index = (pod["metadata"].get("labels") or {}).get(INDEX_LABEL, "0")
    return int(index) if NUMBER.fullmatch(index) else 0


def _pod(pod: Object) -> PodView:
    status = pod.get("status") or {}
    conditions = {condition["type"]: condition for condition in status.get("conditions") or ()}
    scheduled = conditions.get("PodScheduled", {})
    is_scheduled = scheduled.get("status") == "True"
    container: Object = next(
        (entry for entry in status.get("containerStatuses") or () if entry["name"] == CONTAINER), {}
    )
    state = container.get("state") or {}
    waiting, running, terminated = state.get("waiting") or {}, state.get("running"), state.get("terminated") or {}
    return PodView(
        name=pod["metadata"]["name"],
        created=_required(pod["metadata"]["creationTimestamp"]),
        index=index_of(pod),
        node=pod.get("spec", {}).get("nodeName"),
        scheduled=_time(scheduled.get("lastTransitionTime")) if is_scheduled else None,
        unschedulable=scheduled.get("message", "")
        if scheduled.get("reason") == "Unschedulable" and not is_scheduled
        else None,
        waiting_reason=waiting.get("reason"),
        waiting_message=waiting.get("message", ""),
        started=_time((running or terminated).get("startedAt")) if running or terminated else None,
        running=running is not None,
        succeeded=status.get("phase") == "Succeeded",
        finished_at=_time(terminated.get("finishedAt")),
        exit_code=terminated.get("exitCode"),
        out_of_memory=terminated.get("reason") == "OOMKilled",
        disrupted=conditions.get("DisruptionTarget", {}).get("status") == "True" or status.get("reason") == "Evicted",
        deadline_exceeded=status.get("reason") == "DeadlineExceeded",
        eviction=status.get("message", "") if status.get("reason") == "Evicted" else "",
        termination_message=terminated.get("message", ""),
    )


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _required(text: str) -> datetime:
    return datetime.fromisoformat(text)
