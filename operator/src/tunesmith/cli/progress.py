"""Progress of a FineTuneJob in words. Pure: the time is passed in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunesmith.api.conditions import ConditionStatus, FineTuneJobCondition, find, is_true
from tunesmith.api.finetunejob_status import Phase
from tunesmith.contracts.progress import step_line
from tunesmith.contracts.result import Outcome

if TYPE_CHECKING:
    from datetime import datetime

    from tunesmith.api.conditions import Condition
    from tunesmith.api.finetunejob import FineTuneJob


def live_line(job: FineTuneJob, now: datetime) -> str:
    """Return one line with the stage and its progress."""
    status = job.status
    if not status.conditions and status.phase is None:
        return "waiting for the operator"
    progress = status.progress
    attempt = f" (attempt {len(status.attempts)})" if len(status.attempts) > 1 else ""
    if progress is None or progress.stage is None or status.phase in {Phase.COMPLETE, Phase.FAILED}:
        return f"{status.phase.value if status.phase else 'Pending'}{attempt}"
    elapsed = max(0.0, (now - progress.update_time).total_seconds()) if progress.update_time else 0.0
    return f"{progress.stage.value}{attempt}  {step_line(progress, elapsed=elapsed)}".rstrip()


def final_condition(job: FineTuneJob) -> Condition | None:
    """Return the condition with which the job finished, or None while it is unfinished."""
    for kind in (FineTuneJobCondition.COMPLETE, FineTuneJobCondition.FAILED):
        if is_true(job.status.conditions, kind):
            return find(job.status.conditions, kind)
    return None


def result(job: FineTuneJob, end: Condition) -> dict[str, Any]:
    """Return the last line of `-o json`, in the format of `tunesmith run`."""
    artifact, scores = job.status.artifact, job.status.evaluation
    succeeded = end.type == FineTuneJobCondition.COMPLETE
    losses = {"evaluationLoss": scores.loss, "baseEvaluationLoss": scores.base_loss} if scores else {}
    return {
        "outcome": Outcome.SUCCEEDED.value if succeeded else Outcome.FAILED.value,
        "reason": None if succeeded else end.reason,
        "message": end.message,
        "artifact": {"uri": artifact.uri, "digest": artifact.digest} if artifact else None,
        "metrics": {name: loss for name, loss in losses.items() if loss is not None},
    }


class News:
    """Reports of conditions, failed attempts and warnings, each once."""

    def __init__(self) -> None:
        self._reported: set[tuple[str, ...]] = set()

    def of(self, job: FineTuneJob) -> list[str]:
        """Return the news that were not reported yet, oldest first; the caller reports the final condition."""
        lines = []
        for condition in sorted(job.status.conditions, key=lambda condition: condition.last_transition_time):
            if condition.type in {FineTuneJobCondition.COMPLETE, FineTuneJobCondition.FAILED}:
                continue
            failed = condition.status is ConditionStatus.FALSE and condition.message
            if (condition.status is ConditionStatus.TRUE or failed) and self._new(
                condition.type, condition.status, condition.message
            ):
                lines.append(_sentence(condition.type if not failed else condition.reason, condition.message))
        lines += [
            _sentence(f"attempt {attempt.name} failed, {attempt.reason}", attempt.message or "")
            for attempt in job.status.attempts
            if attempt.reason is not None and self._new(attempt.name, attempt.reason)
        ]
        return lines

    def of_event(self, event: dict[str, Any]) -> list[str]:
        """Return the news of a Kubernetes Event: a line for one of type Warning."""
        reason, message = str(event.get("reason", "")), str(event.get("message", ""))
        if event.get("type") == "Warning" and self._new("event", reason, message):
            return [_sentence(f"warning, {reason}", message)]
        return []

    def _new(self, *key: str) -> bool:
        if key in self._reported:
            return False
        self._reported.add(key)
        return True


def _sentence(head: str, message: str) -> str:
    return f"{head}: {message}" if message else head
