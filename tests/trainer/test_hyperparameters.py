"""Each hyperparameter has its documented effect."""

from __future__ import annotations

import csv
import math
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from tunesmith.api.conditions import FailureReason
from tunesmith.api.hyperparameters import Optimizer, Precision, Scheduler
from tunesmith_trainer.training.batches import Collator, Layout
from tunesmith_trainer.training.neftune import EmbeddingNoise
from tunesmith_trainer.training.schedule import Schedule

if TYPE_CHECKING:
    from pathlib import Path

    from tests.trainer.trainer_rig import Workbench

RATES = {Optimizer.LION: 1e-3, Optimizer.SGD: 1.0}


def curve(bench: Workbench, name: str = "out") -> list[dict[str, str]]:
    """Return the points of the training steps."""
    with (bench.folder / name / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["loss"]]


def losses(bench: Workbench, name: str, method: dict[str, Any] | None = None, **hyperparameters: Any) -> list[float]:
    """Return the loss of each step of a run with these hyperparameters."""
    hyper = {"maxSteps": 4, "batchSize": 4, "learningRate": 0.01, "warmupSteps": 0, **hyperparameters}
    job = bench.job(hyperparameters=hyper, **({"method": method} if method else {}))
    ran = bench.run("train", job, output=str(bench.folder / name))
    assert ran.code == 0, ran.result.message
    return [float(row["loss"]) for row in curve(bench, name)]


HALF_COSINE = [0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
SCHEDULES = {
    "one step": (Schedule(Scheduler.COSINE, 1, 1, 0.0), [1.0]),
    "one step without warm-up": (Schedule(Scheduler.LINEAR, 1, 0, 0.0), [1.0]),
    "cosine": (Schedule(Scheduler.COSINE, 6, 2, 0.0), [0.5, 1.0, *HALF_COSINE]),
    "linear": (Schedule(Scheduler.LINEAR, 4, 0, 0.0), [1.0, 0.75, 0.5, 0.25]),
    "constant": (Schedule(Scheduler.CONSTANT, 6, 4, 0.0), [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
    "warm-up only": (Schedule(Scheduler.COSINE, 2, 2, 0.0), [0.5, 1.0]),
    "cosine with a minimum": (Schedule(Scheduler.COSINE, 4, 0, 0.2), [0.8 * factor + 0.2 for factor in HALF_COSINE]),
    "linear with a minimum": (Schedule(Scheduler.LINEAR, 4, 0, 0.2), [1.0, 0.8, 0.6, 0.4]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_step_has_the_rate_0(name: str) -> None:
    schedule, expected = SCHEDULES[name]
    assert [schedule.factor(taken) for taken in range(schedule.total)] == pytest.approx(expected)
    assert min(expected) > 0


def test_a_run_of_one_step_trains_at_the_full_rate(bench: Workbench) -> None:
    ran = bench.run("train", bench.job(hyperparameters={"epochs": 0.01, "batchSize": 24, "learningRate": 0.01}))
    assert ran.code == 0, ran.result.message
    assert ran.result.evaluation is not None
    assert (ran.result.evaluation.loss_reduction_percent or 0) > 0.1
    assert [float(row["learningRate"]) for row in curve(bench)] == [0.01]


def test_warm_up_and_minimum_apply_to_the_steps(bench: Workbench) -> None:
    losses(bench, "out", maxSteps=6, warmupSteps=2, minLearningRateRatio=0.5, scheduler="Linear")
    rates = [float(row["learningRate"]) for row in curve(bench)]
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.00875, 0.0075, 0.00625])


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"warmupSteps": 2, "warmupRatio": 0.1}, "warmupRatio and hyperparameters.warmupSteps are mutually exclusive"),
        ({"warmupSteps": 4, "maxSteps": 3}, "hyperparameters.warmupSteps must not exceed hyperparameters.maxSteps"),
        ({"minLearningRateRatio": 0.1, "scheduler": "Constant"}, "only for the schedulers Cosine and Linear"),
        ({"warmupSteps": 7, "epochs": 1, "batchSize": 4}, "hyperparameters.warmupSteps is 7, but the run has 6 steps"),
    ],
)
def test_a_schedule_that_contradicts_itself_is_refused(bench: Workbench, hyper: dict[str, Any], message: str) -> None:
    ran = bench.run("validate", bench.job(hyperparameters=hyper))
    assert (ran.code, ran.result.reason, ran.result.retryable) == (2, FailureReason.INVALID_SPEC, False)
    assert message in ran.result.message


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (1e-9, "the 2 steps changed none of the trained weights, so the result is the base model: raise"),
        (1e-300, "no gradient reaches the adapter at step 1, so it would learn nothing"),
    ],
)
def test_a_run_that_changes_no_weight_fails(bench: Workbench, clip: float, message: str) -> None:
    hyper = {"maxSteps": 2, "batchSize": 4, "optimizer": "SGD", "learningRate": 1e-8, "maxGradNorm": clip}
    ran = bench.run("train", bench.job(method={"full": {}}, hyperparameters=hyper))
    assert (ran.code, ran.result.reason, ran.result.retryable) == (2, FailureReason.NOTHING_LEARNED, False)
    assert message in ran.result.message
    assert not (bench.output / "artifact").exists()


