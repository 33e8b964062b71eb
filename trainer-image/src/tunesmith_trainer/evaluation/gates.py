"""Gates: decide whether the adapter's scores are within the limits of the manifest. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tunesmith.api.conditions import FailureReason
from tunesmith.api.evaluation import GAIN, LOSS, LOSS_REDUCTION, MAX_METRIC, MAX_SCORES
from tunesmith.api.finetunejob_status import EvaluationStatus, GateStatus, Score, SuiteFailure
from tunesmith_trainer.evaluation.tasks import few

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tunesmith.api.evaluation import Evaluation

_MAX_MESSAGE_LENGTH = 1024
"""Maximum number of characters of a message in the status."""


def compared(
    suite: str, base: Mapping[str, float], adapter: Mapping[str, float], *, taken: int = 0
) -> tuple[dict[str, tuple[float, float]], SuiteFailure | None]:
    """Pair the scores of base and adapter by metric, and report the metrics that are omitted.

    A task may report a metric only for some answers, so either may lack it, or have more than when it was tried.

    Args:
        suite: name of the suite.
        base: scores of the base alone, by metric.
        adapter: scores with the adapter, by metric.
        taken: number of scores of the other suites.
    """
    both = [metric for metric in adapter if metric in base]
    fit = [metric for metric in both if len(metric) <= MAX_METRIC][: max(0, MAX_SCORES - taken)]
    kept = {metric: (base[metric], adapter[metric]) for metric in fit}
    lost = {
        "the adapter's answers gave no": [metric for metric in base if metric not in adapter],
        "the base model's answers gave no": [metric for metric in adapter if metric not in base],
        f"at most {MAX_SCORES} scores are kept, with names of at most {MAX_METRIC} characters, so not": [
            metric for metric in both if metric not in kept
        ],
    }
    told = "; ".join(f"{what} {few(metrics)}" for what, metrics in lost.items() if metrics)
    if not told:
        return kept, None
    message = (
        f"evaluation suite {suite}: metrics are left out, let its tasks give the same ones for every answer: {told}"
    )
    return kept, SuiteFailure(suite=suite, reason=FailureReason.INVALID_SPEC, message=message[:_MAX_MESSAGE_LENGTH])


def judge(
    asked: Evaluation | None,
    losses: EvaluationStatus,
    measured: Mapping[str, Mapping[str, tuple[float, float]]],
    failures: Sequence[SuiteFailure] = (),
) -> EvaluationStatus:
    """Return the scores of all suites and the outcome of each gate.

    Args:
        asked: evaluation settings of the manifest.
        losses: held-out losses of base and adapter.
        measured: scores of base and adapter, by suite (other than held-out loss) and metric.
        failures: suites with metrics missing from `measured`: a gate on one of these does not pass.
    """
    if asked is None:
        return losses
    values: dict[tuple[str, str], float] = {}
    scores = []
    for suite in asked.suites or []:
        if suite.held_out_loss is not None:
            values[suite.name, LOSS] = _number(losses.loss)
            values[suite.name, LOSS_REDUCTION] = _number(losses.loss_reduction_percent)
            scores.append(Score(suite=suite.name, metric=LOSS, base=losses.base_loss, adapter=losses.loss))
            continue
        for metric, (base, adapter) in measured.get(suite.name, {}).items():
            values[suite.name, metric] = adapter
            values[suite.name, metric + GAIN] = adapter - base
            scores.append(Score(suite=suite.name, metric=metric, base=base, adapter=adapter))
    reached = [(gate, values.get((gate.suite, gate.metric), math.nan)) for gate in asked.gates or []]
    gates = [
        GateStatus(
            suite=gate.suite,
            metric=gate.metric,
            value=value,
            min=gate.min,
            max=gate.max,
            passed=_keeps(value, gate.min, gate.max),
        )
        for gate, value in reached
    ]
    found = {"scores": scores or None, "gates": gates or None, "failures": list(failures) or None}
    return losses.model_copy(update=found)


def failure(evaluation: EvaluationStatus) -> str | None:
    """Describe the gates that did not pass in one sentence; None if all passed."""
    failed = [gate for gate in evaluation.gates or [] if not gate.passed]
    if not failed:
        return None
    scored: dict[str, set[str]] = {}
    for one in evaluation.scores or []:
        scored.setdefault(one.suite, {LOSS_REDUCTION}).update((one.metric, one.metric + GAIN))
    missing = [gate.metric not in scored.get(gate.suite, set()) for gate in failed]
    told = "; ".join(
        f"gate {gate.suite}/{gate.metric}: "
        + (("it has no score" if gate.suite in scored else "its suite has no scores") if absent else _told(gate))
        for gate, absent in zip(failed, missing, strict=True)
    )
    why = f": {evaluation.unscored}" if evaluation.failures else ""
    mends = []
    if any(missing):
        mends.append("mend the tasks and create a new FineTuneJob")
    if not all(missing):
        mends.append("train again with more or better data, another learning rate or more steps, or move the gate")
    return f"{told}{why}. The artifact is kept, and no AdapterDeployment serves it: {', or '.join(mends)}"


def _told(gate: GateStatus) -> str:
    if gate.value is None or math.isnan(gate.value):
        return "its score is no finite number"
    # The value is rounded, and may equal the limit.
    if gate.max is None or (gate.min is not None and gate.value <= (gate.min + gate.max) / 2):
        return f"{gate.value:.4g} is below its min {gate.min:g}"
    return f"{gate.value:.4g} is above its max {gate.max:g}"


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _keeps(value: float, least: float | None, most: float | None) -> bool:
    """Return True if the value is within the limits; NaN never is."""
    return not math.isnan(value) and (least is None or value >= least) and (most is None or value <= most)
