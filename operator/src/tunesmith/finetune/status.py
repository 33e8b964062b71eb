"""The status of a FineTuneJob: conditions are the truth, the phase is derived from them."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import ValidationError

from tunesmith.api.conditions import (
    Condition,
    ConditionStatus,
    FailureReason,
    FineTuneJobCondition,
    find,
    is_true,
    set_condition,
)
from tunesmith.api.finetunejob_status import (
    AttemptOutcome,
    ExportStatus,
    FineTuneJobStatus,
    Phase,
    ProgressStatus,
    Resolved,
    Verdict,
)

if TYPE_CHECKING:
    from datetime import datetime

    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith.api.finetunejob_status import Attempt, Preflight
    from tunesmith.contracts.result import TrainerResult

PROGRESS_INTERVAL = timedelta(seconds=10)
_MAX_MESSAGE = 4096
_WARNINGS = frozenset(
    {
        "CreateRefused",
        "ExportFailed",
        "ImagePullFailed",
        "NameTaken",
        "NotAllowed",
        "Retrying",
        "SecretNotFound",
        "StorageUnavailable",
        "Unschedulable",
    }
)
"""Reasons of conditions, not terminal ones, that somebody should act on."""


class Status:
    """The next status, from the present one and what is said about it."""

    def __init__(self, job: FineTuneJob, now: datetime) -> None:
        self._job = job
        self._now = now
        self._status = job.status.model_copy(deep=True)

    @property
    def terminal(self) -> bool:
        """Whether the job is over, for good."""
        conditions = self._status.conditions
        return is_true(conditions, FineTuneJobCondition.COMPLETE) or is_true(conditions, FineTuneJobCondition.FAILED)

    def validating(self, reason: str, message: str) -> None:
        """The CPU stage waits or runs."""
        self._set(FineTuneJobCondition.VALIDATED, ConditionStatus.UNKNOWN, reason, message)

    def valid(self, result: TrainerResult | None) -> None:
        """The CPU stage found nothing wrong."""
        if result is not None:
            self._status.preflight = result.preflight or self._status.preflight
            self._status.resolved = merged(self._status.resolved, result.resolved)
        flight = self._status.preflight
        message = "nothing is wrong with the data, the base model and the settings"
        if flight is not None and flight.rows is not None:
            message = (
                f"{flight.rows} rows to train on, {flight.validation_rows or 0} held out, "
                f"{flight.dropped_rows or 0} dropped{_memory(flight)}"
            )
            message = "; ".join([message, *(one.sentence for one in flight.also_trained or [])])
        self._set(FineTuneJobCondition.VALIDATED, ConditionStatus.TRUE, "Valid", message)
        self._status.progress = None

    def invalid(self, reason: FailureReason, message: str, result: TrainerResult | None = None) -> None:
        """The CPU stage found what makes training pointless; what it counted until then is told."""
        if result is not None:
            self._status.preflight = result.preflight or self._status.preflight
        self._set(FineTuneJobCondition.VALIDATED, ConditionStatus.FALSE, reason, message)
        self.failed(reason, message)

    def begin_attempt(self, number: int) -> None:
        """An attempt's Job is about to be created."""
        self.waiting("PodPending", f"the Job of attempt {number} is created")
        self._status.progress = None

    def waiting(self, reason: str, message: str) -> None:
        """No pod trains now."""
        self._set(FineTuneJobCondition.STARTED, ConditionStatus.FALSE, reason, message)

    def queued(self, queue: str, job: str, why: str) -> None:
        """A queue holds the attempt's Job back; `why` is what Kueue says, empty where it says nothing."""
        message = f"Job {job} waits for queue {queue} to admit it: " + (
            why or f"`kubectl describe job {job}` and `kubectl describe localqueue {queue}` say what it waits for"
        )
        self._set(FineTuneJobCondition.ADMITTED, ConditionStatus.FALSE, "Queued", message)
        self.waiting("Queued", message)

    def admitted(self, queue: str) -> None:
        """The queue let the attempt's Job go."""
        self._set(FineTuneJobCondition.ADMITTED, ConditionStatus.TRUE, "Admitted", f"queue {queue} admitted the Job")

    def stopping(self, what: str) -> None:
        """The user's suspend ends an attempt, whose pod is given the time to save. `what` names its Job or its pod."""
        message = f"{what} is being stopped: a checkpoint is saved first"
        self._set(FineTuneJobCondition.SUSPENDED, ConditionStatus.FALSE, "Stopping", message)
        self.waiting("Stopping", message)

    def suspended(self) -> None:
        """Nothing runs, as the user wants it."""
        message = "spec.suspend is true: set it to false to go on"
        self._set(FineTuneJobCondition.SUSPENDED, ConditionStatus.TRUE, "Suspended", message)
        if find(self._status.conditions, FineTuneJobCondition.STARTED) is not None:
            self.waiting("Suspended", message)

    def resumed(self) -> None:
        """spec.suspend is false."""
        if find(self._status.conditions, FineTuneJobCondition.SUSPENDED) is not None:
            self._set(FineTuneJobCondition.SUSPENDED, ConditionStatus.FALSE, "Resumed", "spec.suspend is false")

    @property
    def active_seconds(self) -> float | None:
        """Seconds since startTime without pauses; None where no attempt has started yet."""
        start = self._status.start_time
        if start is None:
            return None
        paused = (self._status.paused_seconds or 0) + self._pause()
        return (self._now - start).total_seconds() - paused

    def _pause(self) -> float:
        """Seconds of the pause that lasts now: suspended, or waiting in a queue."""
        start = self._status.start_time
        suspended = find(self._status.conditions, FineTuneJobCondition.SUSPENDED)
        admitted = find(self._status.conditions, FineTuneJobCondition.ADMITTED)
        since = [
            condition.last_transition_time
            for condition, paused in ((suspended, ConditionStatus.TRUE), (admitted, ConditionStatus.FALSE))
            if condition is not None and condition.status is paused
        ]
        return (self._now - max(min(since), start)).total_seconds() if since and start is not None else 0.0

    def held(self, reason: str, message: str) -> None:
        """An object that the job needs cannot be created now; nothing of the job runs."""
        if is_true(self._status.conditions, FineTuneJobCondition.VALIDATED):
            self.waiting(reason, message)
        else:
            self.validating(reason, message)

    def started(self, number: int, outage: str | None = None) -> None:
        """Record that the pods of an attempt run, and the store that they wait for, if they do."""
        reason, message = "Running", f"attempt {number} runs"
        if outage is not None:
            reason, message = FailureReason.STORAGE_UNAVAILABLE, f"{message}, and waits: {outage}"
        self._set(FineTuneJobCondition.STARTED, ConditionStatus.TRUE, reason, message)

    def attempts(self, attempts: dict[int, Attempt]) -> None:
        """The attempts, by number."""
        self._status.attempts = [attempt for _, attempt in sorted(attempts.items())]
        starts = [attempt.start_time for attempt in self._status.attempts if attempt.start_time is not None]
        if starts and self._status.start_time is None:
            self._status.start_time = min(starts)

    def progress(self, sample: ProgressStatus | None) -> None:
        """The newest progress; it is taken over when the stage changed or 10 s after the one that is told."""
        if sample is None:
            return
        told = self._status.progress
        earliest = told.update_time if told is not None and told.update_time is not None else None
        # A pod's clock may be wrong, and what it says forged: time passes as it does for the operator.
        at = min(sample.update_time or self._now, self._now)
        at = max(at, earliest) if earliest is not None else at
        if told is None or earliest is None or told.stage is not sample.stage or at - earliest >= PROGRESS_INTERVAL:
            self._status.progress = sample.model_copy(update={"update_time": at})

    def failed(self, reason: FailureReason, message: str) -> None:
        """The job is over."""
        for attempt in self._status.attempts:
            if attempt.outcome is AttemptOutcome.RUNNING:
                attempt.outcome, attempt.end_time, attempt.reason = AttemptOutcome.FAILED, self._now, reason
                attempt.message = message[:2048]
        self._end(FineTuneJobCondition.FAILED, reason, message)

    def published(self, result: TrainerResult) -> str:
        """An adapter lies in the store; returns the sentence that says where."""
        assert result.artifact is not None  # noqa: S101 - the caller has looked
        exports = self._exported(result)
        self._status.artifact = result.artifact.model_copy(update={"exports": exports})
        self._status.evaluation = result.evaluation or self._status.evaluation
        if result.evaluation is not None:
            # The pod ended with this score: its progress may have been read before.
            progress = self._status.progress or ProgressStatus()
            self._status.progress = progress.model_copy(update={"evaluation_loss": result.evaluation.loss})
        self._status.resolved = merged(self._status.resolved, result.resolved)
        self._status.preflight = self._status.preflight or result.preflight
        place = f"the adapter is at {result.artifact.uri}"
        self._set(FineTuneJobCondition.PUBLISHED, ConditionStatus.TRUE, "Published", place)
        return place

    def _exported(self, result: TrainerResult) -> list[ExportStatus] | None:
        """What became of the copies; where they go is what the spec says, not what a pod says."""
        wanted = self._job.spec.exports
        if not wanted or result.exports is None:
            return None
        exports = [
            ExportStatus(
                uri=export.uri,
                hub=export.hub,
                exported=told.reason is None,
                reason=told.reason,
                message=told.message[:1024] or None,
            )
            for export, told in zip(wanted, result.exports, strict=False)
        ]
        failed = [told.message or "" for told in exports if not told.exported]
        if failed or len(exports) < len(wanted):
            message = f"{len(wanted) - len(exports) + len(failed)} of {len(wanted)} exports failed: {'; '.join(failed)}"
            self._set(FineTuneJobCondition.EXPORTED, ConditionStatus.FALSE, "ExportFailed", message)
        else:
            places = ", ".join(export.place for export in wanted)
            self._set(FineTuneJobCondition.EXPORTED, ConditionStatus.TRUE, "Exported", f"copies are at {places}")
        return exports

    def complete(self, result: TrainerResult) -> None:
        """The adapter is published and the job is over."""
        place = self.published(result)
        evaluation, message = self._status.evaluation, place
        if evaluation is not None and evaluation.base_loss is not None and evaluation.loss is not None:
            message = f"held-out loss went from {evaluation.base_loss:.4g} to {evaluation.loss:.4g}; {place}"
        if evaluation is not None and evaluation.failures:
            message = f"{message}; {evaluation.unscored}"
        self._end(FineTuneJobCondition.COMPLETE, "Complete", message)

    def build(self) -> FineTuneJobStatus:
        """The status as it is to be written."""
        self._status.observed_generation = self._job.metadata.generation
        resources = self._job.spec.resources
        if resources.gpus:
            gpus = resources.gpus * resources.nodes
            self._status.gpu_seconds = gpu_seconds(self._job.status, self._status, gpus, self._now)
        self._status.phase = phase(self._status)
        return self._status

    def _end(self, type_: FineTuneJobCondition, reason: str, message: str) -> None:
        started = find(self._status.conditions, FineTuneJobCondition.STARTED)
        if started is not None and started.status is ConditionStatus.TRUE:
            self._set(FineTuneJobCondition.STARTED, ConditionStatus.FALSE, "Ended", "no attempt runs")
        self._set(type_, ConditionStatus.TRUE, reason, message)
        self._status.completion_time = self._now

    def _set(self, type_: FineTuneJobCondition, status: ConditionStatus, reason: str, message: str) -> None:
        before = self._pause()
        self._status.conditions = set_condition(
            self._status.conditions,
            Condition(
                type=type_,
                status=status,
                reason=str(reason),
                message=message[:_MAX_MESSAGE],
                last_transition_time=self._now,
                observed_generation=self._job.metadata.generation,
            ),
        )
        if before and not self._pause():
            self._status.paused_seconds = (self._status.paused_seconds or 0) + int(before)


