"""Products in float16: the loss is scaled, an overflow costs no step, and a resumed run has the scale."""

from __future__ import annotations

import csv
import json
import shutil
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.trainer_rig import chat_rows
from tunesmith_trainer.training import loop, loss_scale
from tunesmith_trainer.training.device import emulates_bfloat16
from tunesmith_trainer.training.loss import losses_at
from tunesmith_trainer.training.loss_scale import LossScale, divide

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.trainer.trainer_rig import Workbench

HYPER = {"maxSteps": 6, "batchSize": 4, "microBatchSize": 2, "learningRate": 0.01}


def curve(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["loss"]]


def test_the_factor_is_halved_by_an_overflow_and_doubled_after_many_steps_without_one() -> None:
    scale = LossScale()
    scale.halve()
    assert (scale.factor, scale.steps) == (2.0**15, 0)
    for _ in range(2000):
        scale.count_step()
    assert (scale.factor, scale.steps) == (2.0**16, 0)
    for _ in range(2001):
        scale.count_step()
    assert scale.factor == 2.0**16
    while not scale.lowest:
        scale.halve()
    assert scale.factor == 1.0


def test_gradients_are_divided_and_checked() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    for parameter in parameters[:2]:
        parameter.grad = torch.tensor([8.0, -4.0])
    assert divide(parameters, 4.0)
    assert parameters[0].grad is not None
    assert parameters[0].grad.tolist() == [2.0, -1.0]
    parameters[1].grad = torch.tensor([1.0, torch.inf])
    assert not divide(parameters, 4.0)


def test_the_output_layers_small_gradients_are_kept() -> None:
    """The gradient of a confident prediction is below the smallest value of float16, and is scaled before it is."""
    torch.manual_seed(0)
    weight = torch.randn(50, 16)
    hidden, labels = 2.5 * weight[:4] / weight[:4].norm(dim=1, keepdim=True), torch.arange(4)

    def gradient(dtype: torch.dtype, factor: float) -> torch.Tensor:
        states = hidden.detach().clone().to(dtype).requires_grad_()
        score: Callable[[torch.Tensor], torch.Tensor] = lambda rows: rows @ (2.0 * weight.to(dtype)).T  # noqa: E731
        (losses_at(states, labels, score, trained=False).sum() * factor).backward()
        assert states.grad is not None
        return states.grad.float() / factor

    exact = gradient(torch.float32, 1.0)
    rounded = gradient(torch.float16, 2.0**14)
    assert exact.abs().max() < 0.05
    assert float((rounded - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize(
    "method",
    [
        {"lora": {"rank": 4, "alpha": 8, "dropout": 0.1}},
        {"lora": {"rank": 4, "alpha": 8, "modulesToSave": ["lm_head"]}},
        {"qlora": {"rank": 4, "alpha": 8}},
        {"ia3": {}},
        {"full": {}},
    ],
    ids=lambda method: next(iter(method)),
)
def test_float16_trains_as_float32(bench: Workbench, method: dict[str, Any]) -> None:
    found = {}
    for precision in ("float32", "float16"):
        rate = 0.001 if "full" in method else 0.01
        hyper = HYPER | {"precision": precision, "learningRate": rate, "gradientCheckpointing": precision == "float16"}
        ran = bench.run("train", bench.job(method=method, hyperparameters=hyper), output=str(bench.folder / precision))
        assert ran.code == 0, ran.result.message
        assert ran.result.resolved is not None
        found[precision] = curve(bench.folder / precision)
        trained = load_file(next((bench.folder / precision / "artifact").glob("*.safetensors")))
        assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    exact, rounded = found["float32"], found["float16"]
    assert [row["loss"] for row in rounded] != [row["loss"] for row in exact]
    for name, tolerance in (("loss", 0.01), ("gradientNorm", 0.1)):
        values = [[float(row[name]) for row in rows] for rows in (rounded, exact)]
        assert values[0] == pytest.approx(values[1], rel=tolerance)


def test_an_overflow_costs_no_step(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    job = bench.job(hyperparameters=HYPER | {"precision": "float16"})
    assert bench.run("train", job, output=str(bench.folder / "calm")).code == 0
    scales: list[LossScale] = []

    def first() -> LossScale:
        scales.append(LossScale(factor=2.0**30))
        return scales[-1]

    monkeypatch.setattr(loop, "LossScale", first)
    assert bench.run("train", job, output=str(bench.folder / "stormy")).code == 0
    assert scales[0].factor < 2.0**30
    calm, stormy = curve(bench.folder / "calm"), curve(bench.folder / "stormy")
    assert [row["tokens"] for row in stormy] == [row["tokens"] for row in calm]
    assert [float(row["loss"]) for row in stormy] == pytest.approx([float(row["loss"]) for row in calm], rel=1e-3)


def test_a_resumed_run_has_the_factor(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "_HIGHEST", 2.0**30)
    monkeypatch.setattr(loss_scale, "_GROWTH_STEPS", 2)
    monkeypatch.setattr(loop, "LossScale", partial(LossScale, factor=2.0**24))
    method = {"lora": {"rank": 4, "alpha": 8, "dropout": 0.1}}
    job = bench.job(
        chat_rows(24),
        method=method,
        hyperparameters=HYPER | {"precision": "float16"},
        checkpoint={"everySteps": 3, "keep": 5},
    )
    assert bench.run("train", job).code == 0
    weights, metrics = bench.output / "artifact/adapter_model.safetensors", bench.output / "metrics.csv"
    whole = weights.read_bytes(), metrics.read_bytes()
    *_, middle, last = sorted((bench.output / "checkpoints").glob("step-*"))
    saved = json.loads((middle / "run.json").read_text())["lossScale"]
    assert saved["factor"] < 2.0**24
    for lost in (bench.output / "artifact", last):
        shutil.rmtree(lost)
    assert bench.run("train", job).result.resumed_from_step == 3
    assert (weights.read_bytes(), metrics.read_bytes()) == whole


def test_gpus_before_ampere_emulate_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not emulates_bfloat16(torch.device("cpu"))
    for capability, emulates in (((7, 0), True), ((7, 5), True), ((8, 0), False), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert emulates_bfloat16(torch.device("cuda", 0)) is emulates


def test_a_loss_that_is_not_finite_is_not_repeated(bench: Workbench) -> None:
    hyper = HYPER | {"precision": "float16", "learningRate": 1.0, "warmupSteps": 0, "maxGradNorm": 0, "maxSteps": 40}
    ran = bench.run("train", bench.job(method={"lora": {"alpha": 4096}}, hyperparameters=hyper))
    assert (ran.code, ran.result.reason) == (2, "LossDiverged")
