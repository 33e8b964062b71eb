"""Status of a FineTuneJob: its conditions, and the phase that is derived from them."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from tunesmith.api.conditions import (
    ConditionStatus,
    EventReason,
    FailureReason,
    FineTuneJobCondition,
    FineTuneJobReason,
    find,
    is_true,
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
from tunesmith.contracts.transitions import NewEvent, updated_conditions

if TYPE_CHECKING:
    from datetime import datetime

    from tunesmith.api.conditions import Reason
    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith.api.finetunejob_status import Attempt, ContinuedFrom, Preflight
    from tunesmith.contracts.result import TrainerResult

PROGRESS_INTERVAL = timedelta(seconds=10)
_NO_ATTEMPT = "no attempt is running"


class StatusBuilder:
    """Builder of the next status from the current one and from reported changes. `build` is called once, at the end."""

    def __init__(self, job: FineTuneJob, now: datetime) -> None:
        self._job = job
        self._now = now
        self._status = job.status.model_copy(deep=True)

    @property
    def terminal(self) -> bool:
        """True if the job is finished and will not run again."""
        conditions = self._status.conditions
        return is_true(conditions, FineTuneJobCondition.COMPLETE) or is_true(conditions, FineTuneJobCondition.FAILED)

    @property
    def validated(self) -> bool:
        """True if the CPU stage found nothing wrong."""
        return is_true(self._status.conditions, FineTuneJobCondition.VALIDATED)

    def validating(self, reason: Reason, message: str) -> None:
        """Report that the CPU stage is waiting or running."""
        self._set(FineTuneJobCondition.VALIDATED, ConditionStatus.UNKNOWN, reason, message)

    def starts_from(self, start: ContinuedFrom) -> None:
        """Record the adapter that training starts from; later reports of pods do not replace it."""
        self._status.resolved = merged(Resolved(continued_from=start), self._status.resolved)

    def valid(self, result: TrainerResult | None) -> None:
        """Report that the CPU stage found nothing wrong."""
        if result is not None:
            self._status.preflight = result.preflight or self._status.preflight
            self._status.resolved = merged(self._status.resolved, result.resolved)
        preflight = self._status.preflight
        message = "the data, the base model and the settings are valid"
        if preflight is not None and preflight.rows is not None:
            message = (
                f"{preflight.rows} rows to train on, {preflight.validation_rows or 0} held out, "
                f"{preflight.dropped_rows or 0} dropped{_memory(preflight)}"
            )
            message = "; ".join([message, *(rows.sentence for rows in preflight.also_trained or [])])
        self._set(FineTuneJobCondition.VALIDATED, ConditionStatus.TRUE, FineTuneJobReason.VALID, message)
        self._status.progress = None

    def invalid(self, reason: FailureReason, message: str, result: TrainerResult | None = None) -> None:
        """Report the problem that the CPU stage found, and its counts so far. Training would be pointless."""
        if result is not None:
            self._status.preflight = result.preflight or self._status.preflight
        self._set(FineTuneJobCondition.VALIDATED, ConditionStatus.FALSE, reason, message)
        self.failed(reason, message)

    def begin_attempt(self, number: int) -> None:
        """Report that an attempt's Job is about to be created."""
        self.waiting(FineTuneJobReason.POD_PENDING, f"the Job of attempt {number} is being created")
        self._status.progress = None

    def waiting(self, reason: Reason, message: str) -> None:
        """Report that no pod is training."""
        self._set(FineTuneJobCondition.STARTED, ConditionStatus.FALSE, reason, message)

    def blocked(self, reason: Reason, message: str) -> None:
        """Report what blocks the current stage, validation or training."""
        if self.validated or self.terminal:
            self.waiting(reason, message)
        else:
            self.validating(reason, message)

    def unblocked(self) -> None:
        """Clear the refusal of a write from a terminal job: there is nothing left to remove."""
        started = find(self._status.conditions, FineTuneJobCondition.STARTED)
        if started is not None and started.reason == FineTuneJobReason.WRITE_REFUSED:
            self.waiting(FineTuneJobReason.FINISHED, _NO_ATTEMPT)

    def queued(self, queue: str, job: str, reason: str) -> None:
        """Report that a queue is holding the attempt's Job back. `reason`: Kueue's message; empty if there is none."""
        message = f"Job {job} waits for queue {queue} to admit it: " + (
            reason or f"see `kubectl describe job {job}` and `kubectl describe localqueue {queue}`"
        )
        self._set(FineTuneJobCondition.ADMITTED, ConditionStatus.FALSE, FineTuneJobReason.QUEUED, message)
        self.waiting(FineTuneJobReason.QUEUED, message)

    def admitted(self, queue: str) -> None:
        """Report that the queue admitted the attempt's Job."""
        message = f"queue {queue} admitted the Job"
        self._set(FineTuneJobCondition.ADMITTED, ConditionStatus.TRUE, FineTuneJobReason.ADMITTED, message)

    def stopping(self, item: str) -> None:
        """Report that spec.suspend is stopping an attempt, which has time to save. `item`: its Job or its pod."""
        message = f"{item} is being stopped: a checkpoint is saved first"
        self._set(FineTuneJobCondition.SUSPENDED, ConditionStatus.FALSE, FineTuneJobReason.STOPPING, message)
        self.waiting(FineTuneJobReason.STOPPING, message)

    def suspended(self) -> None:
        """Report that the job is suspended and nothing is running."""
        message = "spec.suspend is true: set it to false to continue"
        self._set(FineTuneJobCondition.SUSPENDED, ConditionStatus.TRUE, FineTuneJobReason.SUSPENDED, message)
        if find(self._status.conditions, FineTuneJobCondition.STARTED) is not None:
            self.waiting(FineTuneJobReason.SUSPENDED, message)

    def resumed(self) -> None:
        """Report that spec.suspend is false."""
        if find(self._status.conditions, FineTuneJobCondition.SUSPENDED) is not None:
            message = "spec.suspend is false"
            self._set(FineTuneJobCondition.SUSPENDED, ConditionStatus.FALSE, FineTuneJobReason.RESUMED, message)

    @property
    def active_seconds(self) -> float | None:
        """Seconds since startTime, without pauses; None before the first attempt has started."""
        start = self._status.start_time
        if start is None:
            return None
        paused = (self._status.paused_seconds or 0) + self._pause()
        return (self._now - start).total_seconds() - paused

    def _pause(self) -> float:
        """Return the seconds of the current pause: suspended, or waiting in a queue."""
        start = self._status.start_time
        suspended = find(self._status.conditions, FineTuneJobCondition.SUSPENDED)
        admitted = find(self._status.conditions, FineTuneJobCondition.ADMITTED)
        since = [
            condition.last_transition_time
            for condition, paused in ((suspended, ConditionStatus.TRUE), (admitted, ConditionStatus.FALSE))
            if condition is not None and condition.status is paused
        ]
        return (self._now - max(min(since), start)).total_seconds() if since and start is not None else 0.0

    def started(self, number: int, outage: str | None = None) -> None:
        """Report that the pods of an attempt are running. `outage`: the store that they are waiting for, if any."""
        reason: Reason = FineTuneJobReason.RUNNING
        message = f"attempt {number} is running"
        if outage is not None:
            reason, message = FailureReason.STORAGE_UNAVAILABLE, f"{message}, but waits for storage: {outage}"
        self._set(FineTuneJobCondition.STARTED, ConditionStatus.TRUE, reason, message)

    def record_attempts(self, attempts: dict[int, Attempt]) -> None:
        """Record the attempts by their number."""
        self._status.attempts = [attempt for _, attempt in sorted(attempts.items())]
        starts = [attempt.start_time for attempt in self._status.attempts if attempt.start_time is not None]
        if starts and self._status.start_time is None:
            self._status.start_time = min(starts)

    def record_progress(self, sample: ProgressStatus | None) -> None:
        """Record the newest progress if the stage changed, or the recorded one is at least 10 s older."""
        if sample is None:
            return
        recorded = self._status.progress
        earliest = recorded.update_time if recorded is not None else None
        # A pod's clock may be wrong and its report forged, so time is limited to the operator's clock.
        at = min(sample.update_time or self._now, self._now)
        at = max(at, earliest) if earliest is not None else at
        is_due = earliest is None or at - earliest >= PROGRESS_INTERVAL
        if recorded is None or recorded.stage is not sample.stage or is_due:
            self._status.progress = sample.model_copy(update={"update_time": at})

    def failed(self, reason: FailureReason, message: str) -> None:
        """Report that the job failed."""
        for attempt in self._status.attempts:
            if attempt.outcome is AttemptOutcome.RUNNING:
                attempt.outcome, attempt.end_time, attempt.reason = AttemptOutcome.FAILED, self._now, reason
                attempt.message = message[:2048]
        self._finish(FineTuneJobCondition.FAILED, reason, message)

    def published(self, result: TrainerResult) -> str:
        """Report that the adapter is in the store; return a sentence with its uri."""
        assert result.artifact is not None  # noqa: S101 - checked by the caller
        exports = self._exported(result)
        self._status.artifact = result.artifact.model_copy(update={"exports": exports})
        self._status.evaluation = result.evaluation or self._status.evaluation
        if result.evaluation is not None:
            # The pod finished with this score; its progress may have been read earlier.
            progress = self._status.progress or ProgressStatus()
            self._status.progress = progress.model_copy(update={"evaluation_loss": result.evaluation.loss})
        self._status.resolved = merged(self._status.resolved, result.resolved)
        self._status.preflight = self._status.preflight or result.preflight
        message = f"the adapter is at {result.artifact.uri}"
        self._set(FineTuneJobCondition.PUBLISHED, ConditionStatus.TRUE, FineTuneJobReason.PUBLISHED, message)
        return message

    def _exported(self, result: TrainerResult) -> list[ExportStatus] | None:
        """Return the outcome of each copy. Destinations come from the spec, never from a pod's report."""
        requested = self._job.spec.exports
        if not requested or result.exports is None:
            return None
        exports = [
            ExportStatus(
                uri=export.uri,
                hub=export.hub,
                exported=report.reason is None,
                reason=report.reason,
                message=report.message[:1024] or None,
            )
            for export, report in zip(requested, result.exports, strict=False)
        ]
        failed = [export.message or "" for export in exports if not export.exported]
        if failed or len(exports) < len(requested):
            message = (
                f"{len(requested) - len(exports) + len(failed)} of {len(requested)} exports failed: {'; '.join(failed)}"
            )
            status, reason = ConditionStatus.FALSE, FineTuneJobReason.EXPORT_FAILED
        else:
            message = f"copies are at {', '.join(export.destination for export in requested)}"
            status, reason = ConditionStatus.TRUE, FineTuneJobReason.EXPORTED
        self._set(FineTuneJobCondition.EXPORTED, status, reason, message)
        return exports

    def complete(self, result: TrainerResult) -> None:
        """Report that the adapter is published and the job is finished."""
        location = self.published(result)
        evaluation, resolved = self._status.evaluation, self._status.resolved
        reason, parts = FineTuneJobReason.COMPLETE, [location]
        if evaluation is not None:
            of_total = f" of {resolved.total_steps}" if resolved is not None and resolved.total_steps else ""
            if evaluation.base_loss is not None and evaluation.loss is not None:
                at = f" at step {evaluation.published_step}" if evaluation.published_step is not None else ""
                parts.insert(0, f"held-out loss went from {evaluation.base_loss:.4g} to {evaluation.loss:.4g}{at}")
            if evaluation.stopped_early_at is not None:
                reason = FineTuneJobReason.STOPPED_EARLY
                parts.insert(0, f"training stopped early, after step {evaluation.stopped_early_at}{of_total}")
            if evaluation.failures:
                parts.append(evaluation.unscored)
        self._finish(FineTuneJobCondition.COMPLETE, reason, "; ".join(parts))

    def build(self) -> FineTuneJobStatus:
        """Return the status to write."""
        self._status.observed_generation = self._job.metadata.generation
        resources = self._job.spec.resources
        if resources.gpus:
            gpus = resources.gpus * resources.nodes
            self._status.gpu_seconds = gpu_seconds(self._job.status, self._status, gpus, self._now)
        self._status.phase, self._status.reason = summary(self._status)
        return self._status

    def _finish(self, type_: FineTuneJobCondition, reason: Reason, message: str) -> None:
        started = find(self._status.conditions, FineTuneJobCondition.STARTED)
        if started is not None and started.status is ConditionStatus.TRUE:
            self.waiting(FineTuneJobReason.FINISHED, _NO_ATTEMPT)
        self._set(type_, ConditionStatus.TRUE, reason, message)
        self._status.completion_time = self._now

    def _set(self, type_: FineTuneJobCondition, status: ConditionStatus, reason: Reason, message: str) -> None:
        before = self._pause()
        self._status.conditions = updated_conditions(
            self._status.conditions, {type_: (status, reason, message)}, self._job.metadata.generation, self._now
        )
        if before and not self._pause():
            self._status.paused_seconds = (self._status.paused_seconds or 0) + int(before)


