from __future__ import annotations

import csv
import hashlib
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from tests.trainer.s3server import free_port
from tests.trainer.trainer_rig import Workbench, chat_rows, job_manifest, write_rows
from tunesmith.api.conditions import FailureReason
from tunesmith.contracts.artifact import ArtifactManifest, digest_of
from tunesmith.contracts.fingerprint import LocalModelFolder, base_fingerprint
from tunesmith.contracts.progress import parse_progress
from tunesmith.contracts.result import Outcome, TrainerResult

METHODS = {
    "lora": {"lora": {"rank": 4, "alpha": 8}},
    "qlora": {"qlora": {"rank": 4, "alpha": 8, "targetModules": ["q_proj", "v_proj"]}},
}


def test_validate_counts_and_decides(bench: Workbench, base_model: Path) -> None:
    rows = [
        *chat_rows(20),
        {"messages": [{"role": "user", "content": "why " * 200}, {"role": "assistant", "content": "no"}]},
    ]
    job = bench.job(rows, hyperparameters={"epochs": 2})
    job["spec"]["dataset"]["maxLength"] = 128
    ran = bench.run("validate", job)
    assert ran.code == 0
    counted, resolved = ran.result.preflight, ran.result.resolved
    assert counted is not None
    assert resolved is not None
    assert (counted.rows, counted.validation_rows, counted.dropped_rows) == (18, 2, 1)
    # 2 layers of q, o (64→64), k, v (64→32), gate, up (64→128), down (128→64), each with rank × (in + out)
    assert counted.trainable_parameters == 2 * 4 * (2 * 128 + 2 * 96 + 3 * 192)
    assert resolved.base_model_fingerprint == base_fingerprint(LocalModelFolder(base_model))
    assert (resolved.learning_rate, resolved.batch_size, resolved.micro_batch_size) == (2e-4, 8, 8)
    assert resolved.total_steps == 6  # two epochs of ceil(18 / 8)
    assert resolved.target_modules == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.mark.parametrize("method", METHODS)
def test_a_trained_adapter_reloads_in_plain_peft_with_the_same_loss(
    bench: Workbench, base_model: Path, method: str
) -> None:
    validation = write_rows(bench.folder / "validation.jsonl", chat_rows(4))
    job = bench.job(
        method=METHODS[method],
        hyperparameters={"maxSteps": 6, "batchSize": 4, "microBatchSize": 2, "learningRate": 0.02},
    )
    job["spec"]["dataset"]["validation"] = [{"uri": f"file://{validation}"}]
    ran = bench.run("train", job)
    assert ran.code == 0, ran.result.message
    evaluation = ran.result.evaluation
    assert evaluation is not None
    assert evaluation.loss is not None
    assert evaluation.base_loss is not None
    assert evaluation.loss < evaluation.base_loss

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(
        base_model,
        dtype=torch.float32,
        **({"quantization_config": quantization, "device_map": {"": "cpu"}} if method == "qlora" else {}),
    )
    folder = bench.output / "artifact"
    adapter = PeftModel.from_pretrained(base, folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for row in chat_rows(4):
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        prompt = tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text.rstrip("\n"), add_special_tokens=False, return_tensors="pt")["input_ids"]
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            scores = torch.log_softmax(adapter(input_ids=ids).logits[0], dim=-1)
        chosen = ids[0, start:]
        total -= float(scores[start - 1 : -1].gather(1, chosen[:, None]).sum())
        count += len(chosen)
    assert total / count == pytest.approx(evaluation.loss, abs=2e-4)


def test_the_artifact_matches_its_manifest(bench: Workbench, base_model: Path) -> None:
    ran = bench.run("train", bench.job())
    folder = bench.output / "artifact"
    data = (folder / "tunesmith.json").read_bytes()
    manifest = ArtifactManifest.model_validate_json(data)
    artifact = ran.result.artifact
    assert artifact is not None
    assert artifact.digest == digest_of(data)
    assert artifact.uri == f"file://{folder}"
    present = {file.name for file in folder.iterdir()}
    assert present == {*manifest.files, "tunesmith.json"}
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "evaluation.json",
        "metrics.csv",
        "README.md",
    } <= present
    for name, file in manifest.files.items():
        content = (folder / name).read_bytes()
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (file.sha256, file.size_bytes)
    assert artifact.size_bytes == sum(file.stat().st_size for file in folder.iterdir())
    assert manifest.base.fingerprint == base_fingerprint(LocalModelFolder(base_model))
    assert (manifest.adapter.method, manifest.adapter.rank, manifest.adapter.alpha) == ("lora", 4, 8)
    assert manifest.servable.vllm
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base_model)
    assert manifest.base.uri == f"file://{base_model}"
    assert set(load_file(folder / "adapter_model.safetensors")) == {
        f"base_model.model.model.layers.{layer}.{module}.lora_{matrix}.weight"
        for layer in range(2)
        for module in (
            *(f"self_attn.{name}_proj" for name in "qkvo"),
            *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        )
        for matrix in "AB"
    }
    assert (folder / "tokenizer.json").read_bytes() == (base_model / "tokenizer.json").read_bytes()


