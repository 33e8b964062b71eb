"""Fixtures: a tiny real model, a workbench, and a real S3 server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.trainer.s3server import S3Server
from tests.trainer.tiny_model import make
from tests.trainer.trainer_rig import Workbench, chat_rows, write_rows
from tunesmith.contracts.environment import ALLOWED_ADDRESSES

if TYPE_CHECKING:
    from collections.abc import Iterator


def pytest_configure(config: pytest.Config) -> None:
    # Warnings of libraries about themselves; those of our code remain errors.
    for module in (
        "torch",
        "transformers",
        "trl",
        "peft",
        "bitsandbytes",
        "datasets",
        "accelerate",
        "fsspec",
        "s3fs",
        "huggingface_hub",
        "httpx2",
        "aiobotocore",
        "multiprocess",
    ):
        config.addinivalue_line("filterwarnings", rf"ignore:::{module}(\..*)?")
    # Resources that fsspec's event loop thread closes late.
    config.addinivalue_line("filterwarnings", "ignore::ResourceWarning")
    config.addinivalue_line("filterwarnings", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create the tiny base model; see `make`."""
    return make(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def bench(tmp_path: Path, base_model: Path, capsys: pytest.CaptureFixture[str]) -> Workbench:
    return Workbench(tmp_path, base_model, capsys)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_environment(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    for name, value in (s3.environment() | {ALLOWED_ADDRESSES: "127.0.0.0/8"}).items():
        monkeypatch.setenv(name, value)
    return s3


@pytest.fixture
def uploaded(s3_environment: S3Server, base_model: Path, tmp_path: Path) -> S3Server:
    """Upload the tiny base and a data set to the bucket, for `s3_job`."""
    filesystem = s3_environment.filesystem()
    for file in base_model.iterdir():
        filesystem.put_file(str(file), f"tunesmith/models/tiny/{file.name}")
    filesystem.put_file(str(write_rows(tmp_path / "rows.jsonl", chat_rows(24))), "tunesmith/data/train.jsonl")
    return s3_environment


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Return the folder of SmolLM2-135M-Instruct, as created by e2e/cluster/model.py."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunesmith"
    folder = cache / "models/SmolLM2-135M-Instruct"
    if not folder.is_dir():
        pytest.fail(f"{folder} does not exist: make it with `python3 e2e/cluster/model.py`")
    return folder
