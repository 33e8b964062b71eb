"""The pods of one attempt, as local processes.

They are forked from one process that has already imported the libraries: importing them takes longer than the tests'
runs.
"""

from __future__ import annotations

import csv
import multiprocessing
import os
import re
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.trainer.s3server import free_port
from tests.trainer.trainer_rig import chat_rows, job_manifest, write_rows
from tunesmith.contracts.result import TrainerResult

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerProcess
    from pathlib import Path

SECONDS = 90.0
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""One thread: with so small a model, several threads wait for each other when the cores are busy."""
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        f"tunesmith_trainer.{name}"
        for name in ("preflight.prepare", "training.loop", "artifact.package", "artifact.merge")
    ]
)


def _command(arguments: list[str], environment: dict[str, str], log: Path) -> None:
    """Run the command of a pod's container."""
    from tunesmith_trainer.main import run  # noqa: PLC0415 - the forking process has it

    os.environ.update(environment)
    torch.set_num_threads(1)
    with log.open("w") as out, redirect_stdout(out), redirect_stderr(out):
        code = run(arguments)
    os._exit(code)


class Container:
    """The trainer's command in its own process, with its output in a file."""

    def __init__(
        self, arguments: list[str], environment: dict[str, str], log: Path, *, seconds: float = SECONDS
    ) -> None:
        log.unlink(missing_ok=True)
        self._log = log
        self._seconds = seconds
        self._process: ForkServerProcess = _FORKS.Process(
            target=_command, args=(arguments, ONE_THREAD | environment, log), daemon=True
        )
        self._process.start()

    def wait_for_output(self, pattern: str) -> None:
        """Wait until a line of output begins with `pattern`, or the process has exited."""
        deadline = time.monotonic() + self._seconds
        while not re.search(f"^{pattern}", self.output(), re.MULTILINE):
            assert time.monotonic() < deadline, self.output()
            if not self.is_alive():
                break  # it resumed after that step and has finished
            time.sleep(0.01)

    def output(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def signal(self, number: int) -> None:
        if self._process.pid is not None and self.is_alive():
            os.kill(self._process.pid, number)

    def wait(self) -> int | None:
        """Wait for the process and return its exit code; negative if a signal killed it."""
        self._process.join(self._seconds)
        return self._process.exitcode


@dataclass
class Pods:
    """Runs the trainer's command in each of `nodes` pods."""

    folder: Path
    manifest: Path
    nodes: int
    containers: list[Container] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def start(self) -> None:
        port = free_port()
        self.containers = []
        for index in range(self.nodes):
            environment = self.environment
            if self.nodes > 1:
                environment = environment | {
                    "JOB_COMPLETION_INDEX": str(index),
                    "MASTER_ADDR": "localhost",
                    "MASTER_PORT": str(port),
                }
            message = self.folder / f"message-{index}"
            message.unlink(missing_ok=True)
            arguments = ["train", "--job", str(self.manifest), "--output", str(self.output), "--allow-file"]
            arguments += ["--progress-port", "0", "--work", str(self.folder / f"work-{index}")]
            arguments += ["--termination-message", str(message), "--allow-task-code"]
            # Pods share a store, never a local folder.
            arguments += ["--tokens", f"file://{self.folder}/tokens-{index}"]
            self.containers.append(Container(arguments, environment, self.folder / f"log-{index}"))

    def wait(self) -> list[int | None]:
        """Wait for all processes and return their exit codes."""
        return [container.wait() for container in self.containers]

    def finish(self) -> None:
        self.start()
        codes = self.wait()
        assert codes == [0] * self.nodes, [self.log(index) for index in range(self.nodes)]

    def interrupt(self, indices: tuple[int, ...], number: int, step: int, seconds: float = 0.0) -> None:
        """Send a signal to some pods `seconds` after the run has done `step` steps."""
        self.containers[0].wait_for_output(f"  step {step}/")
        time.sleep(seconds)  # at any point of a step or a write
        for index in indices:
            self.containers[index].signal(number)

    def log(self, index: int) -> str:
        return self.containers[index].output()

    def result(self, index: int) -> TrainerResult:
        return TrainerResult.model_validate_json((self.folder / f"message-{index}").read_text())

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the weights of the adapter, or of the whole model."""
        (file,) = (self.output / "artifact").glob("*.safetensors")
        return load_file(file)

    def curve(self) -> list[dict[str, str]]:
        with (self.output / "metrics.csv").open() as file:
            return list(csv.DictReader(file))


def pods(folder: Path, base_model: Path, nodes: int, rows: list[Any] | None = None, **spec: Any) -> Pods:
    """Return the pods of a small job; a keyword replaces the part of the spec with that name."""
    folder.mkdir(parents=True, exist_ok=True)
    file = write_rows(folder / "train.jsonl", chat_rows(26) if rows is None else rows)
    parts = {
        "method": {"lora": {"rank": 4, "alpha": 8, "dropout": 0.1}},
        "hyperparameters": {"maxSteps": 6, "batchSize": 10, "microBatchSize": 2, "learningRate": 0.01},
        "resources": {"gpus": 0, "nodes": nodes},
        "checkpoint": {"everySteps": 2},
    }
    manifest = folder / "job.yaml"
    manifest.write_text(yaml.safe_dump(job_manifest(f"file://{base_model}", f"file://{file}", **(parts | spec))))
    return Pods(folder, manifest, nodes)


def assert_equal(run: Pods, reference: Pods) -> None:
    """Assert that losses, gradient norms and weights are within 1e-4 of each other."""
    points, others = run.curve(), reference.curve()
    assert [point["step"] for point in points] == [point["step"] for point in others]
    for point, expected in zip(points, others, strict=True):
        for name, value in expected.items():
            assert float(point[name] or 0) == pytest.approx(float(value or 0), rel=1e-4), (name, point, expected)
    weights, expected_weights = run.weights(), reference.weights()
    assert weights.keys() == expected_weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected_weights[name], rtol=1e-4, atol=1e-4, msg=name)