@pytest.mark.long
def test_every_optimizer_trains_differently(bench: Workbench) -> None:
    method = {"lora": {"rank": 64, "alpha": 64}}  # smaller tensors have their state in 32 bits
    curves = {
        name: losses(bench, name.value, method, optimizer=name.value, learningRate=RATES.get(name, 0.005))
        for name in Optimizer
    }
    for name, curve in curves.items():
        assert curve[-1] < curve[0] - 0.02, name
    assert len({curve[-1] for curve in curves.values()}) == len(Optimizer)
    assert losses(bench, "decayed", method, weightDecay=1.0, learningRate=0.005) != curves[Optimizer.ADAMW]


@pytest.mark.parametrize("optimizer", [Optimizer.ADAMW_8BIT, Optimizer.ADAFACTOR])
def test_a_resumed_run_has_the_optimizers_state_and_the_same_noise(bench: Workbench, optimizer: Optimizer) -> None:
    job = bench.job(
        hyperparameters={
            "maxSteps": 6,
            "batchSize": 4,
            "optimizer": optimizer.value,
            "neftuneNoiseAlpha": 5,
            "warmupSteps": 5,
            "minLearningRateRatio": 0.1,
        },
        method={"lora": {"rank": 64, "dropout": 0.1}},
        checkpoint={"everySteps": 3},
    )
    weights = bench.output / "artifact/adapter_model.safetensors"
    assert bench.run("train", job).code == 0
    whole = weights.read_bytes()
    for lost in (bench.output / "artifact", max((bench.output / "checkpoints").glob("step-*"))):
        shutil.rmtree(lost)
    assert bench.run("train", job).result.resumed_from_step == 3
    assert weights.read_bytes() == whole


def test_gradient_checkpointing_changes_memory_and_not_the_result(bench: Workbench, base_model: Path) -> None:
    plain = losses(bench, "plain", gradientCheckpointing=False)
    assert losses(bench, "again", gradientCheckpointing=True) == pytest.approx(plain, rel=1e-5)

    kept = {}
    for again in (False, True):
        model = AutoModelForCausalLM.from_pretrained(base_model).train()
        if again:
            model.activation_checkpointing_enable({"use_reentrant": False})
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, sizes=sizes: (sizes.append(tensor.numel()), tensor)[1], lambda tensor: tensor
        ):
            model(input_ids=torch.arange(3, 200)[None])
        kept[again] = sum(sizes)
    assert kept[True] < kept[False] / 2


def test_precision_applies_to_weights_and_products(bench: Workbench) -> None:
    exact = losses(bench, "exact", precision=Precision.FLOAT32.value)
    rounded = losses(bench, "rounded", precision=Precision.BFLOAT16.value)
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)
    for name in ("exact", "rounded"):
        weights = load_file(bench.folder / name / "artifact/adapter_model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_absent_values_are_chosen_and_reported(bench: Workbench) -> None:
    resolved = bench.run("validate", bench.job()).result.resolved
    assert resolved is not None
    assert (resolved.precision, resolved.gradient_checkpointing) == (Precision.FLOAT32, False)
    assert resolved.warmup_steps == 1
    asked = bench.job(hyperparameters={"precision": "bfloat16", "gradientCheckpointing": True})
    resolved = bench.run("validate", asked).result.resolved
    assert resolved is not None
    assert (resolved.precision, resolved.gradient_checkpointing) == (Precision.BFLOAT16, True)


@pytest.mark.parametrize("layout", Layout)
def test_noise_is_scaled_by_each_rows_length(layout: Layout) -> None:
    width, alpha, sizes = 64, 5.0, (400, 25)
    embedding = nn.Embedding(10, width)
    noise = EmbeddingNoise(embedding, alpha)
    rows = [{"input_ids": [1] * size, "labels": [1] * size} for size in sizes]
    batch = Collator(2, 0, layout).join(rows)
    embedding.requires_grad_(requires_grad=False)
    clean = embedding.eval()(batch["input_ids"])
    noise.expect(batch)
    assert torch.equal(embedding(batch["input_ids"]), clean)  # not while scoring
    added = embedding.train()(batch["input_ids"]) - clean
    parts = added[0].split(sizes) if layout is Layout.FLAT else [added[0], added[1, : sizes[1]]]
    for part, size in zip(parts, sizes, strict=True):
        limit = alpha / (size * width) ** 0.5
        assert float(part.abs().max()) == pytest.approx(limit, rel=0.02)
        assert float(part.std()) == pytest.approx(limit / 3**0.5, rel=0.05)


def test_neftune_trains_with_noise_and_the_same_seed_gives_the_same_noise(bench: Workbench) -> None:
    noisy = losses(bench, "noisy", neftuneNoiseAlpha=5)
    assert noisy == losses(bench, "again", neftuneNoiseAlpha=5)
    assert noisy != losses(bench, "plain")
