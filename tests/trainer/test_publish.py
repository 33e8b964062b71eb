"""The published weights are those with the lowest held-out loss, and training stops once that has stopped falling."""

from __future__ import annotations

import csv
import errno
import math
import re
import shutil
import signal
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.pods import assert_equal, pods
from tests.trainer.trainer_rig import chat_row, chat_rows, write_rows
from tunesmith.api.evaluation import EarlyStopping, Publish
from tunesmith_trainer.errors import OutOfDiskError
from tunesmith_trainer.process.ranks import Ranks
from tunesmith_trainer.reporting.curve import CurvePoint
from tunesmith_trainer.training.best import BestWeights
from tunesmith_trainer.training.stopping import patience_exhausted, stops_early

if TYPE_CHECKING:
    from pathlib import Path

    from tests.trainer.trainer_rig import Workbench

STEPS = 12
HYPER = {"maxSteps": STEPS, "batchSize": 8, "learningRate": 0.03, "scheduler": "Constant", "warmupSteps": 0}
METHOD = {"lora": {"rank": 4, "alpha": 8, "dropout": 0.1}}
WEIGHTS = "artifact/adapter_model.safetensors"


def overfitting(folder: Path, **evaluation: Any) -> dict[str, Any]:
    """Return the parts of a job that learns the form of the held-out answers first, and then that they are wrong."""
    train = write_rows(folder / "train.jsonl", chat_rows(24))
    others = [chat_row(f"What is the colour of door {number}?", "It is red, as in Hollow.") for number in range(6)]
    held_out = write_rows(folder / "held-out.jsonl", others)
    return {
        "dataset": {"train": [{"uri": f"file://{train}"}], "validation": [{"uri": f"file://{held_out}"}]},
        "hyperparameters": HYPER,
        "method": METHOD,
        "evaluation": {"everySteps": 1} | evaluation,
    }


def held_out_losses(output: Path) -> dict[int, float]:
    """Return the adapter's held-out losses by step."""
    with (output / "metrics.csv").open() as file:
        points = [row for row in csv.DictReader(file) if row["evaluationLoss"] and row["step"] != "0"]
    losses = {int(row["step"]): float(row["evaluationLoss"]) for row in points}
    assert len(losses) == len(points)
    return losses


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "expected"),
    [
        ([], 1, 0.0, False),
        ([3.0], 1, 0.0, False),
        ([3.0, 3.0], 1, 0.0, True),
        ([3.0, 2.0, 2.5], 2, 0.0, False),
        ([3.0, 2.0, 2.5, 2.0], 2, 0.0, True),
        ([3.0, 2.0, 2.5, 1.9], 2, 0.0, False),
        ([3.0, 2.9, 2.8, 2.7], 2, 0.2, False),
        ([3.0, 2.95, 2.9], 2, 0.2, True),
        ([math.nan, math.inf], 2, 0.0, True),
    ],
)
def test_training_stops_after_so_many_losses_without_an_improvement(
    losses: list[float], patience: int, min_delta: float, *, expected: bool
) -> None:
    assert patience_exhausted(losses, patience, min_delta) is expected


def test_only_the_adapters_losses_count() -> None:
    curve = [CurvePoint(0, 0.0, evaluation_loss=1.0), CurvePoint(1, 0.1, loss=2.0), CurvePoint(1, 0.1, None)]
    assert not stops_early(EarlyStopping(patience=1), curve)
    assert not stops_early(None, curve)


def test_the_first_of_equal_losses_wins_and_one_that_is_not_finite_never(tmp_path: Path) -> None:
    model = torch.nn.Linear(1, 1)
    best = BestWeights(model, tmp_path, Ranks(), sharded=False)
    for step, loss in enumerate([math.nan, math.inf, 2.0, 1.0, 1.0, math.nan, 3.0], start=1):
        torch.nn.init.constant_(model.bias, step)
        best.offer(step, loss)
    assert (best.step, best.loss) == (4, 1.0)
    best.load()
    assert model.bias.item() == 4
    assert len(list(tmp_path.iterdir())) == 1


