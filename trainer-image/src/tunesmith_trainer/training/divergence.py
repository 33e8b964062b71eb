"""Detect a diverged training loss: a pure function of the losses so far."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_FIRST_STEPS = 5
SUSTAINED_STEPS = 20
_FACTOR = 2.0
_MARGIN = 2.0


def far_above_start(losses: Sequence[float], steps: int = 1) -> bool:
    """Return True if each of the last `steps` losses is both twice the initial loss and 2 above it.

    Twice the initial loss and 2 nats more is far above the effect of warm-up or of rows ordered by difficulty: a model
    in that state has forgotten what it knew.

    Args:
        losses: losses of all steps so far.
        steps: number of last steps to consider.
    """
    if len(losses) < _FIRST_STEPS + steps:
        return False
    initial = median(losses[:_FIRST_STEPS])
    return min(losses[-steps:]) > max(_FACTOR * initial, initial + _MARGIN)


def diverged(losses: Sequence[float]) -> bool:
    """Return True if the last 20 losses are far above the start; single bad batches and brief rises do not count."""
    return far_above_start(losses, SUSTAINED_STEPS)
