"""Classify finished Jobs and pods that fail to start."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from tunesmith.api.conditions import FailureReason, FineTuneJobReason
from tunesmith.api.finetunejob_status import AttemptOutcome
from tunesmith.contracts.report import printable
from tunesmith.contracts.result import Culpability, ExitCode, Outcome, culpability
from tunesmith.contracts.waiting import CONFIGURATION_REASONS, IMAGE_PULL_REASONS

if TYPE_CHECKING:
    from datetime import datetime

    from tunesmith.api.conditions import Reason
    from tunesmith.contracts.result import TrainerResult
    from tunesmith.jobs.observe import JobView, PodView

_IMAGE_PULL_TIMEOUT = timedelta(minutes=5)
_CONFIGURATION_TIMEOUT = timedelta(minutes=2)
_POD_CREATION_TIMEOUT = timedelta(seconds=8)
_MISSING_PODS_REQUEUE = timedelta(seconds=3)
_WAITING_REQUEUE = timedelta(seconds=30)
_SLOW_START = timedelta(minutes=2)
_MAX_EXCERPT_LENGTH = 600
VALIDATION = "validation"
"""Name of the CPU stage in messages."""
_OVER_LIMIT = re.compile(
    r"exceeded its local ephemeral storage limit|[Pp]od ephemeral local storage usage exceeds|Usage of EmptyDir volume"
)
_OVER_REQUEST = re.compile(r"low on resource: (?P<resource>ephemeral-storage|inodes|memory)\b.*Container \S+ was using")
"""Messages of the kubelet when it evicts a pod for the pod's own usage."""


@dataclass(frozen=True)
class JobOutcome:
    """Outcome of a finished Job of the trainer."""

    outcome: AttemptOutcome
    reason: FailureReason | None = None
    message: str = ""
    retryable: bool = False
    result: TrainerResult | None = None


@dataclass(frozen=True)
class Obstacle:
    """Reason why a pod is not running yet."""

    reason: Reason
    message: str
    failure: FailureReason | None = None
    """Reason of the failure once the pod has waited too long; None until then."""
    requeue_after: timedelta = _WAITING_REQUEUE
    """Delay until the next check, unless something changes earlier."""


def job_outcome(job: JobView, stage: str) -> JobOutcome:
    """Return the outcome of a finished Job. `stage` is its name in messages.

    The trainer's own result takes precedence over the records of the pod and of the Job controller.
    """
    if job.succeeded:
        return JobOutcome(AttemptOutcome.SUCCEEDED, result=job.pod.result if job.pod is not None else None)
    pod = min(
        (pod for pod in job.members if pod.exit_code not in {None, ExitCode.DONE}), key=_culpability, default=job.pod
    )
    result = pod.result if pod is not None else None
    evicted = next((found for member in job.members if (found := eviction_outcome(member, stage)) is not None), None)
    if evicted is not None:
        return evicted
    code = pod.exit_code if pod is not None and pod.exit_code is not None else job.exit_code
    if job.disrupted or code == ExitCode.PREEMPTED or (result is not None and result.outcome is Outcome.PREEMPTED):
        return JobOutcome(
            AttemptOutcome.PREEMPTED,
            message="the pod was evicted or pre-empted, or its node disappeared",
            retryable=True,
            result=result,
        )
    if pod is not None and pod.deadline_exceeded:
        return JobOutcome(
            AttemptOutcome.FAILED,
            FailureReason.DEADLINE_EXCEEDED,
            f"{stage} exceeded its time limit and was stopped: use fewer or smaller data files",
        )
    if pod is not None and pod.out_of_memory and stage == VALIDATION:
        return JobOutcome(
            AttemptOutcome.FAILED,
            FailureReason.OUT_OF_MEMORY,
            "validation needed more memory than its pod has: a row, its text after the chat template or a file "
            "without line breaks is too large; split or remove it, in a new FineTuneJob",
        )
    if pod is not None and pod.out_of_memory:
        return JobOutcome(
            AttemptOutcome.FAILED,
            FailureReason.OUT_OF_MEMORY,
            f"{stage} needed more memory than resources.memory allows; raise it, or lower "
            "hyperparameters.microBatchSize or dataset.maxLength, or use method.qlora, in a new FineTuneJob",
        )
    if result is not None and result.outcome is Outcome.FAILED:
        return JobOutcome(
            AttemptOutcome.FAILED,
            result.reason or FailureReason.INTERNAL_ERROR,
            result.message or f"{stage} failed without a message",
            result.retryable,
            result,
        )
    exited = (
        f"{stage} stopped without a result" if code is None else f"{stage} exited with code {code} without a result"
    )
    detail = _excerpt(pod.termination_message if pod is not None else "") or job.failure_message
    return JobOutcome(
        AttemptOutcome.FAILED,
        FailureReason.INTERNAL_ERROR,
        f"{exited}: {detail}" if detail else f"{exited}; see `kubectl logs {pod.name if pod else f'job/{job.name}'}`",
        retryable=code != ExitCode.USER_FAULT,
    )


