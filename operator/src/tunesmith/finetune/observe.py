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
_MAX_REASON_LENGTH = 1024
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
        """True if the Job controller marked it as succeeded or failed."""
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


@dataclass(frozen=True)
class Observation:
    """Everything that a plan depends on."""

    job: FineTuneJob
    now: datetime
    validation: JobView | None = None
    attempts: Mapping[int, JobView] = field(default_factory=dict)
    """Jobs by number of the attempt, from 1."""
    progress: ProgressStatus | None = None
    """Progress of the running pod."""
    lingering: tuple[str, ...] = ()
    """Pods of attempts whose Job was deleted and that are still saving."""
    refusal: Refusal | None = None
    """Refusal of a write that this plan requests."""
    source: FineTuneJob | None = None
    """The FineTuneJob in spec.continueFrom; None if it does not exist."""
    users: tuple[str, ...] = ()
    """Resources that name this FineTuneJob, which is therefore kept."""


def observe(
    finetunejob: FineTuneJob,
    jobs: Iterable[Object],
    pods: Iterable[Object],
    progress: ProgressStatus | None,
    now: datetime,
    workloads: Iterable[Object] = (),
    refused: Mapping[str, str] = MappingProxyType({}),
    source: FineTuneJob | None = None,
    users: tuple[str, ...] = (),
) -> Observation:
    """Return the observed state from the cluster's objects.

    Args:
        finetunejob: the FineTuneJob.
        jobs: its Jobs.
        pods: the pods of its Jobs; pods of an earlier FineTuneJob with the same name are ignored.
        progress: the newest sample of the running pod.
        now: the time, UTC.
        workloads: Kueue's Workloads of Jobs that wait in a queue.
        refused: reason, by name of a Job, why a ResourceQuota leaves no room for its pods.
        source: the FineTuneJob in spec.continueFrom; None if it does not exist.
        users: result of `users_of`.
    """
    metadata = finetunejob.metadata
    by_owner: dict[str, list[Object]] = {}
    for pod in pods:
        owner = _controller(pod, metadata, "Job")
        if owner is not None:
            by_owner.setdefault(owner["uid"], []).append(pod)
    jobs = [job for job in jobs if is_job_of(metadata, job)]
    known = {job["metadata"]["uid"] for job in jobs}
    workloads_by_job = {
        (workload["metadata"].get("labels") or {}).get(WORKLOAD_LABEL): workload for workload in workloads
    }
    validation: JobView | None = None
    attempts: dict[int, JobView] = {}
    for job in jobs:
        labels = job["metadata"].get("labels") or {}
        uid, name = job["metadata"]["uid"], job["metadata"]["name"]
        held = held_back(workloads_by_job[uid]) if uid in workloads_by_job else ""
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
        source=source,
        users=users,
        lingering=tuple(
            pod["metadata"]["name"]
            for owner, owned in by_owner.items()
            if owner not in known
            for pod in owned
            if _may_write(pod, metadata)
        ),
    )


def users_of(name: str, deployments: Iterable[Object], finetunejobs: Iterable[Object]) -> tuple[str, ...]:
    """Return the resources that need a FineTuneJob: AdapterDeployments and unfinished FineTuneJobs that name it.

    Args:
        name: name of the FineTuneJob.
        deployments: AdapterDeployments of its namespace.
        finetunejobs: FineTuneJobs of its namespace.
    """
    serving = [item for item in deployments if adapter_source(item) == name]
    training = [item for item in finetunejobs if continued_job(item) == name and not _is_terminal(item)]
    return tuple(
        f"{item['kind']} {item['metadata']['name']}"
        for item in [*serving, *training]
        if "deletionTimestamp" not in item["metadata"]
    )


def adapter_source(deployment: Object) -> str | None:
    """Return the name of the FineTuneJob whose adapter an AdapterDeployment serves."""
    return _name(deployment, "adapterFrom")


def continued_job(finetunejob: Object) -> str | None:
    """Return the name of the FineTuneJob whose adapter another one starts from; None if it names none."""
    return _name(finetunejob, "continueFrom")


def _name(item: Object, field: str) -> str | None:
    source = (item.get("spec") or {}).get(field) or {}
    name: str | None = (source.get("fineTuneJob") or {}).get("name")
    return name


def _is_terminal(finetunejob: Object) -> bool:
    conditions = (finetunejob.get("status") or {}).get("conditions") or ()
    return any(entry["type"] in {"Complete", "Failed"} and entry["status"] == "True" for entry in conditions)


def is_job_of(finetunejob: ObjectMeta, job: Object) -> bool:
    """Return True if the Job belongs to the FineTuneJob: its namespace, its controlling owner and its name match.

    The UID alone is not enough: users may write any UID into the metadata of their own objects, in any namespace.
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


def _may_write(pod: Object, finetunejob: ObjectMeta) -> bool:
    """Return True if the pod is one of the FineTuneJob's attempts and has not terminated."""
    attempt = (pod["metadata"].get("labels") or {}).get(ATTEMPT_LABEL, "")
    owner = _controller(pod, finetunejob, "Job")
    running = (pod.get("status") or {}).get("phase") not in {"Succeeded", "Failed"}
    return owner is not None and owner["name"] == _owned(finetunejob, attempt) and running


def held_back(workload: Object) -> str:
    """Return Kueue's reason for not admitting a Workload; empty if it reports none."""
    conditions = workload.get("status", {}).get("conditions") or ()
    waiting = [
        condition["message"]
        for type_, status in (("Evicted", "True"), ("QuotaReserved", "False"), ("Admitted", "False"))
        for condition in conditions
        if condition["type"] == type_ and condition["status"] == status and condition.get("message")
    ]
    return "; ".join(dict.fromkeys(waiting))[:_MAX_REASON_LENGTH]


def _job(job: Object, pods: Iterable[Object], held: str, refused: str) -> JobView:
    conditions = {
        condition["type"]: condition
        for condition in job.get("status", {}).get("conditions") or ()
        if condition["status"] == "True"
    }
    failed = conditions.get("Failed")
    finished = failed or conditions.get("Complete") or {}
    return JobView(
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


def index_of(pod: Object) -> int:
    """Return the pod's index among the pods that its Job runs at the same time; 0 for a single pod."""
    index = (pod["metadata"].get("labels") or {}).get(INDEX_LABEL, "0")
    return int(index) if _NUMBER.fullmatch(index) else 0


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
