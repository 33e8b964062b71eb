"""Progress that the trainer serves at `GET /progress`: a ProgressStatus, at most 64 KiB of JSON; and its text form."""

from __future__ import annotations

from tunesmith.api.finetunejob_status import ProgressStatus, Stage
from tunesmith.contracts.report import parse_report

PROGRESS_PORT = 8080
"""Port of the training pod that serves `/progress` and `/metrics`."""
PROGRESS_MAX_BYTES = 65536
_MINUTE = 60
_HOUR = 3600
_FIGURES = {
    "epoch": "epoch {:.1f}",
    "loss": "loss {:.3f}",
    "evaluation_loss": "held-out {:.3f}",
    "learning_rate": "rate {:.1e}",
    "tokens_per_second": "{:.0f} tok/s",
}
_OMITTED_FIRST = ("memory", "learning_rate", "epoch", "tokens_per_second")
"""Figures that are omitted first on a narrow terminal."""


def parse_progress(body: bytes) -> ProgressStatus:
    """Return the progress in a response body.

    Raises:
        ValueError: the body is too large or does not match the schema.
    """
    if len(body) > PROGRESS_MAX_BYTES:
        raise ValueError(f"progress has {len(body)} bytes, more than {PROGRESS_MAX_BYTES}")
    return parse_report(ProgressStatus, body)


def step_line(progress: ProgressStatus, *, elapsed: float = 0.0, width: int | None = None) -> str:
    """Return the progress of a run as one line for people; empty before the first step.

    For example `step 12/90 (13 %)  epoch 0.4  loss 1.234  held-out 1.300  rate 2.0e-04  410 tok/s  1.9 GB  ETA 45 s`.

    Args:
        progress: latest report of the trainer.
        elapsed: seconds since that report.
        width: available characters; None: no limit.
    """
    figures: dict[str, str] = {}
    if progress.step is not None and progress.total_steps:
        share = 100 * progress.step // progress.total_steps
        stopped = ", stopped early" if progress.stopped_early else ""
        figures["step"] = f"step {progress.step}/{progress.total_steps} ({share} %{stopped})"
    for name, form in _FIGURES.items():
        value = getattr(progress, name)
        if value is not None:
            figures[name] = form.format(value)
    if progress.memory_bytes is not None:
        figures["memory"] = f"{progress.memory_bytes / 1e9:.1f} GB"
    if progress.eta_seconds is not None and progress.stage is Stage.TRAINING:
        figures["left"] = f"ETA {duration(progress.eta_seconds - elapsed)}"
    line = "  ".join(figures.values())
    for name in _OMITTED_FIRST:
        if width is not None and len(line) > width:
            figures.pop(name, None)
            line = "  ".join(figures.values())
    return line[:width]


def duration(seconds: float) -> str:
    """Return a duration such as `45 s`, `3 min 20 s` or `2 h 5 min`."""
    whole = max(0, round(seconds))
    if whole < _MINUTE:
        return f"{whole} s"
    if whole < _HOUR:
        return f"{whole // _MINUTE} min {whole % _MINUTE} s"
    return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE} min"
