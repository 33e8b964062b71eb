"""Checkpoints of a FineTuneJob: the interval between them and the number that is kept."""

from __future__ import annotations

import math

from pydantic import Field

from tunesmith.api.model import ApiModel, Rule

DEFAULT_EVERY_MINUTES = 10.0
MIN_EVERY_RATIO = 0.0001


def steps_of_ratio(ratio: float, total: int) -> int:
    """Return a share of a run's optimizer steps, rounded up."""
    # A share such as 0.07 of 100 steps is 7.000000000000001 in floating point.
    return max(1, math.ceil(ratio * total - 1e-9 * total))


class Checkpoint(ApiModel):
    """Interval and retention of checkpoints. An interruption costs at most one interval of training."""

    rules = (
        Rule(
            "[has(self.everySteps), has(self.everyRatio), has(self.everyMinutes)].filter(given, given).size() <= 1",
            "checkpoint.everySteps, checkpoint.everyRatio and checkpoint.everyMinutes are mutually exclusive: keep one "
            "of them",
            lambda self: [self.every_steps, self.every_ratio, self.every_minutes].count(None) >= 2,  # noqa: PLR2004
        ),
    )

    every_steps: int | None = Field(
        default=None, ge=1, le=10_000_000, description="Number of optimizer steps between two checkpoints."
    )
    every_ratio: float | None = Field(
        default=None,
        ge=MIN_EVERY_RATIO,
        le=1.0,
        description="Interval between two checkpoints as a share of the run's optimizer steps, rounded up: 0.1 saves "
        "every tenth of the run.",
    )
    every_minutes: float | None = Field(
        default=None,
        ge=0.1,
        le=1440,
        description="Minutes between two checkpoints. Absent without everySteps and everyRatio: 10.",
    )
    keep: int = Field(
        default=2, ge=1, le=100, description="Number of most recent checkpoints that are kept until the job finishes."
    )

    def due(self, *, steps: int, seconds: float, total: int) -> bool:
        """Return True if a checkpoint is due.

        Args:
            steps: optimizer steps since the last checkpoint.
            seconds: seconds since the last checkpoint.
            total: optimizer steps of the run.
        """
        if self.every_ratio is not None:
            return steps >= steps_of_ratio(self.every_ratio, total)
        if self.every_steps is not None:
            return steps >= self.every_steps
        return seconds >= 60 * (self.every_minutes or DEFAULT_EVERY_MINUTES)
