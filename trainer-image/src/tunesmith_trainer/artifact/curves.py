"""Plot the curves: training loss and held-out loss over the steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tunesmith.api.objective import ObjectiveName

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tunesmith_trainer.reporting.curve import CurvePoint


def loss_label(loss: str, objective: ObjectiveName) -> str:
    """Return the loss with its unit: `loss, nats per target token` or `loss of DPO`."""
    return f"{loss}, nats per target token" if objective is ObjectiveName.SFT else f"{loss} of {objective.upper()}"


def draw(path: Path, curve: Sequence[CurvePoint], objective: ObjectiveName, published: int | None) -> None:
    """Write a PNG of 960 × 540 pixels; the same curve gives the same bytes.

    Args:
        path: file to write.
        curve: points of the run.
        objective: objective, which determines the unit of the loss.
        published: step of the published weights, which is marked unless it is the last one.
    """
    figure = Figure(figsize=(9.6, 5.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    trained = [(point.step, point.loss) for point in curve if point.loss is not None]
    held_out = [(point.step, point.evaluation_loss) for point in curve if point.evaluation_loss is not None]
    if trained:
        axes.plot(*zip(*trained, strict=True), color="tab:blue", linewidth=1.2, label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="tab:orange", marker="o", label="held out")
    if published is not None and published < max(point.step for point in curve):
        axes.axvline(published, color="tab:green", linestyle="--", linewidth=1.0, label="published")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(loss_label("loss", objective))
    axes.grid(alpha=0.3)
    if trained or held_out:
        axes.legend()
    # Without the library's version the file depends on its content alone.
    figure.savefig(path, metadata={"Software": None})
