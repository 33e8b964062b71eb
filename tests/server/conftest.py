"""The parts of a serving pod, each started once for the whole run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.server.server_rig import Artifact, MissingPartError, S3Server, make_adapter, model_folder
from tunesmith.contracts.fingerprint import LocalModelFolder, base_fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def base() -> Path:
    try:
        return model_folder()
    except MissingPartError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture(scope="session")
def fingerprint(base: Path) -> str:
    return base_fingerprint(LocalModelFolder(base))


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    try:
        server = S3Server(tmp_path_factory.mktemp("s3"))
    except MissingPartError as error:
        pytest.fail(str(error), pytrace=False)
    yield server
    server.stop()


@pytest.fixture
def adapter(tmp_path: Path, base: Path, fingerprint: str) -> Callable[..., Artifact]:
    def make(seed: int = 1, **changes: object) -> Artifact:
        return make_adapter(tmp_path / f"artifact-{seed}", base, fingerprint, seed=seed, layers=1, **changes)  # type: ignore[arg-type]

    return make