def gpu_seconds(old: FineTuneJobStatus, new: FineTuneJobStatus, gpus: int, now: datetime) -> float:
    """Return the GPU seconds counted so far, plus those for which attempts have held GPUs since.

    A running attempt is counted up to the recorded progress, so that the figure changes only with the status.

    Args:
        old: the status that was written last.
        new: the next status.
        gpus: number of GPUs of all pods of an attempt.
        now: the time, UTC.
    """
    counted = old.progress.update_time if old.progress is not None else None
    known = {attempt.name: attempt for attempt in old.attempts}
    total = old.gpu_seconds or 0.0
    for attempt in new.attempts:
        before = known.get(attempt.name)
        if attempt.start_time is None or (before is not None and before.end_time is not None):
            continue
        until = attempt.end_time
        if until is None and summary(new)[0] is Phase.QUEUED:
            until = now if summary(old)[0] is Phase.RUNNING else None
        elif until is None and new.progress is not None:
            until = new.progress.update_time
        if until is not None:
            since = max(attempt.start_time, counted) if counted is not None else attempt.start_time
            total += gpus * max(0.0, (until - since).total_seconds())
    return round(total, 1)


def _memory(preflight: Preflight) -> str:
    """Return a clause on the estimated GPU memory; empty for a job without a GPU."""
    if preflight.estimated_peak_bytes is None or preflight.verdict is None:
        return ""
    estimate = f"; about {preflight.estimated_peak_bytes / 2**30:.1f} GiB of GPU memory"
    if preflight.gpu_memory_bytes is None:
        return estimate
    doubt = f", which may not fit: {preflight.suggestion}" if preflight.verdict is Verdict.UNKNOWN else ""
    return f"{estimate} of {preflight.gpu_memory_bytes / 2**30:.1f}{doubt}"


