from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tunesmith.api.finetunejob import FineTuneJob
from tunesmith.cli.progress import News, final_condition, live_line, result
from tunesmith.contracts.progress import duration

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
DIGEST = "sha256:" + "a" * 64


def job(**status: Any) -> FineTuneJob:
    return FineTuneJob.model_validate(
        {
            "metadata": {"name": "sail", "namespace": "team"},
            "spec": {
                "baseModel": {"uri": "s3://models/base"},
                "dataset": {"train": [{"uri": "s3://data/train.jsonl"}]},
                "method": {"lora": {}},
            },
            "status": status,
        }
    )


def condition(type_: str, status: str, reason: str, message: str = "", second: int = 0) -> dict[str, Any]:
    return {
        "type": type_,
        "status": status,
        "reason": reason,
        "message": message,
        "lastTransitionTime": (NOW + timedelta(seconds=second)).isoformat(),
    }


TRAINING = {
    "stage": "Training",
    "step": 12,
    "totalSteps": 60,
    "loss": 2.3456,
    "tokensPerSecond": 431.4,
    "etaSeconds": 200,
    "updateTime": NOW.isoformat(),
}
MORE = {"epoch": 0.41, "evaluationLoss": 2.4, "learningRate": 2e-4, "memoryBytes": 1_900_000_000}
FIGURES = "epoch 0.4  loss 2.346  held-out 2.400  rate 2.0e-04  431 tok/s  1.9 GB"
ATTEMPTS = [
    {"name": "sail-abcde-1", "outcome": "Failed", "reason": "OutOfMemory", "message": "no memory"},
    {"name": "2"},
]


@pytest.mark.parametrize(
    ("status", "line"),
    [
        ({}, "waiting for the operator"),
        ({"phase": "Validating"}, "Validating"),
        ({"phase": "Running", "progress": {"stage": "Loading"}}, "Loading"),
        (
            {"phase": "Running", "progress": TRAINING},
            "Training  step 12/60 (20 %)  loss 2.346  431 tok/s  ETA 3 min 10 s",
        ),
        (
            {"phase": "Running", "progress": {**TRAINING, **MORE}},
            f"Training  step 12/60 (20 %)  {FIGURES}  ETA 3 min 10 s",
        ),
        (
            {"phase": "Running", "progress": {**TRAINING, "stage": "Evaluating", "evaluationLoss": 1.5}},
            "Evaluating  step 12/60 (20 %)  loss 2.346  held-out 1.500  431 tok/s",
        ),
        (
            {"phase": "Running", "progress": {"stage": "Training"}, "attempts": ATTEMPTS},
            "Training (attempt 2)",
        ),
        ({"phase": "Complete", "progress": TRAINING}, "Complete"),
    ],
)
def test_the_line_has_stage_step_loss_and_remaining_time(status: dict[str, Any], line: str) -> None:
    assert live_line(job(**status), NOW + timedelta(seconds=10)) == line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0 s"), (0.4, "0 s"), (59, "59 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"), (7500, "2 h 5 min")],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_news_are_reported_once_and_in_order() -> None:
    news = News()
    first = job(
        conditions=[
            condition("Started", "True", "Started", "on node one", 5),
            condition("Validated", "True", "Valid", "412 rows", 1),
            condition("Published", "False", "Waiting"),
        ]
    )
    assert news.of(first) == ["Validated: 412 rows", "Started: on node one"]
    assert news.of(first) == []
    assert news.of(job(attempts=ATTEMPTS)) == ["attempt sail-abcde-1 failed, OutOfMemory: no memory"]
    waiting = job(conditions=[condition("Validated", "False", "ImagePullFailed", "cannot pull trainer:1")])
    assert news.of(waiting) == ["ImagePullFailed: cannot pull trainer:1"]


def test_only_warnings_of_the_events_are_news() -> None:
    news = News()
    warning = {"type": "Warning", "reason": "Unschedulable", "message": "no node has a GPU"}
    assert news.of_event({**warning, "type": "Normal"}) == []
    assert news.of_event(warning) == ["warning, Unschedulable: no node has a GPU"]
    assert news.of_event(warning) == []


def test_the_result_has_the_format_of_a_local_run() -> None:
    done = job(
        conditions=[condition("Complete", "True", "Completed", "held-out loss fell")],
        artifact={"uri": "s3://store/a", "digest": DIGEST, "sizeBytes": 1, "servable": {"vllm": True}},
        evaluation={"loss": 1.0, "baseLoss": 2.0},
    )
    end = final_condition(done)
    assert end is not None
    assert result(done, end) == {
        "outcome": "Succeeded",
        "reason": None,
        "message": "held-out loss fell",
        "artifact": {"uri": "s3://store/a", "digest": DIGEST},
        "metrics": {"evaluationLoss": 1.0, "baseEvaluationLoss": 2.0},
    }
    failed = job(conditions=[condition("Failed", "True", "DatasetInvalid", "line 3 is not JSON")])
    end = final_condition(failed)
    assert end is not None
    assert result(failed, end)["reason"] == "DatasetInvalid"
    assert final_condition(job(conditions=[condition("Complete", "False", "Running")])) is None