def gpu_seconds(old: FineTuneJobStatus, new: FineTuneJobStatus, gpus: int, now: datetime) -> float:
    """What was counted before, and what attempts held their GPUs for since.

    A running attempt is counted up to the progress that is told, so that the figure changes when the status does.

    Args:
        old: the status as it was written last.
        new: the next one.
        gpus: of all pods of an attempt.
        now: the time, UTC.
    """
    told = old.progress.update_time if old.progress is not None else None
    known = {attempt.name: attempt for attempt in old.attempts}
    total = old.gpu_seconds or 0.0
    for attempt in new.attempts:
        before = known.get(attempt.name)
        if attempt.start_time is None or (before is not None and before.end_time is not None):
            continue
        until = attempt.end_time
        if until is None and phase(new) is Phase.QUEUED:
            until = now if phase(old) is Phase.RUNNING else None
        elif until is None and new.progress is not None:
            until = new.progress.update_time
        if until is not None:
            since = max(attempt.start_time, told) if told is not None else attempt.start_time
            total += gpus * max(0.0, (until - since).total_seconds())
    return round(total, 1)


def _memory(counted: Preflight) -> str:
    """Whether the run fits, for people; nothing for a job without a GPU."""
    if counted.estimated_peak_bytes is None or counted.verdict is None:
        return ""
    about = f"; about {counted.estimated_peak_bytes / 2**30:.1f} GiB of GPU memory"
    if counted.gpu_memory_bytes is None:
        return about
    doubt = f", which may not fit: {counted.suggestion}" if counted.verdict is Verdict.UNKNOWN else ""
    return f"{about} of {counted.gpu_memory_bytes / 2**30:.1f}{doubt}"


