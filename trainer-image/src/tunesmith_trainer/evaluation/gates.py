"""Gates: decide whether the adapter's scores are within the limits of the manifest. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tunesmith.api.conditions import FailureReason
from tunesmith.api.evaluation import GAIN, LOSS, LOSS_REDUCTION, MAX_METRIC, MAX_SCORES
from tunesmith.api.finetunejob_status import EvaluationStatus, GateStatus, Score, SuiteFailure
from tunesmith_trainer.evaluation.tasks import list_names

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tunesmith.api.evaluation import Evaluation

_MAX_MESSAGE_LENGTH = 1024
"""Maximum number of characters of a message in the status."""


def pair_scores(
    suite: str, base: Mapping[str, float], adapter: Mapping[str, float], *, other_scores: int = 0
) -> tuple[dict[str, tuple[float, float]], SuiteFailure | None]:
    """Pair the scores of base and adapter by metric, and report the metrics that are omitted.

    A task may report a metric only for some answers, so either may lack it, or have more than when it was tried.

    Args:
        suite: name of the suite.
        base: scores of the base alone, by metric.
        adapter: scores with the adapter, by metric.
        other_scores: number of scores of the other suites.
    """
    common = [metric for metric in adapter if metric in base]
    allowed = [metric for metric in common if len(metric) <= MAX_METRIC][: max(0, MAX_SCORES - other_scores)]
    kept = {metric: (base[metric], adapter[metric]) for metric in allowed}
    omitted = {
        "the adapter's answers have no": [metric for metric in base if metric not in adapter],
        "the base model's answers have no": [metric for metric in adapter if metric not in base],
        f"at most {MAX_SCORES} scores are kept, with names of at most {MAX_METRIC} characters, which excludes": [
            metric for metric in common if metric not in kept
        ],
    }
    reasons = "; ".join(f"{what} {list_names(metrics)}" for what, metrics in omitted.items() if metrics)
    if not reasons:
        return kept, None
    message = (
        f"evaluation suite {suite}: metrics are omitted, make its tasks return the same ones for every answer: "
        f"{reasons}"
    )
    return kept, SuiteFailure(suite=suite, reason=FailureReason.INVALID_SPEC, message=message[:_MAX_MESSAGE_LENGTH])


def judge(
    settings: Evaluation | None,
    losses: EvaluationStatus,
    measured: Mapping[str, Mapping[str, tuple[float, float]]],
    failures: Sequence[SuiteFailure] = (),
) -> EvaluationStatus:
    """Return the scores of all suites and the outcome of each gate.

    Args:
        settings: evaluation settings of the manifest.
        losses: held-out losses of base and adapter.
        measured: scores of base and adapter, by suite (other than held-out loss) and metric.
        failures: suites with metrics missing from `measured`: a gate on one of these does not pass.
    """
    if settings is None:
        return losses
    values: dict[tuple[str, str], float] = {}
    scores = []
    for suite in settings.suites or []:
        if suite.held_out_loss is not None:
            values[suite.name, LOSS] = _nan_if_none(losses.loss)
            values[suite.name, LOSS_REDUCTION] = _nan_if_none(losses.loss_reduction_percent)
            scores.append(Score(suite=suite.name, metric=LOSS, base=losses.base_loss, adapter=losses.loss))
            continue
        for metric, (base, adapter) in measured.get(suite.name, {}).items():
            values[suite.name, metric] = adapter
            values[suite.name, metric + GAIN] = adapter - base
            scores.append(Score(suite=suite.name, metric=metric, base=base, adapter=adapter))
    values_of_gates = [(gate, values.get((gate.suite, gate.metric), math.nan)) for gate in settings.gates or []]
    gates = [
        GateStatus(
            suite=gate.suite,
            metric=gate.metric,
            value=value,
            min=gate.min,
            max=gate.max,
            passed=_within(value, gate.min, gate.max),
        )
        for gate, value in values_of_gates
    ]
    updates = {"scores": scores or None, "gates": gates or None, "failures": list(failures) or None}
    return losses.model_copy(update=updates)


def describe_failures(evaluation: EvaluationStatus) -> str | None:
    """Describe the gates that did not pass in one sentence; None if all passed."""
    failed = [gate for gate in evaluation.gates or [] if not gate.passed]
    if not failed:
        return None
    scored: dict[str, set[str]] = {}
    for score in evaluation.scores or []:
        scored.setdefault(score.suite, {LOSS_REDUCTION}).update((score.metric, score.metric + GAIN))
    missing = [gate.metric not in scored.get(gate.suite, set()) for gate in failed]
    causes = "; ".join(
        f"gate {gate.suite}/{gate.metric}: "
        + (("it has no score" if gate.suite in scored else "its suite has no scores") if absent else _describe(gate))
        for gate, absent in zip(failed, missing, strict=True)
    )
    why = f": {evaluation.unscored}" if evaluation.failures else ""
    fixes = []
    if any(missing):
        fixes.append("fix the tasks and create a new FineTuneJob")
    if not all(missing):
        fixes.append("train again with more or better data, another learning rate or more steps, or change the gate")
    return f"{causes}{why}. The artifact is kept, and no AdapterDeployment serves it: {', or '.join(fixes)}"


def _describe(gate: GateStatus) -> str:
    if gate.value is None or math.isnan(gate.value):
        return "its score is not a finite number"
    # The value is rounded, and may equal the limit.
    if gate.max is None or (gate.min is not None and gate.value <= (gate.min + gate.max) / 2):
        return f"{gate.value:.4g} is below its min {gate.min:g}"
    return f"{gate.value:.4g} is above its max {gate.max:g}"


def _nan_if_none(value: float | None) -> float:
    return math.nan if value is None else value


def _within(value: float, minimum: float | None, maximum: float | None) -> bool:
    """Return True if the value is within the limits; NaN never is."""
    return not math.isnan(value) and (minimum is None or value >= minimum) and (maximum is None or value <= maximum)
