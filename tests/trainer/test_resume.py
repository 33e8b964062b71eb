from __future__ import annotations

import csv
import fcntl
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.trainer.chat_styles import share_prefixes
from tests.trainer.pods import ONE_THREAD, Container
from tests.trainer.s3server import S3Server
from tests.trainer.trainer_rig import chat_rows, job_manifest, write_rows
from tunesmith.api.conditions import FailureReason
from tunesmith.contracts.artifact import digest_of
from tunesmith.contracts.location import ARTIFACT_MANIFEST, artifact_uri, checkpoints_uri
from tunesmith.contracts.result import Outcome, TrainerResult

if TYPE_CHECKING:
    from collections.abc import Iterator

STEPS = 30
EVERY = 4
SECONDS = 300.0
"""Time limit of a run, which may compile layers."""
PIPE_BYTES = 4096
KILLS = int(os.environ.get("TUNESMITH_RESUME_KILLS", "1"))


@dataclass
class Run:
    """Attempts of one job, each in its own process."""

    folder: Path
    manifest: Path
    places: tuple[str, ...] = ()
    """Options for the folders of the artifact and the checkpoints; empty: local folders."""
    environment: dict[str, str] = field(default_factory=dict)
    started: list[Container] = field(default_factory=list)

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def arguments(self) -> list[str]:
        arguments = ["train", "--job", str(self.manifest), "--allow-file", "--progress-port", "0"]
        arguments += self.places or ("--output", str(self.output))
        return [*arguments, "--termination-message", str(self.folder / "message")]

    def start(self) -> Container:
        log = self.folder / f"log-{len(self.started)}"
        self.started.append(Container(self.arguments(), self.environment, log, seconds=SECONDS))
        return self.started[-1]

    def result(self) -> TrainerResult:
        return TrainerResult.model_validate_json((self.folder / "message").read_text())

    def finish(self) -> str:
        container = self.start()
        assert container.wait() == 0, container.output()
        return container.output()

    def interrupt(self, number: int, step: int, delay: float) -> tuple[int | None, str]:
        """Send the signal `delay` seconds after the step is reported; return the exit code and the output."""
        container = self.start()
        container.wait_for_output(step_of(step))
        time.sleep(delay)  # at any point of a step or a write
        container.signal(number)
        return container.wait(), container.output()


def step_of(number: int) -> str:
    """Return the start of the line of a step."""
    return f"  step {number}/"


def manifest(folder: Path, base_model: Path, **spec: Any) -> Path:
    rows = write_rows(folder / "train.jsonl", chat_rows(24))
    parts = {
        "method": {"lora": {"rank": 4, "alpha": 8, "dropout": 0.1}},
        "hyperparameters": {"maxSteps": STEPS, "batchSize": 8, "microBatchSize": 1, "learningRate": 0.01},
        "checkpoint": {"everySteps": EVERY},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job_manifest(f"file://{base_model}", f"file://{rows}", **(parts | spec))))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> Run:
    """Return a run that was never interrupted, with the installed command, whose hash seed differs from the others'."""
    folder = tmp_path_factory.mktemp("whole")
    run = Run(folder, manifest(folder, base_model))
    trainer = Path(sysconfig.get_path("scripts"), "tunesmith-trainer")
    subprocess.run([trainer, *run.arguments()], env=os.environ | ONE_THREAD, check=True, timeout=SECONDS)
    return run


def same(run: Run, expected: Run) -> None:
    name = "artifact/adapter_model.safetensors"
    assert (run.output / name).read_bytes() == (expected.output / name).read_bytes()
    curves = [list(csv.DictReader((attempt.output / "metrics.csv").open())) for attempt in (run, expected)]
    assert curves[0] == curves[1]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize("seed", range(KILLS))
