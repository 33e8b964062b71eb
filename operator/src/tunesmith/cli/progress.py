"""How far a FineTuneJob is, in words. Pure: the time is passed in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunesmith.api.conditions import ConditionStatus, FineTuneJobCondition, find, is_true
from tunesmith.api.finetunejob_status import Phase, Stage
from tunesmith.contracts.result import Outcome

if TYPE_CHECKING:
    from datetime import datetime

    from tunesmith.api.conditions import Condition
    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith.api.finetunejob_status import ProgressStatus

_MINUTE = 60
_HOUR = 3600


def live_line(job: FineTuneJob, now: datetime) -> str:
    """One line: stage, steps, losses, speed, time left."""
    status = job.status
    if not status.conditions and status.phase is None:
        return "waiting for the operator"
    progress = status.progress
    attempt = f" (attempt {len(status.attempts)})" if len(status.attempts) > 1 else ""
    if progress is None or progress.stage is None or status.phase in {Phase.COMPLETE, Phase.FAILED}:
        return f"{status.phase.value if status.phase else 'Pending'}{attempt}"
    return "  ".join([progress.stage.value + attempt, *_figures(progress, now)])


def _figures(progress: ProgressStatus, now: datetime) -> list[str]:
    figures = []
    if progress.step is not None and progress.total_steps:
        figures.append(f"step {progress.step}/{progress.total_steps} ({100 * progress.step // progress.total_steps} %)")
    if progress.loss is not None:
        figures.append(f"loss {progress.loss:.3f}")
    if progress.evaluation_loss is not None:
        figures.append(f"held-out {progress.evaluation_loss:.3f}")
    if progress.tokens_per_second is not None:
        figures.append(f"{progress.tokens_per_second:.0f} tokens/s")
    if progress.eta_seconds is not None and progress.stage is Stage.TRAINING:
        since = max(0.0, (now - progress.update_time).total_seconds()) if progress.update_time else 0.0
        figures.append(f"ETA {duration(progress.eta_seconds - since)}")
    return figures


def duration(seconds: float) -> str:
    """Such as `45 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = max(0, round(seconds))
    if whole < _MINUTE:
        return f"{whole} s"
    if whole < _HOUR:
        return f"{whole // _MINUTE} min {whole % _MINUTE} s"
    return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE} min"


def ended(job: FineTuneJob) -> Condition | None:
    """The condition that ended the job, or None while it goes on."""
    for kind in (FineTuneJobCondition.COMPLETE, FineTuneJobCondition.FAILED):
        if is_true(job.status.conditions, kind):
            return find(job.status.conditions, kind)
    return None


def result(job: FineTuneJob, end: Condition) -> dict[str, Any]:
    """The last line of `-o json`, in the form of `tunesmith run`."""
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
    """Tells each condition and each failed attempt once."""

    def __init__(self) -> None:
        self._told: set[tuple[str, ...]] = set()

    def of(self, job: FineTuneJob) -> list[str]:
        """What has not been told yet, oldest first; the end itself is told by the caller."""
        lines = []
        for condition in sorted(job.status.conditions, key=lambda one: one.last_transition_time):
            if condition.type in {FineTuneJobCondition.COMPLETE, FineTuneJobCondition.FAILED}:
                continue
            wrong = condition.status is ConditionStatus.FALSE and condition.message
            if (condition.status is ConditionStatus.TRUE or wrong) and self._new(
                condition.type, condition.status, condition.message
            ):
                lines.append(_sentence(condition.type if not wrong else condition.reason, condition.message))
        lines += [
            _sentence(f"attempt {attempt.name} failed, {attempt.reason}", attempt.message or "")
            for attempt in job.status.attempts
            if attempt.reason is not None and self._new(attempt.name, attempt.reason)
        ]
        return lines

    def of_event(self, event: dict[str, Any]) -> list[str]:
        """A Kubernetes event of type Warning."""
        reason, message = str(event.get("reason", "")), str(event.get("message", ""))
        if event.get("type") == "Warning" and self._new("event", reason, message):
            return [_sentence(f"warning, {reason}", message)]
        return []

    def _new(self, *key: str) -> bool:
        if key in self._told:
            return False
        self._told.add(key)
        return True


def _sentence(head: str, message: str) -> str:
    return f"{head}: {message}" if message else head
