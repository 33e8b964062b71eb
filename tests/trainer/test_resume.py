from __future__ import annotations

import csv
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from trainer_rig import chat_rows, job_manifest, write_rows

from tunesmith.contracts.result import Outcome, TrainerResult

if TYPE_CHECKING:
    from pathlib import Path

STEPS = 30
EVERY = 4
KILLS = int(os.environ.get("TUNESMITH_RESUME_KILLS", "1"))


@dataclass
class Run:
    """The trainer's command as a process of its own."""

    folder: Path
    manifest: Path

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tunesmith_trainer.main", "train", "--job", str(self.manifest)]
        command += ["--output", str(self.output), "--allow-file", "--progress-port", "0"]
        command += ["--termination-message", str(self.folder / "message")]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def result(self) -> TrainerResult:
        return TrainerResult.model_validate_json((self.folder / "message").read_text())

    def finish(self) -> str:
        process = self.start()
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out
        return out

    def interrupt(self, number: int, step: int, delay: float) -> tuple[int, str]:
        """Sends the signal `delay` seconds after the step is told; the exit code and the output."""
        process = self.start()
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if re.match(rf"  step {step}/", line):
                break
        time.sleep(delay)  # anywhere within a step or a write
        process.send_signal(number)
        out, _ = process.communicate(timeout=120)
        return process.returncode, "".join(lines) + out


def manifest(folder: Path, base_model: Path, **spec: Any) -> Path:
    rows = write_rows(folder / "train.jsonl", chat_rows(24))
    parts = {
        "method": {"lora": {"rank": 4, "alpha": 8, "dropout": 0.1}},
        "hyperparameters": {"maxSteps": STEPS, "batchSize": 16, "microBatchSize": 1, "learningRate": 0.01},
        "checkpoint": {"everySteps": EVERY},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job_manifest(f"file://{base_model}", f"file://{rows}", **(parts | spec))))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> Run:
    """A run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run = Run(folder, manifest(folder, base_model))
    run.finish()
    return run


def same(one: Run, other: Run) -> None:
    name = "artifact/adapter_model.safetensors"
    assert (one.output / name).read_bytes() == (other.output / name).read_bytes()
    curves = [list(csv.DictReader((run.output / "metrics.csv").open())) for run in (one, other)]
    assert curves[0] == curves[1]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize("seed", range(KILLS))
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, whole: Run, number: signal.Signals, seed: int
) -> None:
    chance = random.Random(seed)  # noqa: S311 - reproducible on purpose
    run = Run(tmp_path, whole.manifest)
    step = chance.randint(1, STEPS - 2)
    code, out = run.interrupt(number, step, chance.random() * 0.1)
    seen = max(int(found) for found in re.findall(r"  step (\d+)/", out))
    if number == signal.SIGTERM and code == 143:
        assert run.result().outcome is Outcome.PREEMPTED
        assert f"at step {seen} of {STEPS}" in run.result().message
        assert "run the same command again" in run.result().message
    elif number == signal.SIGKILL:
        assert code == -signal.SIGKILL
    again = run.finish()
    if "an earlier attempt published" in again:  # the signal came too late
        same(run, whole)
        return
    resumed = run.result().resumed_from_step or 0
    assert resumed >= (seen if number == signal.SIGTERM else seen - EVERY), again
    if resumed:
        assert f"resumed from the checkpoint of step {resumed}" in again
    same(run, whole)


def test_a_damaged_checkpoint_is_not_used(tmp_path: Path, whole: Run) -> None:
    run = Run(tmp_path, whole.manifest)
    run.interrupt(signal.SIGKILL, 3 * EVERY, 0.3)
    steps = sorted((run.output / "checkpoints").glob("step-*"))
    assert len(steps) == 2
    weights = steps[-1] / "trainable.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    out = run.finish()
    assert "is damaged and not used: the content of trainable.safetensors changed" in out
    assert run.result().resumed_from_step == int(steps[0].name[5:])
    same(run, whole)


def test_the_checkpoints_of_another_job_are_refused(tmp_path: Path, base_model: Path, whole: Run) -> None:
    run = Run(tmp_path, manifest(tmp_path, base_model, hyperparameters={"maxSteps": 5, "batchSize": 4}))
    shutil.copytree(whole.output / "checkpoints", run.output / "checkpoints")
    process = run.start()
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 2, out
    assert "holds checkpoints of another spec" in run.result().message
