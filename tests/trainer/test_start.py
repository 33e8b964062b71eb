"""Training that starts from an adapter (spec.continueFrom)."""

from __future__ import annotations

import json
import random
import shutil
import signal
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.trainer.test_resume import KILLS, Run, same
from tests.trainer.trainer_rig import Workbench, chat_row, chat_rows, job_manifest, write_rows
from tunesmith.api.conditions import FailureReason
from tunesmith.contracts.artifact import digest_of, parse_manifest
from tunesmith.contracts.result import Outcome
from tunesmith_trainer.main import run as run_trainer
from tunesmith_trainer.store import file_sha256

if TYPE_CHECKING:
    from pathlib import Path

MORE = [chat_row(f"Who lives behind door {number}?", f"Number {number} is Wren's.") for number in range(16)]
WEIGHTS = "adapter_model.safetensors"


def trained(folder: Path, base_model: Path, **spec: Any) -> Path:
    """Train an adapter, and return the artifact's folder."""
    rows = write_rows(folder / "rows.jsonl", chat_rows(24))
    manifest = folder / "job.yaml"
    manifest.write_text(yaml.safe_dump(job_manifest(f"file://{base_model}", f"file://{rows}", **spec)))
    arguments = ["--output", str(folder / "out"), "--allow-file", "--progress-port", "0"]
    message = folder / "message"
    code = run_trainer(["train", "--job", str(manifest), *arguments, "--termination-message", str(message)])
    assert code == 0, message.read_text()
    return folder / "out" / "artifact"


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> Path:
    """Train an adapter, and return its folder."""
    return trained(tmp_path_factory.mktemp("first"), base_model)


@pytest.fixture
def copied(first: Path, tmp_path: Path) -> Path:
    """Copy that adapter, to damage the copy."""
    shutil.copytree(first, tmp_path / "copy")
    return tmp_path / "copy"


def source(artifact: Path, **more: str) -> dict[str, Any]:
    return {"artifact": {"uri": f"file://{artifact}", **more}}