def phase(status: FineTuneJobStatus) -> Phase:
    """The phase that the conditions amount to."""
    conditions = status.conditions
    if is_true(conditions, FineTuneJobCondition.FAILED):
        return Phase.FAILED
    if is_true(conditions, FineTuneJobCondition.COMPLETE):
        return Phase.COMPLETE
    if is_true(conditions, FineTuneJobCondition.SUSPENDED):
        return Phase.SUSPENDED
    if is_true(conditions, FineTuneJobCondition.STARTED):
        return Phase.RUNNING
    admitted = find(conditions, FineTuneJobCondition.ADMITTED)
    if admitted is not None and admitted.status is ConditionStatus.FALSE:
        return Phase.QUEUED
    validated = find(conditions, FineTuneJobCondition.VALIDATED)
    if validated is not None and validated.status is not ConditionStatus.TRUE:
        return Phase.VALIDATING
    return Phase.PENDING


def without_reports(old: FineTuneJobStatus, new: FineTuneJobStatus) -> FineTuneJobStatus:
    """The new status without what pods reported since the old one, and without sentences that may hold it."""
    known = {attempt.name: attempt for attempt in old.attempts}
    reports = ("progress", "preflight", "resolved", "evaluation", "artifact")
    return new.model_copy(
        update={
            **{name: getattr(old, name) for name in reports},
            "attempts": [
                attempt.model_copy(
                    update={
                        "message": (known[attempt.name].message if attempt.name in known else None),
                        "last_step": None,
                        "resumed_from_step": None,
                    }
                )
                for attempt in new.attempts
            ],
            "conditions": [
                condition
                if condition in old.conditions
                else condition.model_copy(
                    update={"message": "the API server refuses what the pod reported: see the events and the pod's log"}
                )
                for condition in new.conditions
            ],
        }
    )