def summary(status: FineTuneJobStatus) -> tuple[Phase, str | None]:
    """Return the phase, and the reason of the condition from which it is derived."""
    conditions = status.conditions
    for type_, phase in _PHASES:
        condition = find(conditions, type_)
        if condition is not None and condition.status is ConditionStatus.TRUE:
            return phase, condition.reason
    validated = find(conditions, FineTuneJobCondition.VALIDATED)
    started = find(conditions, FineTuneJobCondition.STARTED)
    waiting = started or validated
    reason = waiting.reason if waiting is not None else None
    admitted = find(conditions, FineTuneJobCondition.ADMITTED)
    if admitted is not None and admitted.status is ConditionStatus.FALSE:
        return Phase.QUEUED, reason
    if validated is not None and validated.status is not ConditionStatus.TRUE:
        return Phase.VALIDATING, validated.reason
    return Phase.PENDING, reason


_PHASES = (
    (FineTuneJobCondition.FAILED, Phase.FAILED),
    (FineTuneJobCondition.COMPLETE, Phase.COMPLETE),
    (FineTuneJobCondition.SUSPENDED, Phase.SUSPENDED),
    (FineTuneJobCondition.STARTED, Phase.RUNNING),
)
"""Phases that depend on a single condition; the first condition that is True decides."""


