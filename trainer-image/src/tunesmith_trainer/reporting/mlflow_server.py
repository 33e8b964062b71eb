"""MLflow: one run per FineTuneJob, found by a tag; each step is sent once."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tunesmith_trainer.reporting.journal import Description, End, Point

RUN_TAG = "tunesmith.run"
_STATUS = {"Succeeded": "FINISHED", "Failed": "FAILED", "Preempted": "KILLED"}
_METRICS_PER_REQUEST = 500
"""Metrics per request; MLflow accepts at most 1,000."""
_PARAMETERS_PER_REQUEST = 100


class MlflowTracker:
    """Reports to the server in MLFLOW_TRACKING_URI, to the experiment in MLFLOW_EXPERIMENT_NAME."""

    def __init__(self, run: Description) -> None:
        self._run = run
        self._client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
        self._id = ""
        self._sent: dict[str, set[int]] = {}
        self._last = 0

    def open(self) -> None:
        """Find the run of earlier attempts and the steps that it has, or create one."""
        client = self._client
        experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "tunesmith"))
        found = client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{self._run.run}'", max_results=1)
        if found:
            run = found[0]
            client.update_run(run.info.run_id, status="RUNNING")
        else:
            run = client.create_run(experiment, tags={RUN_TAG: self._run.run}, run_name=self._run.name)
        self._id = run.info.run_id
        self._sent = {
            name: {metric.step for metric in client.get_metric_history(self._id, name)} for name in run.data.metrics
        }
        missing = [Param(name, value) for name, value in self._run.parameters.items() if name not in run.data.params]
        for first in range(0, len(missing), _PARAMETERS_PER_REQUEST):
            client.log_batch(self._id, params=missing[first : first + _PARAMETERS_PER_REQUEST])

    def write(self, points: Sequence[Point]) -> None:
        """Send the points that the run does not have."""
        metrics = []
        for point in points:
            self._last = max(self._last, point.step)
            for name, value in point.metrics.items():
                sent = self._sent.setdefault(name, set())
                if point.step not in sent:
                    sent.add(point.step)
                    metrics.append(Metric(name, value, round(point.time * 1000), point.step))
        for first in range(0, len(metrics), _METRICS_PER_REQUEST):
            self._client.log_batch(self._id, metrics=metrics[first : first + _METRICS_PER_REQUEST])

    def finish(self, end: End) -> None:
        """Send the metrics and the outcome of the result."""
        now = round(time.time() * 1000)
        final = [
            Metric(name, value, now, self._last)
            for name, value in ((f"final/{name}", value) for name, value in end.metrics.items())
            if self._last not in self._sent.get(name, set())
        ]
        self._client.log_batch(self._id, metrics=final, tags=[RunTag("tunesmith.outcome", end.outcome)])
        self._client.set_terminated(self._id, status=_STATUS[end.outcome])

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        try:
            return str(self._client.create_experiment(name))
        except MlflowException:  # another job created it first
            found = self._client.get_experiment_by_name(name)
            if found is None:
                raise
            return str(found.experiment_id)