def test_the_same_job_gives_the_same_bytes(bench: Workbench) -> None:
    job = bench.job(
        hyperparameters={"maxSteps": 3, "batchSize": 4, "seed": 5}, method={"lora": {"rank": 4, "dropout": 0.1}}
    )
    first = bench.run("train", job, output=str(bench.folder / "one")).result.artifact
    second = bench.run("train", job, output=str(bench.folder / "two")).result.artifact
    job["spec"]["hyperparameters"]["seed"] = 6
    third = bench.run("train", job, output=str(bench.folder / "three")).result.artifact
    assert first is not None
    assert second is not None
    assert third is not None
    assert first.digest == second.digest
    assert first.digest != third.digest


def test_a_second_attempt_finds_the_artifact_and_does_not_train(bench: Workbench) -> None:
    job = bench.job()
    first = bench.run("train", job)
    weights = bench.output / "artifact/adapter_model.safetensors"
    written = weights.stat().st_mtime_ns
    (bench.folder / "train.jsonl").unlink()  # training again would need it
    second = bench.run("train", job)
    assert second.code == 0
    assert second.result.artifact == first.result.artifact
    assert second.result.evaluation == first.result.evaluation
    assert second.result.metrics == first.result.metrics
    assert "an earlier attempt has already published this artifact" in second.result.message
    assert weights.stat().st_mtime_ns == written


def test_a_folder_with_another_jobs_artifact_is_refused(bench: Workbench) -> None:
    assert bench.run("train", bench.job()).code == 0
    other = bench.run("train", bench.job(hyperparameters={"maxSteps": 2}))
    assert (other.code, other.result.reason) == (2, FailureReason.INVALID_SPEC)
    assert "already contains the artifact of another spec" in other.result.message


def test_micro_batches_do_not_change_the_result(bench: Workbench) -> None:
    losses = []
    for micro in (1, 4):
        hyper = {"maxSteps": 3, "batchSize": 4, "microBatchSize": micro, "learningRate": 0.01}
        ran = bench.run("train", bench.job(hyperparameters=hyper), output=str(bench.folder / f"micro-{micro}"))
        with (bench.folder / f"micro-{micro}/metrics.csv").open() as file:
            losses.append([float(row["loss"]) for row in csv.DictReader(file) if row["loss"]])
        assert ran.code == 0
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_prompt_and_completion_rows_train(bench: Workbench) -> None:
    rows = [{"prompt": f"Door {number} is", "completion": " green"} for number in range(8)]
    ran = bench.run("train", bench.job(rows))
    assert ran.code == 0
    assert ran.result.preflight is not None
    assert (ran.result.preflight.rows, ran.result.preflight.validation_rows) == (7, 1)


@pytest.mark.parametrize(("damage", "expected"), [(math.nan, "before the first step"), (1e30, "at step 1")])
def test_a_loss_that_is_not_finite_stops_the_job(
    bench: Workbench, base_model: Path, damage: float, expected: str
) -> None:
    damaged = bench.folder / "damaged"
    shutil.copytree(base_model, damaged)
    tensors = load_file(damaged / "model.safetensors")
    if math.isnan(damage):
        tensors["model.norm.weight"] *= damage
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    hyper = {"maxSteps": 8, "batchSize": 4, "learningRate": 1.0, "maxGradNorm": 0.0, "warmupRatio": 0.0}
    method = {"lora": {"rank": 4, "alpha": 4096}}
    job = bench.job(baseModel={"uri": f"file://{damaged}"}, hyperparameters=hyper, method=method)
    ran = bench.run("train", job)
    if math.isnan(damage):
        assert (ran.code, ran.result.reason) == (2, FailureReason.LOSS_DIVERGED)
        assert expected in ran.result.message
    else:
        # Exploding without a NaN may finish; it must never be reported as a success with a loss that is not finite.
        assert ran.code in (0, 2)
        assert ran.result.evaluation is None or math.isfinite(ran.result.evaluation.loss or math.nan)