def test_a_disk_without_room_for_the_best_weights_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tunesmith_trainer.training.best.save_file", full)
    expected = f"the disk of {tmp_path} is full; use nodes with larger disks, or evaluation.publish: Last"
    with pytest.raises(OutOfDiskError, match=expected):
        BestWeights(torch.nn.Linear(1, 1), tmp_path, Ranks(), sharded=False).offer(1, 1.0)


def test_the_weights_with_the_lowest_held_out_loss_are_published(bench: Workbench) -> None:
    suites = [{"name": "rows", "heldOutLoss": {}}]
    gates = [{"suite": "rows", "metric": "Loss", "min": 0}]
    parts = overfitting(bench.folder, suites=suites, gates=gates)
    parts["output"] = {"merge": "Original"}  # compared with the trained model, as the adapter loaded again is
    ran = bench.run("train", bench.job(**parts))
    assert ran.code == 0, ran.result.message
    losses = held_out_losses(bench.output)
    step = min(losses, key=losses.__getitem__)
    assert list(losses) == list(range(1, STEPS + 1))
    assert 1 < step < STEPS
    found = ran.result.evaluation
    assert found is not None
    assert (found.published_step, found.stopped_early_at) == (step, None)
    assert found.loss == pytest.approx(losses[step], abs=1e-4)
    assert [(score.adapter, gate.value) for score, gate in zip(found.scores or [], found.gates or [], strict=True)] == [
        (found.loss, found.loss)
    ]
    assert f"(adapter of step {step})" in ran.result.message
    assert any(line.startswith(f"  the weights of step {step} are published") for line in ran.lines)
    card = (bench.output / "artifact/README.md").read_text(encoding="utf-8")
    assert f"| Steps, batch size | {STEPS}, published {step}, 8 |" in card
    assert ran.result.resolved is not None
    assert ran.result.resolved.publish is Publish.BEST

    # A run that ends with that step takes the same steps.
    parts |= {"hyperparameters": HYPER | {"maxSteps": step}, "evaluation": {"publish": "Last"}}
    shorter = bench.run("train", bench.job(**parts), output=str(bench.folder / "shorter"))
    assert shorter.code == 0, shorter.result.message
    assert shorter.result.evaluation is not None
    assert shorter.result.evaluation.published_step == step
    expected, weights = (load_file(folder / WEIGHTS) for folder in (bench.folder / "shorter", bench.output))
    assert expected.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({}, Publish.BEST),
        ({"evaluation": {"publish": "Last"}}, Publish.LAST),
        ({"method": {"adaLora": {}}}, Publish.LAST),
        ({"objective": {"kto": {}}}, Publish.LAST),
        ({"objective": {"kto": {}}, "evaluation": {"publish": "Best"}}, Publish.BEST),
    ],
)
def test_the_choice_is_reported(bench: Workbench, parts: dict[str, Any], expected: Publish) -> None:
    marked = [{"prompt": f"Door {n}?", "completion": " green", "label": n % 2 == 0} for n in range(20)]
    resolved = bench.run("validate", bench.job(marked if "objective" in parts else None, **parts)).result.resolved
    assert resolved is not None
    assert resolved.publish is expected


def test_ranks_that_are_not_final_are_not_published(bench: Workbench) -> None:
    for evaluation in ({"publish": "Best"}, {"earlyStopping": {}}):
        ran = bench.run("validate", bench.job(method={"adaLora": {}}, evaluation=evaluation))
        assert ran.code == 2
        assert "evaluation.earlyStopping do not support method.adaLora" in ran.result.message


def test_early_stopping_measures_the_loss_often_enough(bench: Workbench) -> None:
    rows = chat_rows(40)
    for evaluation, every in (({}, 14), ({"earlyStopping": {}}, 2)):
        job = bench.job(rows, hyperparameters={"maxSteps": 20, "batchSize": 1}, evaluation=evaluation)
        job["spec"]["dataset"]["validationFraction"] = 0.04
        resolved = bench.run("validate", job).result.resolved
        assert resolved is not None
        assert resolved.evaluation_every_steps == every, evaluation


