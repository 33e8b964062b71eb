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
    from tunesmith.finetune.observe import JobView, PodView

_IMAGE_PATIENCE = timedelta(minutes=5)
_SECRET_PATIENCE = timedelta(minutes=2)
_MISSING_PATIENCE = timedelta(seconds=8)
_MISSING_LOOK = timedelta(seconds=3)
_WAITING_LOOK = timedelta(seconds=30)
_START_PATIENCE = timedelta(minutes=2)
_MAX_EXCERPT = 600
VALIDATION = "validation"
"""Name of the CPU stage in messages."""
_OVER_LIMIT = re.compile(
    r"exceeded its local ephemeral storage limit|[Pp]od ephemeral local storage usage exceeds|Usage of EmptyDir volume"
)
_OVER_REQUEST = re.compile(r"low on resource: (?P<resource>ephemeral-storage|inodes|memory)\b.*Container \S+ was using")
"""Messages of the kubelet when it evicts a pod for the pod's own usage."""


@dataclass(frozen=True)
class Ending:
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
    """Set once the pod has waited too long: the attempt has then failed."""
    look_again: timedelta = _WAITING_LOOK
    """Delay until the next check, unless something changes earlier."""


def ending(job: JobView, stage: str) -> Ending:
    """Return the outcome of a finished Job. `stage` is its name in messages.

    The trainer's own result takes precedence over the records of the pod and of the Job controller.
    """
    if job.succeeded:
        return Ending(AttemptOutcome.SUCCEEDED, result=job.pod.result if job.pod is not None else None)
    pod = min(
        (pod for pod in job.members if pod.exit_code not in {None, ExitCode.DONE}), key=_culpability, default=job.pod
    )
    result = pod.result if pod is not None else None
    greedy = next((end for member in job.members if (end := evicted(member, stage)) is not None), None)
    if greedy is not None:
        return greedy
    code = pod.exit_code if pod is not None and pod.exit_code is not None else job.exit_code
    if job.disrupted or code == ExitCode.PREEMPTED or (result is not None and result.outcome is Outcome.PREEMPTED):
        return Ending(
            AttemptOutcome.PREEMPTED,
            message="the pod was evicted, pre-empted or its node went away",
            retryable=True,
            result=result,
        )
    if pod is not None and pod.late:
        return Ending(
            AttemptOutcome.FAILED,
            FailureReason.DEADLINE_EXCEEDED,
            f"{stage} took longer than its pod may run and was stopped: use fewer or smaller data files",
        )
    if pod is not None and pod.out_of_memory and stage == VALIDATION:
        return Ending(
            AttemptOutcome.FAILED,
            FailureReason.OUT_OF_MEMORY,
            "validation needed more memory than its pod has: a row, the chat template's text of a row or a file "
            "without line breaks is too large; split or remove it, in a new FineTuneJob",
        )
    if pod is not None and pod.out_of_memory:
        return Ending(
            AttemptOutcome.FAILED,
            FailureReason.OUT_OF_MEMORY,
            f"{stage} needed more memory than resources.memory allows; raise it, or lower "
            "hyperparameters.microBatchSize or dataset.maxLength, or use method.qlora, in a new FineTuneJob",
        )
    if result is not None and result.outcome is Outcome.FAILED:
        return Ending(
            AttemptOutcome.FAILED,
            result.reason or FailureReason.INTERNAL_ERROR,
            result.message or f"{stage} failed without a message",
            result.retryable,
            result,
        )
    exited = f"{stage} ended" + (f" with exit code {code}" if code is not None else "") + " and left no result"
    words = _excerpt(pod.termination_message if pod is not None else "") or job.failure_message
    return Ending(
        AttemptOutcome.FAILED,
        FailureReason.INTERNAL_ERROR,
        f"{exited}: {words}" if words else f"{exited}; see `kubectl logs {pod.name if pod else f'job/{job.name}'}`",
        retryable=code != ExitCode.USER_FAULT,
    )


def evicted(pod: PodView, stage: str) -> Ending | None:
    """Return the outcome of a pod that was evicted for its own usage of the node; None if it was not at fault."""
    message = _excerpt(pod.eviction)
    limited, used = _OVER_LIMIT.search(message) is not None, _OVER_REQUEST.search(message)
    if used is not None and used["resource"] == "memory":
        return Ending(
            AttemptOutcome.FAILED,
            FailureReason.OUT_OF_MEMORY,
            f"{stage} used more memory than it asks for, and its node ran out: raise resources.memory in a new "
            f"FineTuneJob ({message})",
            retryable=True,
        )
    if not limited and used is None:
        return None
    return Ending(
        AttemptOutcome.FAILED,
        FailureReason.OUT_OF_DISK,
        f"{stage} filled the disk of its node: use less data, a smaller base model or fewer checkpoints "
        f"(checkpoint.keep), or nodes with larger disks ({message})",
        retryable=not limited,
    )