def continued(bench: Workbench, artifact: Path, method: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    job = bench.job(spec.pop("rows", MORE), **({"continueFrom": source(artifact)} | spec))
    job["spec"]["method"] = method
    if method is None:
        del job["spec"]["method"]
    return job


def publish_again(artifact: Path) -> None:
    """Write the sizes and hashes of the changed files into the manifest."""
    manifest = json.loads((artifact / "tunesmith.json").read_bytes())
    for name in manifest["files"]:
        file = artifact / name
        manifest["files"][name] = {"sha256": file_sha256(file), "sizeBytes": file.stat().st_size}
    (artifact / "tunesmith.json").write_text(json.dumps(manifest))


def test_training_starts_from_the_adapter_and_records_its_lineage(
    bench: Workbench, first: Path, tmp_path: Path
) -> None:
    hyper = {"maxSteps": 3, "batchSize": 4, "learningRate": 1e-7}
    second = tmp_path / "second"
    ran = bench.run("train", continued(bench, first, rows=chat_rows(24), hyperparameters=hyper), output=str(second))
    assert ran.code == 0, ran.result.message
    published = parse_manifest((first / "tunesmith.json").read_bytes())
    assert ran.result.evaluation is not None
    assert published.evaluation is not None
    assert ran.result.evaluation.loss == pytest.approx(published.evaluation.loss, abs=1e-3)
    before, after = (load_file(folder / WEIGHTS) for folder in (first, second / "artifact"))
    assert before.keys() == after.keys()
    assert all((after[name] - before[name]).abs().max() < 1e-5 for name in before)
    digest = digest_of((first / "tunesmith.json").read_bytes())
    assert ran.result.resolved is not None
    assert ran.result.resolved.continued_from is not None
    lineage = {"uri": f"file://{first}", "digest": digest}
    assert ran.result.resolved.continued_from.manifest() == lineage
    assert (ran.result.resolved.method, ran.result.resolved.rank) == ("lora", 4)
    assert f"| Continued from | `file://{first}`, {digest} |" in (second / "artifact/README.md").read_text()

    third = continued(bench, second / "artifact", {"lora": {"rank": 4, "alpha": 8}})
    ran = bench.run("train", third)
    assert ran.code == 0, ran.result.message
    ancestors = parse_manifest((bench.output / "artifact/tunesmith.json").read_bytes()).continued_from
    assert ancestors is not None
    assert [ancestor.uri for ancestor in ancestors] == [f"file://{second}/artifact", f"file://{first}"]
    assert ancestors[1].digest == digest
    assert bench.run("train", third).result.message == "an earlier attempt has already published this artifact"


REFUSED: dict[str, tuple[dict[str, Any] | None, dict[str, Any], str]] = {
    "rank": ({"lora": {"rank": 8, "alpha": 8}}, {}, "rank is 8 in spec.method and 4 in the adapter"),
    "alpha": ({"lora": {"rank": 4}}, {}, "alpha is 32 in spec.method and 8 in the adapter"),
    "type": ({"promptTuning": {}}, {}, 'peft_type is "PROMPT_TUNING" in spec.method and "LORA" in the adapter'),
    "modules": (
        {"lora": {"rank": 4, "alpha": 8, "targetModules": ["q_proj"]}},
        {},
        "is in the adapter only: remove spec.method to use the adapter's, or make them agree",
    ),
    "dora": ({"lora": {"rank": 4, "alpha": 8, "dora": True}}, {}, "dora is true in spec.method and false in"),
    "full": ({"full": {}}, {}, "method.full trains none"),
    "initialization": ({"lora": {"rank": 4, "alpha": 8, "initialization": "PiSSA"}}, {}, "remove initialization"),
    "a job": (None, {"continueFrom": {"fineTuneJob": {"name": "wren"}}}, "use spec.continueFrom.artifact"),
    "both": (
        None,
        {"continueFrom": {"fineTuneJob": {"name": "doors"}, "artifact": {"uri": "s3://a/b"}}},
        "exactly one",
    ),
    "neither": (None, {"continueFrom": None}, "method is missing"),
    "digest": (None, {"digest": f"sha256:{64 * '0'}"}, f"instead of sha256:{64 * '0'}: it is another artifact"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_job_that_does_not_fit_the_adapter_is_refused(bench: Workbench, first: Path, case: str) -> None:
    method, spec, message = REFUSED[case]
    if "digest" in spec:
        spec = {"continueFrom": source(first, **spec)}
    job = continued(bench, first, method, **spec)
    job["spec"] = {name: value for name, value in job["spec"].items() if value is not None}
    ran = bench.run("validate", job)
    assert (ran.code, ran.result.reason) == (2, FailureReason.INVALID_SPEC)
    assert message in ran.result.message


def test_another_base_model_is_refused(bench: Workbench, copied: Path) -> None:
    manifest = json.loads((copied / "tunesmith.json").read_bytes())
    manifest["base"]["fingerprint"] = f"sha256:{64 * '1'}"
    (copied / "tunesmith.json").write_text(json.dumps(manifest))
    ran = bench.run("validate", continued(bench, copied))
    assert (ran.code, ran.result.reason) == (2, FailureReason.INVALID_SPEC)
    assert "the adapter was trained on another base model" in ran.result.message


def test_a_folder_without_an_artifact_is_refused(bench: Workbench, tmp_path: Path) -> None:
    ran = bench.run("validate", continued(bench, tmp_path))
    assert (ran.code, ran.result.reason) == (2, FailureReason.ADAPTER_NOT_FOUND)
    assert "has no tunesmith.json" in ran.result.message


PROBES: dict[str, dict[str, Any]] = {
    "tokens that the base does not have": {"promptTokenIds": [10**6]},
    "negative tokens": {"answerTokenIds": [-1]},
    "a prompt of 100,000 tokens": {"promptTokenIds": [1] * 100_000},
    "no probabilities": {"adapter": []},
}


@pytest.mark.parametrize("case", PROBES)
def test_recorded_answers_that_cannot_be_computed_are_refused(bench: Workbench, copied: Path, case: str) -> None:
    parity = json.loads((copied / "parity.json").read_text())
    parity["probes"][0] |= PROBES[case]
    (copied / "parity.json").write_text(json.dumps(parity))
    publish_again(copied)
    ran = bench.run("validate", continued(bench, copied))
    assert (ran.code, ran.result.reason) == (2, FailureReason.INVALID_SPEC)
    assert "parity.json of the adapter has no answers of this base model" in ran.result.message


def test_damaged_files_are_refused(bench: Workbench, copied: Path) -> None:
    weights = load_file(copied / WEIGHTS)
    name = next(iter(weights))
    save_file({**weights, name: torch.full_like(weights[name], float("nan"))}, copied / WEIGHTS)
    ran = bench.run("validate", continued(bench, copied))
    assert (ran.code, ran.result.reason) == (2, FailureReason.INVALID_SPEC)
    assert f"{WEIGHTS} was changed after it was published" in ran.result.message
    publish_again(copied)
    assert f"{name} has values that are not finite" in bench.run("validate", continued(bench, copied)).result.message
    (copied / WEIGHTS).write_bytes(b"not safetensors")
    publish_again(copied)
    assert "is not a safetensors file" in bench.run("validate", continued(bench, copied)).result.message


def test_an_adapter_with_other_answers_than_recorded_is_not_trained(bench: Workbench, copied: Path) -> None:
    weights = load_file(copied / WEIGHTS)
    save_file({name: 30 * tensor for name, tensor in weights.items()}, copied / WEIGHTS)
    publish_again(copied)
    ran = bench.run("train", continued(bench, copied))
    assert ran.result.outcome is Outcome.FAILED
    assert "parity.json recorded" in ran.result.message


@pytest.mark.parametrize(
    "method",
    [
        {"lora": {"rank": 2, "alpha": 4, "initialization": "PiSSA", "rsLora": True}},
        pytest.param({"lora": {"rank": 2, "dora": True, "rankPattern": {"q_proj": 4}}}, marks=pytest.mark.long),
        pytest.param({"ia3": {}}, marks=pytest.mark.long),
        pytest.param({"promptTuning": {"virtualTokens": 4}}, marks=pytest.mark.long),
        pytest.param({"prefixTuning": {"virtualTokens": 4}}, marks=pytest.mark.long),
        pytest.param({"peft": {"type": "VERA", "config": {"target_modules": ["q_proj"]}}}, marks=pytest.mark.long),
        pytest.param({"qlora": {"rank": 2}}, marks=pytest.mark.long),
    ],
    ids=lambda method: next(iter(method)),
)
def test_methods_continue(bench: Workbench, tmp_path: Path, base_model: Path, method: dict[str, Any]) -> None:
    folder = tmp_path / "first"
    folder.mkdir()
    artifact = trained(folder, base_model, method=method)
    ran = bench.run("train", continued(bench, artifact))
    assert ran.code == 0, ran.result.message
    shapes = [
        {name: tensor.shape for name, tensor in load_file(adapter / WEIGHTS).items()}
        for adapter in (artifact, bench.output / "artifact")
    ]
    assert shapes[0] == shapes[1]


STEPS = 12


def continuing(folder: Path, artifact: Path, base_model: Path) -> Run:
    """Return a job that continues an adapter, publishes its best step and stops early; a held-out loss per step."""
    folder.mkdir()
    rows = write_rows(folder / "more.jsonl", MORE)
    others = [chat_row(f"Who lives behind door {number}?", "It is red, as in Hollow.") for number in range(6)]
    held_out = write_rows(folder / "held-out.jsonl", others)
    job = job_manifest(
        f"file://{base_model}",
        f"file://{rows}",
        method={"lora": {"rank": 4, "alpha": 8, "dropout": 0.1}},
        hyperparameters={"maxSteps": STEPS, "batchSize": 8, "microBatchSize": 1, "learningRate": 0.02},
        checkpoint={"everySteps": 2},
        continueFrom=source(artifact),
        evaluation={"everySteps": 1, "publish": "Best", "earlyStopping": {"patience": 3}},
    )
    job["spec"]["dataset"]["validation"] = [{"uri": f"file://{held_out}"}]
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    return Run(folder, folder / "job.yaml")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, first: Path, base_model: Path) -> Run:
    """Return such a job that was never interrupted."""
    run = continuing(tmp_path_factory.mktemp("continued") / "whole", first, base_model)
    run.finish()
    return run


@pytest.mark.parametrize("seed", range(KILLS))
def test_a_killed_run_resumes_with_the_same_result(tmp_path: Path, whole: Run, seed: int) -> None:
    expected = whole.result().evaluation
    assert expected is not None
    assert (expected.published_step or 0) < (expected.stopped_early_at or 0) < STEPS
    chance = random.Random(seed)  # noqa: S311 - reproducible on purpose
    killed = Run(tmp_path, whole.manifest)
    # Before the best step is known, between it and the stop, or while the best weights are loaded and packaged.
    steps = sorted(chance.sample(range(1, (expected.stopped_early_at or 0) + 1), 2))
    for step in steps:
        killed.interrupt(signal.SIGKILL, step, chance.random() * 0.2)
    again = killed.finish()
    if killed.result().evaluation is not None:  # otherwise the last signal came after the end
        assert "resumed from the checkpoint of step" in again
        assert killed.result().evaluation == expected
    same(killed, whole)