def unreadable(manifest: dict[str, Any], message: str, now: datetime) -> dict[str, Any]:
    """The status of a FineTuneJob that this release cannot read: as it is, with a condition that says so."""
    document = manifest.get("status") or {}
    try:
        status = FineTuneJobStatus.model_validate(document)
    except ValidationError:
        status = FineTuneJobStatus()
    generation = manifest["metadata"].get("generation")
    condition = Condition(
        type=FineTuneJobCondition.VALIDATED,
        status=ConditionStatus.FALSE,
        reason=FailureReason.INVALID_SPEC,
        message=message[:_MAX_MESSAGE],
        last_transition_time=now.replace(microsecond=0),
        observed_generation=generation,
    )
    status.conditions = set_condition(status.conditions, condition)
    status.observed_generation = generation
    status.phase = phase(status)
    return status.manifest()


class Notice(NamedTuple):
    """An Event to tell."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


def notices(old: FineTuneJobStatus, new: FineTuneJobStatus) -> list[Notice]:
    """What people should hear of the difference of two statuses."""
    found = _flattered(old, new) + _unscored(old, new)
    for condition in new.conditions:
        before = find(old.conditions, condition.type)
        if before is not None and before.status is condition.status and before.reason == condition.reason:
            continue
        if condition.type == FineTuneJobCondition.FAILED:
            found.append(Notice("Warning", condition.reason, condition.message))
        elif condition.status is ConditionStatus.TRUE:
            found.append(Notice("Normal", condition.type, condition.message))
        elif condition.type == FineTuneJobCondition.ADMITTED and condition.reason == "Queued":
            found.append(Notice("Normal", condition.reason, condition.message))
        elif condition.reason in _WARNINGS:
            found.append(Notice("Warning", condition.reason, condition.message))
    known = {attempt.name: attempt.outcome for attempt in old.attempts}
    for attempt in new.attempts:
        ended = attempt.outcome in {AttemptOutcome.FAILED, AttemptOutcome.PREEMPTED}
        if ended and known.get(attempt.name) is not attempt.outcome:
            found.append(Notice("Warning", f"Attempt{attempt.outcome}", f"{attempt.name}: {attempt.message}"))
    before_stage = old.progress.stage if old.progress is not None else None
    stage = new.progress.stage if new.progress is not None else None
    if stage is not None and stage is not before_stage:
        found.append(Notice("Normal", stage, f"the trainer is at stage {stage}"))
    return found


def _flattered(old: FineTuneJobStatus, new: FineTuneJobStatus) -> list[Notice]:
    """Of rows that are scored and trained on, once."""
    counted = new.preflight if old.preflight is None else None
    trained = (counted.also_trained if counted is not None else None) or []
    return [Notice("Warning", "ScoredRowsTrained", one.sentence) for one in trained]


def _unscored(old: FineTuneJobStatus, new: FineTuneJobStatus) -> list[Notice]:
    """Of suites that could not be scored, once."""
    evaluation = new.evaluation if old.evaluation is None else None
    failures = (evaluation.failures if evaluation is not None else None) or []
    return [Notice("Warning", "SuiteFailed", one.message) for one in failures]


def merged(kept: Resolved | None, new: Resolved | None) -> Resolved | None:
    """What was resolved first stays; what was absent is filled in."""
    if kept is None or new is None:
        return kept or new
    return kept.model_copy(
        update={name: value for name, value in new if getattr(kept, name) is None and value is not None}
    )
