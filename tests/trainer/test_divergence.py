"""A run is stopped when its loss has diverged."""

from __future__ import annotations

import re
import shutil
import threading
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load_file, save_file

from tunesmith.api.conditions import FailureReason
from tunesmith_trainer.training.divergence import SUSTAINED_STEPS, diverged, far_above_start

if TYPE_CHECKING:
    from tests.trainer.trainer_rig import Workbench

FALLING = [3.0 - 0.02 * step for step in range(60)]


@pytest.mark.parametrize(
    "losses",
    [
        [],
        FALLING,
        [*FALLING, 40.0],
        [*FALLING, *[40.0] * (SUSTAINED_STEPS - 1)],
        [*FALLING, *[40.0] * (SUSTAINED_STEPS - 1), 2.0],
        [0.01, 0.01, 0.01, 0.01, 0.01, *[0.5] * 40],
        [3.0] * 5 + [4.9] * 40,
    ],
    ids=["nothing", "falling", "one odd batch", "not yet", "came back", "small", "less than two nats more"],
)
def test_a_run_that_may_recover_continues(losses: list[float]) -> None:
    assert not diverged(losses)


@pytest.mark.parametrize("first", [0.01, 1.0, 3.0])
def test_a_loss_that_stays_far_above_the_start_stops_the_run(first: float) -> None:
    assert diverged([first] * 5 + [first * 2 + 2.1] * SUSTAINED_STEPS)


def test_a_diverged_job_keeps_its_last_good_checkpoint(bench: Workbench) -> None:
    """Its learning rate grows to 1 for a head whose hidden states become large."""
    weights = load_file(bench.base / "model.safetensors")
    weights["model.norm.weight"] *= 5
    bench.base = shutil.copytree(bench.base, bench.folder / "loud")
    save_file(weights, bench.base / "model.safetensors", {"format": "pt"})
    steps = 200
    hyper = {"maxSteps": steps, "batchSize": 4, "learningRate": 1.0, "scheduler": "Constant", "warmupRatio": 0.5}
    job = bench.job(
        method={"lora": {"rank": 4, "modulesToSave": ["lm_head"]}},
        hyperparameters=hyper,
        checkpoint={"everySteps": 1, "keep": 1},
        servable="Ignored",
    )
    ran = bench.run("train", job)
    assert (ran.code, ran.result.reason, ran.result.retryable) == (2, FailureReason.LOSS_DIVERGED, False)
    found = re.search(
        rf"at step (\d+) of {steps}.* lower hyperparameters.learningRate.*; the last good checkpoint is that of step"
        rf" (\d+), in file://{bench.output}/checkpoints",
        ran.result.message,
    )
    assert found is not None, ran.result.message
    stopped, good = int(found[1]), int(found[2])
    assert stopped < steps
    # A watchdog that was still running would terminate this process in five minutes.
    for thread in [thread for thread in threading.enumerate() if thread.name == "watchdog"]:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert [entry.name for entry in (bench.output / "checkpoints").iterdir()] == [f"step-{good:08d}"]
    losses = [float(found[1]) for line in ran.lines if (found := re.search(r"  step \d+/.* loss ([\d.]+)", line))]
    assert not far_above_start(losses[:good])
    assert all(far_above_start(losses[:step]) for step in range(good + 1, stopped))