def _culpability(pod: PodView) -> tuple[Culpability, bool, datetime, int]:
    """Return the sort key of a failed pod: the lowest one caused the others to fail.

    A container that ran out of memory cannot report it itself.
    """
    rank = Culpability.ROOT_CAUSE if pod.out_of_memory else culpability(pod.result)
    return rank, pod.ended is None, pod.ended or pod.created, pod.index


def obstacle(job: JobView, now: datetime) -> Obstacle | None:
    """Return why the newest pods of an unfinished Job are not all running; None if they are, or have terminated."""
    members = job.members
    found = [wait for pod in members if (wait := _pod_obstacle(pod, now)) is not None]
    if len(members) < job.size and not found:
        return _missing(job, now)
    return next((wait for wait in found if wait.failure is not None), found[0] if found else None)


def _missing(job: JobView, now: datetime) -> Obstacle:
    age = now - job.created
    look = _MISSING_LOOK if age < _WAITING_LOOK else _WAITING_LOOK
    count = f"{len(job.members)} of {job.size} pods" if job.members else "no pod"
    if job.refused:
        message = f"Job {job.name} has {count}: {job.refused}"
        return Obstacle(FineTuneJobReason.PODS_REFUSED, message, look_again=look)
    if age < _MISSING_PATIENCE:
        return Obstacle(FineTuneJobReason.POD_PENDING, f"Job {job.name} was created", look_again=look)
    return Obstacle(
        FineTuneJobReason.PODS_MISSING,
        f"Job {job.name} has {count}: an admission policy, a LimitRange or a missing PriorityClass may refuse it; "
        f"`kubectl describe job {job.name}` shows why",
        look_again=look,
    )


def _pod_obstacle(pod: PodView, now: datetime) -> Obstacle | None:
    if pod.running or pod.exit_code is not None:
        return None
    if pod.unschedulable is not None:
        return Obstacle(FineTuneJobReason.UNSCHEDULABLE, f"pod {pod.name} waits for a node: {pod.unschedulable}")
    if pod.waiting_reason in IMAGE_PULL_REASONS:
        return _image(pod, now)
    if pod.waiting_reason in CONFIGURATION_REASONS:
        return _configuration(pod, now)
    where = f" on node {pod.node}" if pod.node else ""
    slow = now - (pod.scheduled or pod.created) >= _START_PATIENCE
    hint = f"; see why it takes long with `kubectl describe pod {pod.name}`" if slow else ""
    return Obstacle(FineTuneJobReason.POD_PENDING, f"pod {pod.name} is being started{where}{hint}")


def _image(pod: PodView, now: datetime) -> Obstacle:
    since = pod.scheduled or pod.created
    message = (
        f"pod {pod.name} cannot pull its image: {_excerpt(pod.waiting_message) or pod.waiting_reason}; "
        "check the image's name, the registry and the pull secret of the installation"
    )
    late = now - since >= _IMAGE_PATIENCE or pod.waiting_reason == "InvalidImageName"
    return Obstacle(FailureReason.IMAGE_PULL_FAILED, message, FailureReason.IMAGE_PULL_FAILED if late else None)


def _configuration(pod: PodView, now: datetime) -> Obstacle:
    since = pod.scheduled or pod.created
    words = _excerpt(pod.waiting_message) or pod.waiting_reason or ""
    missing = "secret" in words.lower()
    reason = FailureReason.SECRET_NOT_FOUND if missing else FailureReason.INTERNAL_ERROR
    mend = "; create it in the namespace of the FineTuneJob, and the job continues" if missing else ""
    message = f"pod {pod.name} cannot start its container: {words}{mend}"
    return Obstacle(reason, message, reason if now - since >= _SECRET_PATIENCE else None)


def _excerpt(text: str) -> str:
    """Return the last line that is not blank, at most 600 characters."""
    lines = [line.strip() for line in printable(text).splitlines() if line.strip()]
    return lines[-1][:_MAX_EXCERPT] if lines else ""
