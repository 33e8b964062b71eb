"""Frequency of the held-out loss during training, and that computing it changes nothing."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING

import pytest

from tunesmith_trainer.preflight.plan import evaluation_interval

if TYPE_CHECKING:
    from tests.trainer.trainer_rig import Workbench


@pytest.mark.parametrize(
    ("steps", "batch", "held_out", "every"),
    [(1000, 8, 10, 100), (30, 8, 2, 3), (3, 4, 2, 4), (1000, 8, 1200, 1000), (1000, 8, 600, 500), (7, 32, 0, 1)],
    ids=["ten looks", "ten of few", "none in a very short run", "none where they are dear", "one", "nothing held out"],
)
def test_about_ten_scores_take_at_most_a_twentieth_of_the_time(
    steps: int, batch: int, held_out: int, every: int
) -> None:
    assert evaluation_interval(steps, batch, held_out) == every


def test_scoring_during_training_does_not_change_the_result(bench: Workbench) -> None:
    hyper = {"maxSteps": 5, "batchSize": 4, "learningRate": 0.01}
    method = {"lora": {"rank": 4, "alpha": 8, "dropout": 0.1}}
    curves, weights = [], []
    for every in (2, 100):
        output = bench.folder / f"every-{every}"
        job = bench.job(hyperparameters=hyper, method=method, evaluation={"everySteps": every, "publish": "Last"})
        ran = bench.run("train", job, output=str(output))
        assert ran.code == 0, ran.result.message
        with (output / "metrics.csv").open() as file:
            points = [point for point in csv.DictReader(file) if point["evaluationLoss"]]
        curves.append({int(point["step"]): float(point["evaluationLoss"]) for point in points})
        weights.append((output / "artifact/adapter_model.safetensors").read_bytes())
    often, seldom = curves
    assert (list(often), list(seldom)) == ([0, 2, 4, 5], [0, 5])
    assert len(set(often.values())) == 4  # each is of the adapter at that step
    assert (often[0], often[5]) == (seldom[0], seldom[5])
    assert weights[0] == weights[1]
