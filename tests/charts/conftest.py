"""The real helm and kubeconform, from PATH or from the local cluster's folder."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from collections.abc import Callable

REPOSITORY = Path(__file__).resolve().parents[2]
CHARTS = REPOSITORY / "charts"
STORE = "s3://bucket/store"
REGISTRY = "registry.example"


def program(name: str) -> str:
    path = os.pathsep.join([str(REPOSITORY / ".cluster/bin"), os.environ["PATH"]])
    found = shutil.which(name, path=path)
    assert found, f"{name} is neither in .cluster/bin nor on PATH: run `make cluster-up`"
    return found


@pytest.fixture(scope="session")
def kubeconform() -> str:
    return program("kubeconform")


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    binary = program("helm")
    home = tmp_path_factory.mktemp("helm")
    environment = os.environ | {
        "HELM_CACHE_HOME": str(home / "cache"),
        "HELM_CONFIG_HOME": str(home / "config"),
        "HELM_DATA_HOME": str(home / "data"),
    }

    def run(*arguments: str, stdin: str | None = None, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [binary, *arguments],
            check=False,
            capture_output=True,
            text=True,
            input=stdin,
            env=environment | more,
            timeout=120,
        )

    return run


@pytest.fixture(scope="session")
def rendered(helm: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(chart: str, values: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        release = "tunesmith" if chart == "tunesmith" else "models"
        arguments = ("--namespace", "tunesmith-system", "--kube-version", "1.34.0", "--values", "-")
        return helm("template", release, str(CHARTS / chart), *arguments, stdin=yaml.safe_dump(values))

    return run


@pytest.fixture(scope="session")
def template(rendered: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[..., list[dict[str, Any]]]:
    """Return the documents of a chart; `tunesmith` gets the two required values."""

    def documents(chart: str, values: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        values = dict(values or {})
        if chart == "tunesmith":
            values = {"store": STORE, **values, "images": {"registry": REGISTRY, **values.get("images", {})}}
        done = rendered(chart, values)
        assert done.returncode == 0, done.stderr
        return [document for document in yaml.safe_load_all(done.stdout) if document]

    return documents