def eviction_outcome(pod: PodView, stage: str) -> JobOutcome | None:
    """Return the outcome of a pod that was evicted for its own usage of the node; None if it was not at fault."""
    message = _excerpt(pod.eviction)
    limited, used = _OVER_LIMIT.search(message) is not None, _OVER_REQUEST.search(message)
    if used is not None and used["resource"] == "memory":
        return JobOutcome(
            AttemptOutcome.FAILED,
            FailureReason.OUT_OF_MEMORY,
            f"{stage} used more memory than it requests, and its node ran out of memory: raise resources.memory in a "
            f"new FineTuneJob ({message})",
            retryable=True,
        )
    if not limited and used is None:
        return None
    return JobOutcome(
        AttemptOutcome.FAILED,
        FailureReason.OUT_OF_DISK,
        f"{stage} filled the disk of its node: use less data, a smaller base model or fewer checkpoints "
        f"(checkpoint.keep), or nodes with larger disks ({message})",
        retryable=not limited,
    )


def _culpability(pod: PodView) -> tuple[Culpability, bool, datetime, int]:
    """Return the sort key of a failed pod: the pod with the lowest one caused the others to fail.

    A container that ran out of memory cannot report that itself.
    """
    rank = Culpability.ROOT_CAUSE if pod.out_of_memory else culpability(pod.result)
    return rank, pod.finished_at is None, pod.finished_at or pod.created, pod.index


def find_obstacle(job: JobView, now: datetime) -> Obstacle | None:
    """Return why the newest pods of an unfinished Job are not all running; None if they are, or have terminated."""
    members = job.members
    obstacles = [obstacle for pod in members if (obstacle := _pod_obstacle(pod, now)) is not None]
    if len(members) < job.size and not obstacles:
        return _missing_pods(job, now)
    return next(
        (obstacle for obstacle in obstacles if obstacle.failure is not None), obstacles[0] if obstacles else None
    )


def _missing_pods(job: JobView, now: datetime) -> Obstacle:
    age = now - job.created
    requeue_after = _MISSING_PODS_REQUEUE if age < _WAITING_REQUEUE else _WAITING_REQUEUE
    count = f"{len(job.members)} of {job.size} pods" if job.members else "no pod"
    if job.refused:
        message = f"Job {job.name} has {count}: {job.refused}"
        return Obstacle(FineTuneJobReason.PODS_REFUSED, message, requeue_after=requeue_after)
    if age < _POD_CREATION_TIMEOUT:
        return Obstacle(FineTuneJobReason.POD_PENDING, f"Job {job.name} was created", requeue_after=requeue_after)
    return Obstacle(
        FineTuneJobReason.PODS_MISSING,
        f"Job {job.name} has {count}: an admission policy, a LimitRange or a missing PriorityClass may refuse it; "
        f"`kubectl describe job {job.name}` shows why",
        requeue_after=requeue_after,
    )


def _pod_obstacle(pod: PodView, now: datetime) -> Obstacle | None:
    if pod.running or pod.exit_code is not None:
        return None
    if pod.unschedulable is not None:
        return Obstacle(FineTuneJobReason.UNSCHEDULABLE, f"pod {pod.name} waits for a node: {pod.unschedulable}")
    if pod.waiting_reason in IMAGE_PULL_REASONS:
        return _image_pull_obstacle(pod, now)
    if pod.waiting_reason in CONFIGURATION_REASONS:
        return _configuration_obstacle(pod, now)
    where = f" on node {pod.node}" if pod.node else ""
    is_slow = now - (pod.scheduled or pod.created) >= _SLOW_START
    hint = f"; `kubectl describe pod {pod.name}` shows the reason" if is_slow else ""
    return Obstacle(FineTuneJobReason.POD_PENDING, f"pod {pod.name} is being started{where}{hint}")


def _image_pull_obstacle(pod: PodView, now: datetime) -> Obstacle:
    since = pod.scheduled or pod.created
    message = (
        f"pod {pod.name} cannot pull its image: {_excerpt(pod.waiting_message) or pod.waiting_reason}; "
        "check the image's name, the registry and the pull secret of the installation"
    )
    is_late = now - since >= _IMAGE_PULL_TIMEOUT or pod.waiting_reason == "InvalidImageName"
    return Obstacle(FailureReason.IMAGE_PULL_FAILED, message, FailureReason.IMAGE_PULL_FAILED if is_late else None)


def _configuration_obstacle(pod: PodView, now: datetime) -> Obstacle:
    since = pod.scheduled or pod.created
    detail = _excerpt(pod.waiting_message) or pod.waiting_reason or ""
    is_secret = "secret" in detail.lower()
    reason = FailureReason.SECRET_NOT_FOUND if is_secret else FailureReason.INTERNAL_ERROR
    fix = "; create it in the pod's namespace, and the job continues" if is_secret else ""
    message = f"pod {pod.name} cannot start its container: {detail}{fix}"
    return Obstacle(reason, message, reason if now - since >= _CONFIGURATION_TIMEOUT else None)


def _excerpt(text: str) -> str:
    """Return the last line that is not blank, at most 600 characters."""
    lines = [line.strip() for line in printable(text).splitlines() if line.strip()]
    return lines[-1][:_MAX_EXCERPT_LENGTH] if lines else ""
