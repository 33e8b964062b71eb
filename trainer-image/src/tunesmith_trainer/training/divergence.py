"""When a training loss has run away: a pure function of the losses so far."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_FIRST_STEPS = 5
SUSTAINED_STEPS = 20
_FACTOR = 2.0
_MARGIN = 2.0


def far_off(losses: Sequence[float], steps: int = 1) -> bool:
    """Whether each of the last `steps` losses is both twice the first ones and 2 above them.

    Twice the first loss and 2 nats more is far above what warm-up or an order by difficulty causes: a model in that
    state has forgotten what it knew.

    Args:
        losses: of every step so far.
        steps: how many of the last count.
    """
    if len(losses) < _FIRST_STEPS + steps:
        return False
    initial = median(losses[:_FIRST_STEPS])
    return min(losses[-steps:]) > max(_FACTOR * initial, initial + _MARGIN)


def diverged(losses: Sequence[float]) -> bool:
    """Whether the last 20 losses are far off: one odd batch does not count, and a loss that comes back goes on."""
    return far_off(losses, SUSTAINED_STEPS)
