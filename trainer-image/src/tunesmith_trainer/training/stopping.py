"""Decide whether training stops early: a pure function of the held-out losses so far."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tunesmith.api.evaluation import EarlyStopping
    from tunesmith_trainer.reporting.curve import CurvePoint


def stops_early(settings: EarlyStopping | None, curve: Iterable[CurvePoint]) -> bool:
    """Return True if the held-out loss has stopped falling, by the settings; a resumed run decides the same."""
    if settings is None:
        return False
    losses = [point.evaluation_loss for point in curve if point.step > 0 and point.evaluation_loss is not None]
    return patience_exhausted(losses, settings.patience, settings.min_delta)


def patience_exhausted(losses: Sequence[float], patience: int, min_delta: float) -> bool:
    """Return True if at least the last `patience` losses are not improvements.

    Args:
        losses: held-out losses of the adapter, oldest first.
        patience: number of losses without an improvement.
        min_delta: an improvement is lower than the last one by more than this.
    """
    lowest, waited = math.inf, 0
    for loss in losses:
        if loss < lowest - min_delta:
            lowest, waited = loss, 0
        else:
            waited += 1
    return waited >= patience