def test_intervals_can_be_shares_of_the_run(bench: Workbench) -> None:
    parts = {"checkpoint": {"everyRatio": 0.3, "keep": 9}, "evaluation": {"everyRatio": 0.4}}
    ran = bench.run("train", bench.job(**parts, hyperparameters={"maxSteps": 10, "batchSize": 2}))
    assert ran.code == 0, ran.result.message
    assert sorted(folder.name for folder in (bench.output / "checkpoints").iterdir()) == [
        f"step-{step:08d}" for step in (3, 6, 9, 10)
    ]
    assert list(held_out_losses(bench.output)) == [4, 8, 10]
    assert ran.result.resolved is not None
    assert ran.result.resolved.evaluation_every_steps == 4


@pytest.mark.parametrize("publish", Publish)
def test_training_stops_early_and_resumes_to_the_same_result(bench: Workbench, publish: Publish) -> None:
    parts = overfitting(bench.folder, publish=publish.value, earlyStopping={"patience": 3})
    job = bench.job(**parts, checkpoint={"everySteps": 1, "keep": 100})
    ran = bench.run("train", job)
    assert ran.code == 0, ran.result.message
    losses = held_out_losses(bench.output)
    last, best = max(losses), min(losses, key=losses.__getitem__)
    assert last == best + 3 < STEPS
    found = ran.result.evaluation
    assert found is not None
    step = best if publish is Publish.BEST else last
    assert (found.published_step, found.stopped_early_at) == (step, last)
    assert found.loss == pytest.approx(losses[step], abs=1e-4)
    assert f"  stopped early after step {last} of {STEPS}: the held-out loss has stopped falling" in ran.lines
    assert ran.result.message.startswith(f"stopped early after step {last}; held-out loss ")
    card = (bench.output / "artifact/README.md").read_text(encoding="utf-8")
    assert f"| Steps, batch size | {STEPS}, stopped early after {last}" in card

    whole = bench.folder / "whole"
    bench.output.rename(whole)
    # Killed before an evaluation, at the best step, between it and the stop, and after the stop.
    for resumed in (1, best, best + 1, last):
        bench.output.mkdir()
        for saved in (whole / "checkpoints").iterdir():
            if int(saved.name.removeprefix("step-")) <= resumed:
                shutil.copytree(saved, bench.output / "checkpoints" / saved.name)
        again = bench.run("train", job)
        assert again.code == 0, again.result.message
        assert again.result.resumed_from_step == resumed
        assert again.result.evaluation == found
        for name in (WEIGHTS, "metrics.csv"):
            assert (bench.output / name).read_bytes() == (whole / name).read_bytes(), (resumed, name)
        shutil.rmtree(bench.output)


FULL = {"method": {"full": {}}, "hyperparameters": HYPER | {"learningRate": 0.02}}


@pytest.mark.parametrize(
    ("sharded", "parts"), [(False, {}), (True, {}), (True, FULL)], ids=["DDP", "FSDP2", "FSDP2, all weights"]
)
def test_all_ranks_stop_and_publish_the_same_step(
    tmp_path: Path, base_model: Path, parts: dict[str, Any], *, sharded: bool
) -> None:
    job = overfitting(tmp_path, earlyStopping={"patience": 2}) | parts
    job["hyperparameters"] = job["hyperparameters"] | {"microBatchSize": 2}  # dropout depends on the micro-batches
    job["checkpoint"] = {"everySteps": 1}
    questions = write_rows(tmp_path / "questions.jsonl", chat_rows(2))
    generation = {"dataset": {"uri": f"file://{questions}"}, "maxNewTokens": 3}
    job["evaluation"]["suites"] = [{"name": "doors", "generation": generation}]
    resources = {"gpus": 0, "nodes": 2} | ({"dataParallelism": "FSDP2"} if sharded else {})
    one = pods(tmp_path / "one", base_model, 1, **job)
    two = pods(tmp_path / "two", base_model, 2, **job, resources=resources)
    one.finish()
    # The best weights come from a checkpoint of the first attempt.
    two.start()
    two.interrupt((1,), signal.SIGKILL, 2, 0.1)
    two.wait()
    two.finish()
    assert_equal(two, one)
    expected, found = one.result(0).evaluation, two.result(0).evaluation
    assert expected is not None
    assert found is not None
    assert (found.published_step, found.stopped_early_at) == (expected.published_step, expected.stopped_early_at)
    assert (found.published_step or 0) < (found.stopped_early_at or 0) < STEPS
    assert re.search(r"resumed from the checkpoint of step \d+", two.log(0))
