"""Every example is accepted by a real API server; those of a local run by what a local run checks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from tunesmith.api.manifest import parse_manifest

if TYPE_CHECKING:
    from tests.controlplane.apiserver import ApiServer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MANIFESTS = [
    path
    for path in sorted(EXAMPLES.glob("*.yaml"))
    if all("apiVersion" in document for document in yaml.safe_load_all(path.read_text()))
]

pytestmark = pytest.mark.controlplane


def test_there_is_an_example_of_every_kind() -> None:
    kinds = {document["kind"] for path in MANIFESTS for document in yaml.safe_load_all(path.read_text())}
    assert kinds == {"FineTuneJob", "ServingPool", "AdapterDeployment"}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_an_example_is_accepted(apiserver: ApiServer, namespace: str, path: Path) -> None:
    documents = list(yaml.safe_load_all(path.read_text()))
    for document in documents:
        document["metadata"]["namespace"] = namespace
    text = yaml.safe_dump_all(documents)
    done = apiserver.kubectl("apply", "--server-side", "--dry-run=server", "-f", "-", manifest=text)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", sorted((EXAMPLES / "local").glob("*.yaml")), ids=lambda path: path.name)
def test_an_example_of_a_local_run_is_accepted(path: Path) -> None:
    assert parse_manifest(path.read_text(), allow_file=True).kind == "FineTuneJob"
