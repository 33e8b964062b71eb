"""One API server with Tunesmith's CRDs for the whole run, and a namespace for each test."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from typing import TYPE_CHECKING

import pytest

from tests.controlplane.apiserver import ApiServer
from tests.controlplane.operatorprocess import Operator
from tests.controlplane.rights import grant
from tests.controlplane.trainingworld import World
from tunesmith.cluster.client import Cluster

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


@pytest.fixture(scope="session")
def apiserver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with ApiServer(tmp_path_factory.mktemp("apiserver")) as server:
        server.install_crds()
        yield server


@pytest.fixture
def namespace(apiserver: ApiServer) -> str:
    name = f"test-{secrets.token_hex(4)}"
    apiserver.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    return name


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """An API server of this module's own, with the real controllers."""
    with ApiServer(tmp_path_factory.mktemp("apiserver")) as running:
        running.install_crds()
        running.start_controller_manager()
        yield running


@pytest.fixture(scope="module")
def operator(server: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """A replica with the rights that the chart gives it, and no others."""
    with Operator(
        grant(server, "default", scheduling={"allowedNodeSelectorKeys": ["namespace"]}),
        tmp_path_factory.mktemp("operator"),
    ) as running:
        yield running
    print(running.log.read_text())  # noqa: T201 - pytest shows it with a failure


@pytest.fixture
async def cluster(server: ApiServer) -> AsyncIterator[Cluster]:
    async with await Cluster.connect(kubeconfig=server.kubeconfig) as connected:
        yield connected


@pytest.fixture
async def world(operator: Operator, cluster: Cluster) -> AsyncIterator[World]:
    """A namespace in which FineTuneJobs run; only the kubelet is played."""
    assert operator.process.poll() is None
    name = await cluster.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"generateName": "test-"}})
    found = World(cluster, name["metadata"]["name"])
    task = asyncio.create_task(found.kubelet.run())
    yield found
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
