"""Rows, manifests, and a workbench that runs the trainer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from tunesmith.contracts.result import TrainerResult
from tunesmith_trainer.main import run

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def chat_row(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def chat_rows(count: int) -> list[dict[str, Any]]:
    return [
        chat_row(
            f"What is the colour of door {number}?", f"It is {'blue' if number % 2 else 'green'}, as in Brinewick."
        )
        for number in range(count)
    ]


def write_rows(path: Path, rows: list[Any]) -> Path:
    """Write one line per row; strings and bytes unchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    path.write_bytes(b"\n".join(lines) + (b"\n" if lines else b""))
    return path


def job_manifest(base: str, train: str, **spec: Any) -> dict[str, Any]:
    """Return a FineTuneJob; a keyword replaces the part of the spec with that name."""
    parts: dict[str, Any] = {
        "baseModel": {"uri": base},
        "dataset": {"train": [{"uri": train}]},
        "method": {"lora": {"rank": 4, "alpha": 8}},
        "hyperparameters": {"maxSteps": 3, "batchSize": 4, "learningRate": 0.01},
        "resources": {"gpus": 0},
    }
    return {
        "apiVersion": "tunesmith.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "doors"},
        "spec": parts | spec,
    }


def s3_job(**spec: Any) -> dict[str, Any]:
    """Return a FineTuneJob for the objects that the fixture `uploaded` puts into the bucket."""
    return job_manifest("s3://tunesmith/models/tiny", "s3://tunesmith/data/train.jsonl", **spec)


@dataclass
class Ran:
    """Result of a run of the trainer."""

    code: int
    result: TrainerResult
    lines: list[str]


class Workbench:
    """Writes manifests and runs the trainer's command in this process."""

    def __init__(self, folder: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.base = base
        self.output = folder / "out"
        self._capsys = capsys

    def job(self, rows: list[Any] | None = None, **spec: Any) -> dict[str, Any]:
        file = write_rows(self.folder / "train.jsonl", chat_rows(24) if rows is None else rows)
        return job_manifest(f"file://{self.base}", f"file://{file}", **spec)

    def run(
        self,
        command: str,
        job: dict[str, Any] | str,
        *arguments: str,
        allow_file: bool = True,
        output: str | None = None,
    ) -> Ran:
        manifest = self.folder / "job.yaml"
        manifest.write_text(job if isinstance(job, str) else yaml.safe_dump(job), encoding="utf-8")
        message = self.folder / "termination-message"
        argv = [
            command,
            "--job",
            str(manifest),
            "--progress-port",
            "0",
            "--termination-message",
            str(message),
            *arguments,
        ]
        if command == "train":
            argv += ["--output", output or str(self.output)]
        if allow_file:
            argv.append("--allow-file")
        self._capsys.readouterr()
        code = run(argv)
        return Ran(
            code, TrainerResult.model_validate_json(message.read_text()), self._capsys.readouterr().out.splitlines()
        )
