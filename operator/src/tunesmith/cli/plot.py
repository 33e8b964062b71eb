"""PNG of simulated policies: pods and waits over time. Needs the extra `plot`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tunesmith.autoscale.simulate import Outcome


def plot_outcomes(outcomes: Sequence[tuple[str, Outcome]], path: Path) -> None:
    """Write a PNG with the pods of each policy, the longest wait of each minute, and GPU-hours.

    Raises:
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=(12, 8), layout="constrained")
    pods, waits, hours = figure.subplots(3, 1, height_ratios=[3, 2, 1])
    last = max(max(outcome.sizes[-1][0], 60.0 * len(outcome.worst)) for _, outcome in outcomes)
    for number, (name, outcome) in enumerate(outcomes):
        color = f"C{number}"
        times = [at / 3600 for at, _ in outcome.sizes] + [last / 3600]
        sizes = [size for _, size in outcome.sizes]
        pods.step(times, [*sizes, sizes[-1]], where="post", label=name, color=color)
        waits.plot([minute / 60 for minute in range(len(outcome.worst))], outcome.worst, color=color, linewidth=0.8)
        hours.barh(number, outcome.gpu_hours, color=color)
    pods.set_ylabel("pods")
    pods.legend(loc="upper left")
    waits.set_ylabel("longest wait of a minute (s)")
    waits.set_xlabel("hours")
    waits.sharex(pods)
    hours.set_yticks(range(len(outcomes)), [name for name, _ in outcomes])
    hours.set_xlabel("GPU-hours")
    figure.savefig(path, format="png", dpi=100)
