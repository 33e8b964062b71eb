"""Jobs side by side."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.api.finetunejob import FineTuneJob
from tunesmith.cli.compare import best, differences, figures, incomparable

HELD_OUT = [{"uri": "s3://data/validation.jsonl"}]


def job(name: str, loss: float | None, *, digest: str = "sha256:" + "d" * 64, **dataset: Any) -> FineTuneJob:
    status: dict[str, Any] = {
        "phase": "Complete",
        "startTime": "2026-01-01T00:00:00Z",
        "completionTime": "2026-01-01T00:05:00Z",
        "gpuSeconds": 300,
        "resolved": {"datasetDigest": digest, "totalSteps": 40},
        "preflight": {"rows": 412},
        "artifact": {"uri": "s3://a/b", "digest": digest, "sizeBytes": 2_500_000, "servable": {"vllm": True}},
        "evaluation": {
            "baseLoss": 3.0,
            "loss": loss,
            "scores": [{"suite": "answers", "metric": "ExactMatch", "base": 0.1, "adapter": 0.7}],
            "gates": [{"suite": "answers", "metric": "ExactMatch", "min": 0.5, "passed": True}],
        },
    }
    spec = {
        "baseModel": {"uri": "s3://models/base"},
        "dataset": {"train": [{"uri": "s3://data/train.jsonl"}], **dataset},
        "method": {"lora": {}},
    }
    return FineTuneJob.model_validate({"metadata": {"name": name, "namespace": "team"}, "spec": spec, "status": status})


def test_a_job_has_its_scores_steps_time_and_cost() -> None:
    assert figures(job("a", 1.25)) == {
        "state": "Complete",
        "held-out loss, base": "3.0000",
        "held-out loss, adapter": "1.2500",
        "answers ExactMatch": "0.7000",
        "gate answers ExactMatch": "passed",
        "training rows": "412",
        "digest of the data": "d" * 12,
        "steps": "40",
        "time": "5 min 0 s",
        "GPU time": "5 min 0 s",
        "adapter": "2.5 MB",
    }


def test_only_fields_that_differ_are_shown_with_their_paths() -> None:
    specs = [
        {"dataset": {"train": [{"uri": "a"}], "maxLength": 512}, "method": {"lora": {"rank": 8}}},
        {"dataset": {"train": [{"uri": "b"}], "maxLength": 512}, "method": {"qlora": {"rank": 8}}},
    ]
    assert differences(specs) == [
        ("spec.dataset.train[0].uri", ["a", "b"]),
        ("spec.method.lora.rank", [8, None]),
        ("spec.method.qlora.rank", [None, 8]),
    ]
    assert differences([specs[0], specs[0]]) == []


@pytest.mark.parametrize(
    ("jobs", "name"),
    [
        ([job("a", 1.5), job("b", 1.25)], "b"),
        ([job("a", 1.5, validation=HELD_OUT), job("b", 1.25, digest="sha256:" + "e" * 64, validation=HELD_OUT)], "b"),
        ([job("a", 1.5), job("b", 1.25, digest="sha256:" + "e" * 64)], None),
        ([job("a", 1.5), job("b", None)], None),
    ],
    ids=["same rows", "more rows, same held-out ones", "other held-out rows", "no loss"],
)
def test_the_lowest_loss_is_shown_if_losses_can_be_compared(jobs: list[FineTuneJob], name: str | None) -> None:
    found = best(jobs)
    assert (found.metadata.name if found else None) == name


def test_losses_that_cannot_be_compared_have_a_reason() -> None:
    first, other = job("a", 1.5), job("b", 1.25, digest="sha256:" + "e" * 64)
    running = first.model_copy(update={"status": first.status.model_copy(update={"artifact": None})})
    assert incomparable([first, first]) == ""
    assert incomparable([running, other]) == "a is not complete"
    assert incomparable([first, job("b", None), job("c", None)]) == "b, c have no held-out loss"
    assert incomparable([first, other]).startswith("their held-out rows differ")
