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


def diverged(losses: Sequence[float]) -> bool:
    """Whether each of the last 20 losses is both twice the first ones and 2 above them.

    A single odd batch does not count, and a loss that comes back in time goes on. Twice the first loss and 2 nats more
    is far above what warm-up or an order by difficulty causes: a model in that state has forgotten what it knew.

    Args:
        losses: of every step so far, in nats per target token.
    """
    if len(losses) < _FIRST_STEPS + SUSTAINED_STEPS:
        return False
    initial = median(losses[:_FIRST_STEPS])
    return min(losses[-SUSTAINED_STEPS:]) > max(_FACTOR * initial, initial + _MARGIN)
