from __future__ import annotations

import math

import pytest

from tunesmith.api.finetunejob_status import FineTuneJobStatus, ProgressStatus


def test_floats_have_four_decimals() -> None:
    progress = ProgressStatus(loss=1.23456789, learning_rate=0.00012345)
    assert progress.manifest() == {"loss": 1.2346, "learningRate": 0.00012345}


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_non_finite_float_is_omitted(loss: float) -> None:
    assert ProgressStatus(step=3, loss=loss).manifest() == {"step": 3}


def test_a_field_of_a_newer_release_is_ignored() -> None:
    status = FineTuneJobStatus.model_validate({"phase": "Running", "fromTheFuture": 1})
    assert status.phase == "Running"
