"""The bad jobs that the trainer rejects, on the CPU unless only training can find the error; the table is in
badjobs.py."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest

from tests.controlplane.badjobs import BAD_JOBS, GOOD_ROWS, BadJob, Stage, changed, lines
from tests.trainer.trainer_rig import job_manifest
from tunesmith.contracts.environment import ALLOWED_ADDRESSES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.trainer.s3server import S3Server
    from tests.trainer.trainer_rig import Ran, Workbench

    Run = Callable[..., list[Ran]]

LISTED = {ALLOWED_ADDRESSES: "127.0.0.1/32"}
STORED = ("s3://tunesmith/models/tiny", "s3://tunesmith/data/train.jsonl")


def of_stage(stage: Stage) -> list[str]:
    return [name for name, bad in BAD_JOBS.items() if bad.stage is stage]


def manifest(bench: Workbench, bad: BadJob, folder: Path) -> dict[str, Any]:
    """Return the job's manifest, with its data and its base model in a folder."""
    base = bench.base
    if bad.breaks is not None:
        base = shutil.copytree(base, folder / "base")
        bad.breaks(base)
    for name, content in (bad.files or {"train.jsonl": lines(*GOOD_ROWS)}).items():
        (folder / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "data" / name).write_bytes(content)
    here = (f"file://{base}", f"file://{folder}/data/{bad.train}")
    job = job_manifest(*(STORED if bad.guarded else here))
    return job | {"spec": changed(job["spec"], bad.spec)}


@pytest.fixture(scope="module")
def uploaded(s3: S3Server, base_model: Path) -> S3Server:
    s3.filesystem().pipe_file("tunesmith/data/train.jsonl", lines(*GOOD_ROWS))
    for file in base_model.iterdir():
        s3.filesystem().put_file(str(file), f"tunesmith/models/tiny/{file.name}")
    return s3


@pytest.fixture
def run(bench: Workbench, uploaded: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run commands of the trainer on a bad job."""

    def commands(bad: BadJob, *names: str) -> list[Ran]:
        for name, value in (uploaded.environment() | LISTED | bad.environment).items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        for name, values in bad.secrets.items():
            (tmp_path / "secrets" / name).mkdir(parents=True)
            for key, value in (uploaded.environment() | values).items():
                (tmp_path / "secrets" / name / key).write_text(value)
        arguments = ["--secrets", str(tmp_path / "secrets")]
        if bad.gpu_memory is not None:
            arguments += ["--gpu-memory-bytes", str(bad.gpu_memory)]
        job = manifest(bench, bad, tmp_path)
        return [bench.run(name, job, *arguments, allow_file=not bad.guarded) for name in names]

    return commands


@pytest.mark.parametrize("name", of_stage(Stage.VALIDATION))
def test_a_bad_job_is_refused_on_the_cpu(run: Run, name: str) -> None:
    bad = BAD_JOBS[name]
    (ran,) = run(bad, "validate")
    assert bad.mend in ran.result.message
    assert (ran.code, ran.result.reason, ran.result.retryable) == (2, bad.reason, False)


@pytest.mark.parametrize("name", of_stage(Stage.TRAINING))
def test_faults_that_only_training_can_find(run: Run, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    bad = BAD_JOBS[name]
    validated, trained = run(bad, "validate", "train")
    assert validated.code == 0
    assert bad.mend in trained.result.message
    assert (trained.code, trained.result.reason, trained.result.retryable) == (2, bad.reason, False)
