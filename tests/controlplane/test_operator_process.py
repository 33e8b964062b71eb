"""The operator's processes: two replicas, probes, restarts at any moment."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from tests.controlplane.apiserver import ApiServer
from tests.controlplane.cable import Cable
from tests.controlplane.manifests import job
from tests.controlplane.operatorprocess import Operator, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tunesmith.cluster.client import Cluster

pytestmark = pytest.mark.controlplane
Object = dict[str, Any]
KIND = "FineTuneJob"
JOBS = 300
KILLS = 10


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with ApiServer(tmp_path_factory.mktemp("apiserver")) as running:
        running.install_crds()
        yield running


@pytest.fixture
async def namespace(cluster: Cluster) -> str:
    manifest = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"generateName": "test-"}}
    return str((await cluster.create(manifest))["metadata"]["name"])


async def lease(cluster: Cluster, namespace: str) -> Object:
    found = await cluster.find("Lease", "tunesmith-operator", namespace)
    return (found or {}).get("spec", {})


async def test_another_replica_takes_over_from_a_killed_leader(
    server: ApiServer, cluster: Cluster, namespace: str, tmp_path: Path
) -> None:
    with (
        Operator(server.kubeconfig, tmp_path / "a", namespace=namespace, identity="a") as first,
        Operator(server.kubeconfig, tmp_path / "b", namespace=namespace, identity="b") as second,
    ):
        replicas = {"a": first, "b": second}

        async def led() -> bool:
            ready = first.answers("/readyz") and second.answers("/readyz")
            return ready and first.metric("tunesmith_operator_leader") + second.metric("tunesmith_operator_leader") == 1

        await until(led, "two ready replicas with a leader")
        before = await lease(cluster, namespace)
        leader = before["holderIdentity"]
        (other,) = set(replicas) - {leader}
        assert replicas[leader].metric("tunesmith_operator_leader") == 1
        replicas[leader].kill()
        await cluster.create(job(namespace, "after"))

        async def validating() -> bool:
            return "status" in await cluster.get(KIND, "after", namespace)

        await until(validating, "work by the other replica")
        after = await lease(cluster, namespace)
        assert after["holderIdentity"] == other
        assert after["leaseTransitions"] == before["leaseTransitions"] + 1
        # a leader that is asked to stop hands over at once
        assert replicas[other].stop() == 0
        assert (await lease(cluster, namespace))["holderIdentity"] == ""


async def test_an_outage_of_the_api_server_is_survived(
    server: ApiServer, cluster: Cluster, namespace: str, tmp_path: Path
) -> None:
    cable = Cable(server.url)
    async with await cable.start() as listener:
        kubeconfig = cable.kubeconfig(server, listener, tmp_path)
        with Operator(kubeconfig, tmp_path, namespace=namespace) as operator:

            async def leads() -> bool:
                ready = await asyncio.to_thread(operator.answers, "/readyz")
                return ready and await asyncio.to_thread(operator.metric, "tunesmith_operator_leader") == 1

            async def follows() -> bool:
                return await asyncio.to_thread(operator.metric, "tunesmith_operator_leader") == 0

            await until(leads, "a leader")
            cable.cut()
            await until(follows, "the loss of the lease")
            await cluster.create(job(namespace, "meanwhile"))
            cable.mend()

            async def validating() -> bool:
                return "status" in await cluster.get(KIND, "meanwhile", namespace)

            await until(validating, "work after the outage")
            await until(leads, "a leader after the outage")
            assert operator.process.poll() is None
            assert await asyncio.to_thread(operator.answers, "/healthz")
        cable.cut()


async def test_300_jobs_survive_10_kills(server: ApiServer, cluster: Cluster, namespace: str, tmp_path: Path) -> None:
    chance = random.Random(3)  # noqa: S311 - a test's choice of moments
    # The identity is that of a pod, which outlives the processes of its container.
    with Operator(server.kubeconfig, tmp_path, namespace=namespace, identity="pod-1") as operator:

        async def submit() -> None:
            for number in range(JOBS):
                await cluster.create(job(namespace, f"job-{number}"))
                await asyncio.sleep(0.03)

        submitting = asyncio.create_task(submit())
        for _ in range(KILLS):
            await asyncio.sleep(chance.uniform(0.5, 4.0))  # the moment of the kill is what varies
            operator.kill()
            operator.start()
        restarted = time.monotonic()
        await submitting

        async def all_told() -> bool:
            items = await cluster.list(KIND, namespace)
            return len(items) == JOBS and all(item.get("status", {}).get("phase") for item in items)

        await until(all_told, "a status for every job", seconds=240)
        seconds = time.monotonic() - restarted
        jobs = await cluster.list("Job", namespace)
        owners = Counter(item["metadata"]["ownerReferences"][0]["uid"] for item in jobs)
        print(f"{JOBS} jobs, {KILLS} kills: converged {seconds:.1f} s after the last restart")  # noqa: T201 - the figure
        assert set(owners.values()) == {1}
        assert len(owners) == JOBS