def test_a_killed_run_resumes_with_the_same_result(
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
    if "an earlier attempt has already published this artifact" in again:  # the signal came too late
        same(run, whole)
        return
    resumed = run.result().resumed_from_step or 0
    assert resumed >= (seen if number == signal.SIGTERM else seen - EVERY), again
    if resumed:
        assert f"resumed from the checkpoint of step {resumed}" in again
    same(run, whole)


@pytest.mark.long
def test_a_killed_run_in_float16_resumes_with_the_same_bits(tmp_path: Path, base_model: Path) -> None:
    hyper = {"maxSteps": STEPS, "batchSize": 8, "microBatchSize": 1, "learningRate": 0.01, "precision": "float16"}
    path = manifest(tmp_path, base_model, hyperparameters=hyper)
    runs = [Run(tmp_path / name, path) for name in ("whole", "killed")]
    for run in runs:
        run.folder.mkdir()
    runs[0].finish()
    runs[1].interrupt(signal.SIGKILL, 3 * EVERY, 0.3)
    assert "resumed from the checkpoint of step" in runs[1].finish()
    same(runs[1], runs[0])


@pytest.mark.long
def test_a_killed_run_with_compiled_layers_resumes_with_the_same_bits(tmp_path: Path, base_model: Path) -> None:
    hyper = {"maxSteps": STEPS, "batchSize": 16, "microBatchSize": 4, "learningRate": 0.01, "torchCompile": True}
    path = manifest(tmp_path, base_model, hyperparameters=hyper)
    runs = [Run(tmp_path / name, path) for name in ("whole", "killed")]
    for run in runs:
        run.folder.mkdir()
    assert "compiled" in runs[0].finish()
    runs[1].interrupt(signal.SIGKILL, 3 * EVERY, 0.3)
    again = runs[1].finish()
    assert "compiled" in again
    assert "resumed from the checkpoint of step" in again
    same(runs[1], runs[0])


@pytest.mark.long
def test_a_killed_run_that_shares_prefixes_resumes_with_the_same_bits(tmp_path: Path, base_model: Path) -> None:
    path = manifest(tmp_path, base_model)
    share_prefixes(path)
    runs = [Run(tmp_path / name, path) for name in ("whole", "killed")]
    for run in runs:
        run.folder.mkdir()
    assert "tokens that rows of a chat have in common are computed once" in runs[0].finish()
    runs[1].interrupt(signal.SIGKILL, 3 * EVERY, 0.3)
    assert "resumed from the checkpoint of step" in runs[1].finish()
    same(runs[1], runs[0])


def test_a_damaged_checkpoint_is_not_used(tmp_path: Path, whole: Run) -> None:
    run = Run(tmp_path, whole.manifest)
    run.interrupt(signal.SIGKILL, 3 * EVERY, 0.3)
    # Two are kept, and a third one exists until the oldest is removed.
    *_, older, newest = sorted((run.output / "checkpoints").glob("step-*"))
    weights = newest / "trainable.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    out = run.finish()
    assert "is damaged and will not be used: the content of trainable.safetensors changed" in out
    assert run.result().resumed_from_step == int(older.name[5:])
    same(run, whole)


def test_the_checkpoints_of_another_job_are_refused(tmp_path: Path, base_model: Path, whole: Run) -> None:
    run = Run(tmp_path, manifest(tmp_path, base_model, hyperparameters={"maxSteps": 5, "batchSize": 4}))
    shutil.copytree(whole.output / "checkpoints", run.output / "checkpoints")
    container = run.start()
    assert container.wait() == 2, container.output()
    assert "holds checkpoints of another spec" in run.result().message


@pytest.fixture
def store(tmp_path: Path) -> Iterator[S3Server]:
    with S3Server(tmp_path / "s3") as server:
        yield server


@pytest.fixture
def attempts(tmp_path: Path, whole: Run, store: S3Server) -> Iterator[list[Run]]:
    """Return three attempts of one job, as in pods: they share nothing but the store."""
    place = ("s3://tunesmith/store", "default", "doors", "1")
    places = ("--output", artifact_uri(*place), "--checkpoints", checkpoints_uri(*place))
    folders = [tmp_path / f"attempt-{number}" for number in (1, 2, 3)]
    for folder in folders:
        folder.mkdir()
    runs = [Run(folder, whole.manifest, places, store.environment()) for folder in folders]
    yield runs
    for run in runs:
        for container in run.started:
            container.signal(signal.SIGKILL)
            container.wait()


def test_nothing_is_lost_by_an_outage_a_signal_and_a_kill_before_the_report(
    attempts: list[Run], whole: Run, store: S3Server
) -> None:
    first, second, third = attempts
    artifact, checkpoints = first.places[1].removeprefix("s3://"), first.places[3]
    container = first.start()
    container.wait_for_output(step_of(2))
    store.stop()
    container.wait_for_output(step_of(2 * EVERY))  # two checkpoints are due meanwhile
    store.start()
    container.wait_for_output(step_of(3 * EVERY))
    container.signal(signal.SIGTERM)
    assert container.wait() == 143, container.output()
    message = first.result().message
    saved = re.search(rf"at step (\d+) of {STEPS}; the checkpoint of step (\d+) is in {checkpoints}", message)
    assert saved is not None, message
    assert saved[1] == saved[2], container.output()
    assert int(saved[1]) >= 3 * EVERY

    # Nobody reads its reports, so it blocks until it is killed.
    os.mkfifo(second.folder / "message")
    store.stop()
    container = second.start()
    container.wait_for_output(r".*\n")
    assert "could not be reached" in container.output().splitlines()[0]
    store.start()
    filesystem = store.filesystem()
    deadline = time.monotonic() + 120
    while not filesystem.exists(f"{artifact}/{ARTIFACT_MANIFEST}"):
        assert container.is_alive(), container.output()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    container.signal(signal.SIGKILL)
    container.wait()
    assert f"resumed from the checkpoint of step {saved[1]}" in container.output()
    assert "Succeeded" not in container.output()

    out = third.finish()
    assert "an earlier attempt has already published this artifact" in out
    reported = third.result().artifact
    assert reported is not None
    assert reported.digest == digest_of(filesystem.cat_file(f"{artifact}/{ARTIFACT_MANIFEST}"))
    weights = filesystem.cat_file(f"{artifact}/adapter_model.safetensors")
    assert weights == (whole.output / "artifact/adapter_model.safetensors").read_bytes()
    assert not filesystem.exists(checkpoints)


IMPATIENT = (
    "from tunesmith_trainer.training import watchdog; watchdog.MIN_STEP_SECONDS = 2.0;"
    "from tunesmith_trainer.main import main; main()"
)
"""The trainer's command, with a step limit that spares the test a wait of five minutes."""


def test_a_step_that_hangs_stops_the_attempt(tmp_path: Path, whole: Run) -> None:
    """The reader of its output has stopped reading, as a container runtime may: the main thread waits forever."""
    run = Run(tmp_path, whole.manifest)
    unread, output = os.pipe()
    fcntl.fcntl(output, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    os.write(output, b"." * (PIPE_BYTES - 1000))
    process = subprocess.Popen(
        [sys.executable, "-c", IMPATIENT, *run.arguments()], stdout=output, env=os.environ | ONE_THREAD
    )
    try:
        assert process.wait(timeout=120) == 3
    finally:
        process.kill()
        process.wait()
        os.close(output)
    written = os.read(unread, PIPE_BYTES).decode()
    os.close(unread)
    step = max(int(found) for found in re.findall(r"  step (\d+)/", written))
    result = run.result()
    assert (result.reason, result.retryable) == (FailureReason.INTERNAL_ERROR, True)
    assert re.search(rf"training hangs: no progress for \d+ s after step ({step}|{step + 1});", result.message)
    assert "the next attempt resumes from the last checkpoint" in result.message
    assert sorted((run.output / "checkpoints").glob("step-*"))
