"""Metrics of a training pod for Prometheus: the latest progress, one gauge per field."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from tunesmith.api.finetunejob_status import Stage

if TYPE_CHECKING:
    from tunesmith.api.finetunejob_status import ProgressStatus

_UNIT = "nats per target token for the objective sft, the objective's own loss for others."
GAUGES = {
    "step": ("tunesmith_trainer_step", "Optimizer steps done."),
    "total_steps": ("tunesmith_trainer_steps", "Optimizer steps of the whole run."),
    "epoch": ("tunesmith_trainer_epoch", "Passes over the training rows."),
    "loss": ("tunesmith_trainer_loss", f"Training loss of the last step: {_UNIT}"),
    "evaluation_loss": ("tunesmith_trainer_evaluation_loss", f"Held-out loss: {_UNIT}"),
    "learning_rate": ("tunesmith_trainer_learning_rate", "Learning rate of the last step."),
    "tokens_per_second": ("tunesmith_trainer_tokens_per_second", "Tokens trained per second."),
    "memory_bytes": ("tunesmith_trainer_memory_bytes", "Peak memory: of the GPU, or resident memory on a CPU."),
    "eta_seconds": ("tunesmith_trainer_eta_seconds", "Seconds until the last step."),
}
"""Name and description of each metric, by field of the progress. A field without a value has no metric."""
STAGE = ("tunesmith_trainer_stage", "1 for the stage that is running, 0 for the others.")


def exposition(status: ProgressStatus) -> bytes:
    """Return the progress in Prometheus' text format."""
    registry = CollectorRegistry()
    for field, (name, meaning) in GAUGES.items():
        value = getattr(status, field)
        if value is not None:
            Gauge(name, meaning, registry=registry).set(value)
    if status.stage is not None:
        name, meaning = STAGE
        stages = Gauge(name, meaning, ["stage"], registry=registry)
        for stage in Stage:
            stages.labels(stage).set(stage is status.stage)
    return generate_latest(registry)