def test_json_output_ends_with_the_result(bench: Workbench) -> None:
    ran = bench.run("train", bench.job(), "-o", "json")
    documents = [json.loads(line) for line in ran.lines]
    artifact = ran.result.artifact
    assert artifact is not None
    assert set(documents[-1]) == {"outcome", "reason", "message", "artifact", "metrics"}
    assert documents[-1]["outcome"] == "Succeeded"
    assert documents[-1]["artifact"] == {"uri": artifact.uri, "digest": artifact.digest}
    assert set(documents[-1]["metrics"]) == {"baseEvaluationLoss", "evaluationLoss"}
    steps = [document for document in documents[:-1] if document["stage"] == "Training" and document.get("loss")]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert {
        "totalSteps",
        "epoch",
        "learningRate",
        "tokensPerSecond",
        "memoryBytes",
        "etaSeconds",
        "updateTime",
    } <= set(steps[0])
    stages = list(dict.fromkeys(document["stage"] for document in documents[:-1]))
    assert (
        stages == ["Preparing", "Loading", "Evaluating", "Training", "Packaging", "Publishing"]
        or stages[0] == "Loading"
    )


def test_output_of_failed_runs_ends_with_the_result(bench: Workbench) -> None:
    ran = bench.run("validate", bench.job([]), "-o", "json")
    last = json.loads(ran.lines[-1])
    assert (last["outcome"], last["reason"], last["artifact"]) == ("Failed", "DatasetInvalid", None)


def test_text_output_has_lines_with_step_loss_and_eta(bench: Workbench) -> None:
    ran = bench.run("train", bench.job())
    step = r"  step 2/3 \(66 %\)  epoch 0\.\d  loss \d\.\d+  .*rate .* tok/s  \d+\.\d GB  ETA \d+ s"
    assert any(re.fullmatch(step, line) for line in ran.lines), ran.lines
    assert any(line.startswith("Succeeded: held-out loss ") for line in ran.lines)


def test_progress_and_metrics_are_served_and_sigterm_stops_after_a_step(tmp_path: Path, base_model: Path) -> None:
    rows = write_rows(tmp_path / "train.jsonl", chat_rows(24))
    manifest = tmp_path / "job.yaml"
    hyper = {"maxSteps": 100_000, "batchSize": 4}
    often = {"everySteps": 1}
    job = job_manifest(f"file://{base_model}", f"file://{rows}", hyperparameters=hyper, evaluation=often)
    manifest.write_text(yaml.safe_dump(job))
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "tunesmith_trainer.main",
        "train",
        "--job",
        str(manifest),
        "--output",
        str(tmp_path / "out"),
        "--allow-file",
    ]
    command += ["--termination-message", str(tmp_path / "message"), "--progress-port", str(port)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        progress = _poll_progress(process, port, tmp_path / "log")
        assert progress.total_steps == 100_000
        assert progress.loss is not None
        assert progress.evaluation_loss is not None
        assert progress.eta_seconds
        metrics = _get(port, "/metrics").decode()
        assert re.search(r"^tunesmith_trainer_step \d+\.0$", metrics, re.MULTILINE)
        assert 'tunesmith_trainer_stage{stage="Training"} 1' in metrics
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 143
    finally:
        process.kill()
        process.wait()
    result = TrainerResult.model_validate_json((tmp_path / "message").read_text())
    assert result.outcome is Outcome.PREEMPTED
    assert re.match(r"stopped by SIGTERM at step \d+ of 100000; the checkpoint of step \d+ is in ", result.message)
    assert not (tmp_path / "out/artifact").exists()


def _get(port: int, path: str) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
        body: bytes = response.read()
        return body


def _poll_progress(process: subprocess.Popen[bytes], port: int, log: Path) -> Any:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            progress = parse_progress(_get(port, "/progress"))
        except OSError:
            progress = None
        if progress is not None and (progress.step or 0) > 1:
            return progress
        time.sleep(0.1)
    pytest.fail(f"no step within three minutes: {log.read_text()}")


@pytest.mark.long
def test_a_real_model_learns(bench: Workbench, smollm2: Path) -> None:
    data = Path(__file__).parents[2] / "examples/data"
    validation = bench.folder / "validation.jsonl"
    validation.write_text("".join((data / "validation.jsonl").read_text().splitlines(keepends=True)[:6]))
    job = bench.job(
        baseModel={"uri": f"file://{smollm2}"},
        dataset={
            "train": [{"uri": f"file://{data}/train.jsonl"}],
            "validation": [{"uri": f"file://{validation}"}],
        },
        hyperparameters={"maxSteps": 6, "batchSize": 4, "learningRate": 2e-3, "warmupRatio": 0.0},
        method={"lora": {"rank": 8, "alpha": 16}},
    )
    ran = bench.run("train", job)
    assert ran.code == 0, ran.result.message
    assert ran.result.evaluation is not None
    assert (ran.result.evaluation.loss_reduction_percent or 0) > 10
