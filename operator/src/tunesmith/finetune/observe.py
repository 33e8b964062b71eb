"""Observed state of a FineTuneJob: its Jobs, their pods and the latest progress."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tunesmith.contracts.location import owned_name
from tunesmith.contracts.ownership import controller_of
from tunesmith.contracts.result import TrainerResult

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith.api.finetunejob_status import ProgressStatus
    from tunesmith.api.model import ObjectMeta
    from tunesmith.contracts.refusal import Refusal

CONTAINER = "trainer"
COMPONENT_LABEL = "app.kubernetes.io/component"
ATTEMPT_LABEL = "tunesmith.dev/attempt"
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
WORKLOAD_LABEL = "kueue.x-k8s.io/job-uid"
_LONGEST_REASON = 1024
VALIDATE = "validate"
TRAIN = "train"
_NUMBER = re.compile(r"[0-9]{1,9}")
_EXIT_CODE = re.compile(r"exit code (\d+)")

Object = dict[str, Any]


@dataclass(frozen=True)
class PodView:
    """A pod of a Job. Times are UTC."""

    name: str
    created: datetime
    index: int = 0
    """Its place among the pods that a Job runs at one time."""
    node: str | None = None
    scheduled: datetime | None = None
    unschedulable: str | None = None
    """The scheduler's message, where no node takes the pod."""
    waiting_reason: str | None = None
    """Why its container does not start, such as ImagePullBackOff."""
    waiting_message: str = ""
    started: datetime | None = None
    running: bool = False
    ended: datetime | None = None
    exit_code: int | None = None
    out_of_memory: bool = False
    disrupted: bool = False
    """Evicted, pre-empted, or its node went away."""
    late: bool = False
    """Stopped at the pod's activeDeadlineSeconds."""
    eviction: str = ""
    """The kubelet's message, where it evicted the pod."""
    termination_message: str = ""

    @property
    def result(self) -> TrainerResult | None:
        """What the trainer said at its end; None where it said nothing that can be read."""
        return TrainerResult.parse(self.termination_message)


