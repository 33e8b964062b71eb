"""Weights & Biases: one run per FineTuneJob, whose id is kept across attempts."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import wandb

from tunesmith.contracts.connections import check_server

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tunesmith_trainer.reporting.journal import Description, End, Point

_CONNECT_TIMEOUT_SECONDS = 60
_SERVERS = ("WANDB_BASE_URL", "WANDB_HTTP_PROXY", "WANDB_HTTPS_PROXY")
"""Variables with the addresses that its client connects to; by default it is wandb.ai."""
_UNCONNECTED = ("offline", "dryrun", "disabled")
"""Values of WANDB_MODE with which the client does not connect."""


class WandbTracker:
    """Reports to WANDB_BASE_URL (default: wandb.ai), to the project WANDB_PROJECT."""

    def __init__(self, run: Description) -> None:
        self._run = run
        self._started: wandb.Run | None = None

    def open(self) -> None:
        """Start the run, or continue that of earlier attempts."""
        if self._started is not None:
            return  # from here on the library itself handles outages
        if os.environ.get("WANDB_MODE") not in _UNCONNECTED:
            for server in filter(None, (os.environ.get(name) for name in _SERVERS)):
                check_server(server)
        settings = wandb.Settings(
            console="off",
            silent=True,
            init_timeout=_CONNECT_TIMEOUT_SECONDS,
            disable_git=True,
            disable_code=True,
            save_code=False,
            disable_job_creation=True,
            # Trackers must not receive the command line, host or other users' processes on the GPU.
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
            wandb.teardown()  # otherwise the next attempt fails because the run is in use
            raise
        self._next = self._started.step

    def write(self, points: Sequence[Point]) -> None:
        """Send the steps that the run does not have; its steps only increase."""
        for point in points:
            if point.step >= self._next:
                self._run_now.log(dict(point.metrics), step=point.step)

    def finish(self, end: End) -> None:
        """Add the metrics of the result to the summary, and wait until everything is sent."""
        run = self._run_now
        run.summary.update({f"final/{name}": value for name, value in end.metrics.items()})
        if end.outcome == "Preempted":
            run.mark_preempting()
        run.finish(exit_code=0 if end.outcome == "Succeeded" else 1)

    @property
    def _run_now(self) -> wandb.Run:
        assert self._started is not None  # noqa: S101 - open() is called first
        return self._started
