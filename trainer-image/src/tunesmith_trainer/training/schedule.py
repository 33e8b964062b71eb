"""Learning rate of each step: warm-up, then the scheduler's shape. Pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tunesmith.api.hyperparameters import Scheduler


@dataclass(frozen=True)
class Schedule:
    """Learning rate over the steps of a run, as a share of its peak.

    Attributes:
        scheduler: shape after warm-up.
        total: steps of the run.
        warmup: steps in which the rate rises; none of them has the rate 0.
        minimum: share towards which a decaying rate falls.
    """

    scheduler: Scheduler
    total: int
    warmup: int
    minimum: float

    def factor(self, taken: int) -> float:
        """Return the share of the peak at which the next step is taken, if `taken` steps were taken before it."""
        if taken < self.warmup:
            return (taken + 1) / self.warmup
        if self.scheduler is Scheduler.CONSTANT:
            return 1.0
        progress = (taken - self.warmup) / max(1, self.total - self.warmup)
        decayed = 1.0 - progress if self.scheduler is Scheduler.LINEAR else 0.5 * (1.0 + math.cos(math.pi * progress))
        return max(0.0, decayed * (1.0 - self.minimum) + self.minimum)
