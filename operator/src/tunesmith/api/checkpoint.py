"""Checkpoints of a FineTuneJob: the interval between them and the number that is kept."""

from __future__ import annotations

from pydantic import Field

from tunesmith.api.model import ApiModel, Rule

DEFAULT_EVERY_MINUTES = 10.0


class Checkpoint(ApiModel):
    """Interval and retention of checkpoints. An interruption costs at most one interval of training."""

    rules = (
        Rule(
            "!(has(self.everySteps) && has(self.everyMinutes))",
            "checkpoint.everySteps and checkpoint.everyMinutes are mutually exclusive: remove one of them",
            lambda self: self.every_steps is None or self.every_minutes is None,
        ),
    )

    every_steps: int | None = Field(
        default=None, ge=1, le=10_000_000, description="Number of optimizer steps between two checkpoints."
    )
    every_minutes: float | None = Field(
        default=None,
        ge=0.1,
        le=1440,
        description="Minutes between two checkpoints. Absent without everySteps: 10.",
    )
    keep: int = Field(
        default=2, ge=1, le=100, description="Number of most recent checkpoints that are kept until the job finishes."
    )

    def due(self, *, steps: int, seconds: float) -> bool:
        """Return True if a checkpoint is due.

        Args:
            steps: optimizer steps since the last checkpoint.
            seconds: seconds since the last checkpoint.
        """
        if self.every_steps is not None:
            return steps >= self.every_steps
        return seconds >= 60 * (self.every_minutes or DEFAULT_EVERY_MINUTES)
