"""Observed state of a FineTuneJob: its Jobs, their pods and the latest progress."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tunesmith.contracts.location import owned_name
from tunesmith.contracts.ownership import controller_of
from tunesmith.jobs.observe import ATTEMPT_LABEL, NUMBER, view

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime

    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith.api.finetunejob_status import ProgressStatus
    from tunesmith.api.model import ObjectMeta
    from tunesmith.contracts.refusal import Refusal
    from tunesmith.jobs.observe import JobView

WORKLOAD_LABEL = "kueue.x-k8s.io/job-uid"
_MAX_REASON_LENGTH = 1024
VALIDATE = "validate"
TRAIN = "train"

Object = dict[str, Any]


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
        found = view(job, by_owner.get(uid, ()), held, refused.get(name, ""))
        if name == _owned(metadata, VALIDATE):
            validation = found
        elif name == _owned(metadata, labels.get(ATTEMPT_LABEL, "")) and NUMBER.fullmatch(labels[ATTEMPT_LABEL]):
            attempts[int(labels[ATTEMPT_LABEL])] = found
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


def users_of(
    name: str, deployments: Iterable[Object], finetunejobs: Iterable[Object], pools: Iterable[Object] = ()
) -> tuple[str, ...]:
    """Return the resources that need a FineTuneJob: AdapterDeployments, pools and unfinished FineTuneJobs that name it.

    Args:
        name: name of the FineTuneJob.
        deployments: AdapterDeployments of its namespace.
        finetunejobs: FineTuneJobs of its namespace.
        pools: ServingPools that may serve its whole model and name it.
    """
    serving = [item for item in deployments if adapter_source(item) == name]
    training = [item for item in finetunejobs if continued_job(item) == name and not _is_terminal(item)]
    return tuple(
        f"{item['kind']} {item['metadata']['name']}"
        for item in [*serving, *training, *pools]
        if "deletionTimestamp" not in item["metadata"]
    )


def adapter_source(deployment: Object) -> str | None:
    """Return the name of the FineTuneJob whose adapter an AdapterDeployment serves."""
    return _name(deployment, "adapterFrom")


def base_job(pool: Object) -> tuple[str, str] | None:
    """Return namespace and name of the FineTuneJob whose whole model is a ServingPool's base; None for a uri."""
    job = (((pool.get("spec") or {}).get("baseModel") or {}).get("from") or {}).get("fineTuneJob")
    return (job.get("namespace") or pool["metadata"]["namespace"], job["name"]) if job else None


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
