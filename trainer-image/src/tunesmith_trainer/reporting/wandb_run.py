"""Weights & Biases: one run per FineTuneJob, whose id goes on over attempts."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import wandb

from tunesmith.contracts.connections import check_server

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tunesmith_trainer.reporting.journal import Description, End, Point

_CONNECTING_SECONDS = 60
_SERVERS = ("WANDB_BASE_URL", "WANDB_HTTP_PROXY", "WANDB_HTTPS_PROXY")
"""Variables with what its program connects to; without them that is wandb.ai."""
_UNCONNECTED = ("offline", "dryrun", "disabled")
"""Values of WANDB_MODE with which nothing is connected to."""


class WandbTracker:
    """Sends to WANDB_BASE_URL (wandb.ai without one), into the project WANDB_PROJECT."""

    def __init__(self, run: Description) -> None:
        self._run = run
        self._started: wandb.Run | None = None

    def open(self) -> None:
        """Starts the run, or goes on with that of the attempts before."""
        if self._started is not None:
            return  # from here on the library itself waits out an outage
        if os.environ.get("WANDB_MODE") not in _UNCONNECTED:
            for server in filter(None, (os.environ.get(name) for name in _SERVERS)):
                check_server(server)
        settings = wandb.Settings(
            console="off",
            silent=True,
            init_timeout=_CONNECTING_SECONDS,
            disable_git=True,
            disable_code=True,
            save_code=False,
            disable_job_creation=True,
            # Neither command line and host nor other users' processes on the GPU are for a tracker.
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        try:
            self._started = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "tunesmith"),
                id=self._run.run,
                name=self._run.name,
                resume="allow",
                dir=self._run.folder,
                config=dict(self._run.parameters),
                settings=settings,
            )
        except Exception:
            wandb.teardown()  # or the next try is told that the run is in use
            raise
        self._next = self._started.step

    def write(self, points: Sequence[Point]) -> None:
        """Sends the steps that the run does not have; its steps only go up."""
        for point in points:
            if point.step >= self._next:
                self._run_now.log(dict(point.metrics), step=point.step)

    def finish(self, end: End) -> None:
        """Puts the metrics of the result into the summary, and waits until everything is sent."""
        run = self._run_now
        run.summary.update({f"final/{name}": value for name, value in end.metrics.items()})
        if end.outcome == "Preempted":
            run.mark_preempting()
        run.finish(exit_code=0 if end.outcome == "Succeeded" else 1)

    @property
    def _run_now(self) -> wandb.Run:
        assert self._started is not None  # noqa: S101 - open() is called first
        return self._started