def without_reports(old: FineTuneJobStatus, new: FineTuneJobStatus) -> FineTuneJobStatus:
    """Return the new status without pod reports since the old one, and without sentences that may quote them."""
    known = {attempt.name: attempt for attempt in old.attempts}
    reported = ("progress", "preflight", "resolved", "evaluation", "artifact")
    return new.model_copy(
        update={
            **{name: getattr(old, name) for name in reported},
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
                    update={"message": "the API server refuses the pod's report: see the events and the pod's log"}
                )
                for condition in new.conditions
            ],
        }
    )


def status_events(old: FineTuneJobStatus, new: FineTuneJobStatus) -> list[NewEvent]:
    """Return the Events about changes other than conditions: attempts, stages, rows and suites."""
    counted = new.preflight if old.preflight is None else None
    found = [
        NewEvent(EventReason.SCORED_ROWS_TRAINED, rows.sentence, "Warning")
        for rows in (counted.also_trained if counted is not None else None) or []
    ]
    evaluation = new.evaluation if old.evaluation is None else None
    found += [
        NewEvent(EventReason.SUITE_FAILED, failure.message, "Warning")
        for failure in (evaluation.failures if evaluation is not None else None) or []
    ]
    known = {attempt.name: attempt.outcome for attempt in old.attempts}
    found += [
        NewEvent(_OUTCOME_EVENTS[attempt.outcome], f"{attempt.name}: {attempt.message}", "Warning")
        for attempt in new.attempts
        if attempt.outcome in _OUTCOME_EVENTS and known.get(attempt.name) is not attempt.outcome
    ]
    before = old.progress.stage if old.progress is not None else None
    stage = new.progress.stage if new.progress is not None else None
    if stage is not None and stage is not before:
        found.append(NewEvent(stage, f"the trainer reached stage {stage}"))
    return found


_OUTCOME_EVENTS = {
    AttemptOutcome.FAILED: EventReason.ATTEMPT_FAILED,
    AttemptOutcome.PREEMPTED: EventReason.ATTEMPT_PREEMPTED,
}
"""Reason of the Event about an attempt, by outcome; other outcomes get none."""


def merged(kept: Resolved | None, new: Resolved | None) -> Resolved | None:
    """Return the values that were resolved first, with absent fields filled in from the new ones."""
    if kept is None or new is None:
        return kept or new
    return kept.model_copy(
        update={name: value for name, value in new if getattr(kept, name) is None and value is not None}
    )