@dataclass(frozen=True)
class JobView:
    """A Job with its pods, oldest first."""

    name: str
    created: datetime
    succeeded: bool = False
    failed: bool = False
    failure_message: str = ""
    """The Job controller's words; with a rule of the pod failure policy they hold the exit code or the disruption."""
    ended: datetime | None = None
    size: int = 1
    """Pods that it runs at one time."""
    suspended: bool = False
    """A queue holds it back."""
    held_back: str = ""
    """Why, as Kueue says; empty where it says nothing."""
    deleting: bool = False
    """It was deleted, and its pods are ending."""
    refused: str = ""
    """Why a ResourceQuota leaves no room for its missing pods; empty if none does."""
    pods: tuple[PodView, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether the Job controller is done with it."""
        return self.succeeded or self.failed

    @property
    def members(self) -> tuple[PodView, ...]:
        """The newest pod of each index, by index: those that run together, or did."""
        newest = {pod.index: pod for pod in self.pods}
        return tuple(newest[index] for index in sorted(newest))

    @property
    def pod(self) -> PodView | None:
        """The newest pod of index 0, which reports for all."""
        return next((pod for pod in self.members if pod.index == 0), None)

    @property
    def exit_code(self) -> int | None:
        """The newest pod's exit code, from the Job's own record where the pod is gone."""
        if self.pod is not None and self.pod.exit_code is not None:
            return self.pod.exit_code
        match = _EXIT_CODE.search(self.failure_message)
        return int(match.group(1)) if match else None

    @property
    def disrupted(self) -> bool:
        """Whether a disruption ended it, and not the program."""
        return any(pod.disrupted for pod in self.members) or "DisruptionTarget" in self.failure_message


@dataclass(frozen=True)
class Observation:
    """Everything that a plan is made from."""

    job: FineTuneJob
    now: datetime
    validation: JobView | None = None
    attempts: Mapping[int, JobView] = field(default_factory=dict)
    """By attempt number, from 1."""
    progress: ProgressStatus | None = None
    """Of the pod that runs now."""
    lingering: tuple[str, ...] = ()
    """Pods of attempts that have not ended although their Job is gone: deleted by somebody, and still saving."""
    refusal: Refusal | None = None
    """Of a write that this plan asks for."""


def observe(
    finetunejob: FineTuneJob,
    jobs: Iterable[Object],
    pods: Iterable[Object],
    progress: ProgressStatus | None,
    now: datetime,
    workloads: Iterable[Object] = (),
    refused: Mapping[str, str] = MappingProxyType({}),
) -> Observation:
    """Read the objects of the cluster.

    Args:
        finetunejob: the FineTuneJob.
        jobs: the Jobs that it owns.
        pods: the pods of the FineTuneJob's Jobs; those of another FineTuneJob that had its name are ignored.
        progress: the newest sample of the running pod.
        now: the time, UTC.
        workloads: Kueue's, of Jobs that wait in a queue.
        refused: by name of a Job, why a ResourceQuota leaves no room for its pods.
    """
    metadata = finetunejob.metadata
    by_owner: dict[str, list[Object]] = {}
    for pod in pods:
        owner = _controller(pod, metadata, "Job")
        if owner is not None:
            by_owner.setdefault(owner["uid"], []).append(pod)
    jobs = [job for job in jobs if is_job_of(metadata, job)]
    known = {job["metadata"]["uid"] for job in jobs}
    waits = {(workload["metadata"].get("labels") or {}).get(WORKLOAD_LABEL): workload for workload in workloads}
    validation: JobView | None = None
    attempts: dict[int, JobView] = {}
    for job in jobs:
        labels = job["metadata"].get("labels") or {}
        uid, name = job["metadata"]["uid"], job["metadata"]["name"]
        held = held_back(waits[uid]) if uid in waits else ""
        view = _job(job, by_owner.get(uid, ()), held, refused.get(name, ""))
        if name == _owned(metadata, VALIDATE):
            validation = view
        elif name == _owned(metadata, labels.get(ATTEMPT_LABEL, "")) and _NUMBER.fullmatch(labels[ATTEMPT_LABEL]):
            attempts[int(labels[ATTEMPT_LABEL])] = view
    return Observation(
        job=finetunejob,
        now=now.replace(microsecond=0),
        validation=validation,
        attempts=dict(sorted(attempts.items())),
        progress=progress,
        lingering=tuple(
            pod["metadata"]["name"]
            for owner, owned in by_owner.items()
            if owner not in known
            for pod in owned
            if _writes(pod, metadata)
        ),
    )


def is_job_of(finetunejob: ObjectMeta, job: Object) -> bool:
    """Return True if the Job belongs to the FineTuneJob: its namespace, its controlling owner and its name agree.

    Anyone may write the uid of an object into the metadata of their own objects, in any namespace.
    """
    owner = _controller(job, finetunejob, "FineTuneJob")
    suffix = (job["metadata"].get("labels") or {}).get(ATTEMPT_LABEL, VALIDATE)
    return (
        owner is not None
        and (owner["name"], owner["uid"]) == (finetunejob.name, finetunejob.uid)
        and job["metadata"]["name"] == _owned(finetunejob, suffix)
    )


def _controller(item: Object, finetunejob: ObjectMeta, kind: str) -> Object | None:
    """Return the owner reference of an object's controller if it is of `kind` and in the FineTuneJob's namespace."""
    if item["metadata"].get("namespace") != finetunejob.namespace:
        return None
    return controller_of(item, kind)


def _owned(finetunejob: ObjectMeta, suffix: str) -> str:
    return owned_name(finetunejob.name, finetunejob.uid, suffix)


def _writes(pod: Object, finetunejob: ObjectMeta) -> bool:
    """Return True if the pod is one of the FineTuneJob's attempts and has not terminated."""
    attempt = (pod["metadata"].get("labels") or {}).get(ATTEMPT_LABEL, "")
    owner = _controller(pod, finetunejob, "Job")
    running = (pod.get("status") or {}).get("phase") not in {"Succeeded", "Failed"}
    return owner is not None and owner["name"] == _owned(finetunejob, attempt) and running


def held_back(workload: Object) -> str:
    """Why Kueue does not admit what a Workload stands for, in its own words; empty where it does not say."""
    conditions = workload.get("status", {}).get("conditions") or ()
    waiting = [
        condition["message"]
        for type_, status in (("Evicted", "True"), ("QuotaReserved", "False"), ("Admitted", "False"))
        for condition in conditions
        if condition["type"] == type_ and condition["status"] == status and condition.get("message")
    ]
    return "; ".join(dict.fromkeys(waiting))[:_LONGEST_REASON]


def _job(job: Object, pods: Iterable[Object], held: str, refused: str) -> JobView:
    conditions = {
        condition["type"]: condition
        for condition in job.get("status", {}).get("conditions") or ()
        if condition["status"] == "True"
    }
    failed = conditions.get("Failed")
    end = failed or conditions.get("Complete") or {}
    return JobView(
        name=job["metadata"]["name"],
        created=_required(job["metadata"]["creationTimestamp"]),
        succeeded="Complete" in conditions,
        failed=failed is not None,
        failure_message=(failed or {}).get("message", ""),
        ended=_time(end.get("lastTransitionTime")),
        size=job.get("spec", {}).get("parallelism", 1),
        suspended=bool(job.get("spec", {}).get("suspend")),
        held_back=held,
        deleting="deletionTimestamp" in job["metadata"],
        refused=refused,
        pods=tuple(sorted((_pod(pod) for pod in pods), key=lambda pod: (pod.created, pod.name))),
    )


def index_of(pod: Object) -> int:
    """The pod's place among those that its Job runs at one time; 0 where it has one alone."""
    index = (pod["metadata"].get("labels") or {}).get(INDEX_LABEL, "0")
    return int(index) if _NUMBER.fullmatch(index) else 0


def _pod(pod: Object) -> PodView:
    status = pod.get("status") or {}
    conditions = {condition["type"]: condition for condition in status.get("conditions") or ()}
    scheduled = conditions.get("PodScheduled", {})
    placed = scheduled.get("status") == "True"
    container: Object = next(
        (entry for entry in status.get("containerStatuses") or () if entry["name"] == CONTAINER), {}
    )
    state = container.get("state") or {}
    waiting, running, ended = state.get("waiting") or {}, state.get("running"), state.get("terminated") or {}
    return PodView(
        name=pod["metadata"]["name"],
        created=_required(pod["metadata"]["creationTimestamp"]),
        index=index_of(pod),
        node=pod.get("spec", {}).get("nodeName"),
        scheduled=_time(scheduled.get("lastTransitionTime")) if placed else None,
        unschedulable=scheduled.get("message", "")
        if scheduled.get("reason") == "Unschedulable" and not placed
        else None,
        waiting_reason=waiting.get("reason"),
        waiting_message=waiting.get("message", ""),
        started=_time((running or ended).get("startedAt")) if running or ended else None,
        running=running is not None,
        ended=_time(ended.get("finishedAt")),
        exit_code=ended.get("exitCode"),
        out_of_memory=ended.get("reason") == "OOMKilled",
        disrupted=conditions.get("DisruptionTarget", {}).get("status") == "True" or status.get("reason") == "Evicted",
        late=status.get("reason") == "DeadlineExceeded",
        eviction=status.get("message", "") if status.get("reason") == "Evicted" else "",
        termination_message=ended.get("message", ""),
    )


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _required(text: str) -> datetime:
    return datetime.fromisoformat(text)
