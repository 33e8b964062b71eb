from __future__ import annotations

from typing import Any

import pytest

from tests.controlplane.manifests import job as manifest
from tunesmith.api.finetunejob import FineTuneJob
from tunesmith.cli.throughput import GPU_PRODUCT, GpuTime, gpu_time, kind_of, similar, trained_tokens

H200, L4 = "NVIDIA-H200", "NVIDIA-L4"


def finished(name: str, *, seconds: float | None = 100.0, node: str = "a", day: int = 1, **spec: Any) -> FineTuneJob:
    """Return a complete job that trained on 2000 tokens: 2 steps of 5 of its 10 rows."""
    status = {
        "phase": "Complete",
        "completionTime": f"2026-01-{day:02}T00:00:00Z",
        "gpuSeconds": seconds,
        "preflight": {"rows": 10, "tokens": 2000},
        "resolved": {"totalSteps": 2, "batchSize": 5},
        "attempts": [{"name": f"{name}-1", "node": node}],
    }
    return FineTuneJob.model_validate(manifest("team", name, **spec) | {"status": status})


JOB = FineTuneJob.model_validate(manifest("team"))
PRODUCTS = {"a": H200, "b": L4}


def test_tokens_of_all_steps() -> None:
    status = finished("x").status
    assert trained_tokens(status.preflight, status.resolved) == 2000
    assert status.preflight is not None
    packed = status.preflight.model_copy(update={"packed_sequences": 5})
    assert trained_tokens(packed, status.resolved) == 4000
    shared = packed.model_copy(update={"shared_tokens": 500})
    assert trained_tokens(shared, status.resolved) == 3000
    assert trained_tokens(None, status.resolved) is None


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (finished("same"), True),
        (finished("cpu", seconds=None), False),
        (finished("base", baseModel__uri="s3://models/other"), False),
        (finished("method", method={"qlora": {}}), False),
        (FineTuneJob.model_validate(manifest("team", "new")), False),
    ],
)
def test_similar_jobs(other: FineTuneJob, *, expected: bool) -> None:
    assert similar(JOB, other) is expected


def test_the_median_of_the_last_jobs_on_that_kind_of_gpu() -> None:
    measured = [
        finished("old", seconds=1, day=1),
        *(finished(f"n{day}", seconds=seconds, day=day) for day, seconds in enumerate((50, 100, 100, 100, 400), 2)),
        finished("other", node="b, and 1 other"),
    ]
    assert gpu_time(JOB, 6000, measured, PRODUCTS, H200) == GpuTime(300, 20, H200, ("n6", "n5", "n4", "n3", "n2"))
    assert gpu_time(JOB, 6000, measured, PRODUCTS) == (f"completed jobs ran on {H200}, {L4}: choose one with --gpu")
    selecting = FineTuneJob.model_validate(manifest("team", scheduling={"nodeSelector": {GPU_PRODUCT: L4}}))
    found = gpu_time(selecting, 6000, measured, PRODUCTS)
    assert isinstance(found, GpuTime)
    assert found.jobs == ("other",)
    assert kind_of(selecting, {}) == L4


def test_an_unknown_gpu_time_has_a_reason() -> None:
    assert gpu_time(JOB, None, [], {}) == "the number of its tokens is unknown"
    assert gpu_time(JOB, 1, [], {}) == "no completed job has trained this base model by this method on a GPU"
    assert str(gpu_time(JOB, 1, [finished("x")], PRODUCTS, L4)).endswith(f"by this method on {L4}")
