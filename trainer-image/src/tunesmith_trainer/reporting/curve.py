"""A run's curves: the losses after each step and each evaluation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CurvePoint:
    """One line of the curves: the objective's losses (SFT: nats per target token)."""

    step: int
    epoch: float
    loss: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    tokens: int | None = None
    evaluation_loss: float | None = None
