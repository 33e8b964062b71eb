from __future__ import annotations

import math

import pytest

from tunesmith.api.finetunejob_status import FineTuneJobStatus, ProgressStatus, Stage
from tunesmith.contracts.progress import step_line


def test_floats_have_four_decimals() -> None:
    progress = ProgressStatus(loss=1.23456789, learning_rate=0.00012345)
    assert progress.manifest() == {"loss": 1.2346, "learningRate": 0.00012345}


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_non_finite_float_is_omitted(loss: float) -> None:
    assert ProgressStatus(step=3, loss=loss).manifest() == {"step": 3}


def test_a_field_of_a_newer_release_is_ignored() -> None:
    status = FineTuneJobStatus.model_validate({"phase": "Running", "fromTheFuture": 1})
    assert status.phase == "Running"


def test_the_line_of_a_step_shows_that_training_stopped_early() -> None:
    progress = ProgressStatus(stage=Stage.EVALUATING, step=12, total_steps=30)
    assert step_line(progress) == "step 12/30 (40 %)"
    assert step_line(progress.model_copy(update={"stopped_early": True})) == "step 12/30 (40 %, stopped early)"
