"""Rows, manifests, a workbench that runs the trainer, and a real S3 server."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import s3fs
import yaml

from tunesmith.contracts.result import TrainerResult
from tunesmith_trainer.main import run


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
    """One line per row; strings and bytes as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    path.write_bytes(b"\n".join(lines) + (b"\n" if lines else b""))
    return path


def job_manifest(base: str, train: str, **spec: Any) -> dict[str, Any]:
    """A FineTuneJob; a keyword replaces the part of the spec of that name."""
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


@dataclass
class Ran:
    """How a run of the trainer ended."""

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


@dataclass
class S3Server:
    """A running S3 server with one bucket."""

    endpoint: str
    access_key: str
    secret_key: str
    process: subprocess.Popen[bytes]
    bucket: str = "tunesmith"

    def filesystem(self) -> s3fs.S3FileSystem:
        return s3fs.S3FileSystem(
            key=self.access_key,
            secret=self.secret_key,
            endpoint_url=self.endpoint,
            use_listings_cache=False,
            skip_instance_cache=True,
        )

    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
        }


def versitygw() -> str:
    """The S3 server's program: $TUNESMITH_VERSITYGW, or what the local cluster built."""
    named = os.environ.get("TUNESMITH_VERSITYGW")
    if named:
        return named
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunesmith" / "bin"
    built = sorted(cache.glob("versitygw-*/versitygw"))
    found = str(built[-1]) if built else shutil.which("versitygw")
    if not found:
        pytest.fail("no versitygw found: set TUNESMITH_VERSITYGW to its program (the local cluster builds one)")
    return found


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def start_s3(folder: Path, port: int) -> S3Server:
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        versitygw(),
        "--port",
        f"127.0.0.1:{port}",
        "--access",
        "writer",
        "--secret",
        "writer-secret",
        "--quiet",
        "posix",
        str(folder),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    server = S3Server(f"http://127.0.0.1:{port}", "writer", "writer-secret", process)
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise
            time.sleep(0.05)
        else:
            return server
