"""Gates: whether the adapter's scores keep the limits of the manifest. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tunesmith.api.evaluation import GAIN, LOSS, LOSS_REDUCTION
from tunesmith.api.finetunejob_status import EvaluationStatus, GateStatus, Score, SuiteFailure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tunesmith.api.evaluation import Evaluation


def judge(
    asked: Evaluation | None,
    losses: EvaluationStatus,
    measured: Mapping[str, Mapping[str, tuple[float, float]]],
    failures: Sequence[SuiteFailure] = (),
) -> EvaluationStatus:
    """The scores of all suites and what became of each gate.

    Args:
        asked: the manifest's evaluation.
        losses: held-out losses of base and adapter.
        measured: by suite other than of held-out loss and by metric, the scores of base and adapter.
        failures: suites that are not in `measured`: a gate on one of them does not pass.
    """
    if asked is None:
        return losses
    values: dict[tuple[str, str], float] = {}
    scores = []
    for suite in asked.suites:
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
    return losses.model_copy(update={"scores": scores, "gates": gates or None, "failures": list(failures) or None})


def failure(evaluation: EvaluationStatus) -> str | None:
    """What the gates that did not pass say, as a sentence; None where all passed."""
    failed = [gate for gate in evaluation.gates or [] if not gate.passed]
    if not failed:
        return None
    unscored = {one.suite for one in evaluation.failures or []}
    told = "; ".join(_told(gate, scored=gate.suite not in unscored) for gate in failed)
    why = f": {evaluation.unscored}" if unscored else ""
    mends = []
    if any(gate.suite in unscored for gate in failed):
        mends.append("mend the tasks and create a new FineTuneJob")
    if any(gate.suite not in unscored for gate in failed):
        mends.append("train again with more or better data, another learning rate or more steps, or move the gate")
    return f"{told}{why}. The artifact is kept: use it as it is, or {', or '.join(mends)}"


def _told(gate: GateStatus, *, scored: bool) -> str:
    if not scored:
        return f"gate {gate.suite}/{gate.metric}: its suite has no scores"
    value = math.nan if gate.value is None else gate.value
    if gate.min is not None and not value >= gate.min:
        return f"gate {gate.suite}/{gate.metric}: {value:.4g} is below its min {gate.min:g}"
    return f"gate {gate.suite}/{gate.metric}: {value:.4g} is above its max {gate.max:g}"


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _keeps(value: float, least: float | None, most: float | None) -> bool:
    """What is not a number keeps no limit."""
    return not math.isnan(value) and (least is None or value >= least) and (most is None or value <= most)
