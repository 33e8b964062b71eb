"""Adapters from elsewhere on a real API server with the real controllers; trainers, kubelet and agents are played."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.controlplane.kubelet import Ending, failed, result
from tests.controlplane.manifests import adapter
from tests.controlplane.operatorprocess import STORE, until
from tests.controlplane.poolkubelet import FINGERPRINT
from tests.controlplane.servingworld import World, digest_of, serving_world

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.controlplane.operatorprocess import Operator
    from tunesmith.cluster.client import Cluster

pytestmark = pytest.mark.controlplane
Object = dict[str, Any]


def imported(pod: Object) -> Ending | None:
    """An import whose artifact's digest follows from the uri's last name; that of a uri with `pickle` fails."""
    if pod["metadata"]["labels"]["app.kubernetes.io/component"] != "import":
        return None
    arguments = pod["spec"]["containers"][0]["args"]
    uri = arguments[arguments.index("--adapter") + 1]
    if "pickle" in uri:
        return failed(2, retryable=False, reason="InvalidSpec", message="its weights are pickled: convert them")
    artifact = {
        "uri": arguments[arguments.index("--output") + 1],
        "digest": digest_of(uri.rpartition("/")[2]),
        "sizeBytes": 1000,
        "servable": {"vllm": True},
    }
    facts = {"baseModelFingerprint": FINGERPRINT, "rank": 8, "parity": True}
    return Ending(message=result(outcome="Succeeded", message=f"imported {uri}", artifact=artifact, imported=facts))


@pytest.fixture
async def world(operator: Operator, cluster: Cluster) -> AsyncIterator[World]:
    async with serving_world(operator, cluster, imported) as made:
        yield made


async def jobs(world: World) -> list[Object]:
    return await world.cluster.list("Job", world.namespace)


async def test_an_adapter_from_elsewhere_is_imported_once_and_served(world: World) -> None:
    await world.pool()
    await world.cluster.create(
        adapter(world.namespace, "doors", adapterFrom={"artifact": {"uri": "s3://elsewhere/doors"}})
    )
    await world.until_condition("doors", "Ready", "True", "Resident")
    [job] = await jobs(world)
    found = await world.get("doors")
    record, [revision] = found["status"]["adapterImport"], found["status"]["revisions"]
    folder = (
        f"{STORE}/{world.namespace}/doors-{found['metadata']['uid']}/import-{job['metadata']['name'][-8:]}/artifact"
    )
    assert (record["uri"], record["job"]) == ("s3://elsewhere/doors", job["metadata"]["name"])
    assert record["artifact"]["uri"] == revision["uri"] == folder
    assert record["artifact"]["digest"] == revision["digest"] == digest_of("doors")
    assert revision["engineName"] == world.engine_name("doors", "doors")
    # A recorded import needs neither its Job nor its pods.
    await world.cluster.delete("Job", job["metadata"]["name"], world.namespace, propagation="Background")

    async def gone() -> bool:
        return not await jobs(world)

    await until(gone, "deletion of the Job")
    await world.cluster.patch("AdapterDeployment", "doors", world.namespace, {"spec": {"replicas": 2}})

    async def observed() -> bool:
        status = (await world.get("doors"))["status"]
        return status["observedGeneration"] == 2 and status["desiredReplicas"] == 2

    await until(observed, "the next reconcile")
    assert await jobs(world) == []


async def test_an_adapter_that_cannot_be_imported_states_why_until_its_uri_changes(world: World) -> None:
    await world.pool()
    source = {"artifact": {"uri": "s3://elsewhere/pickle"}}
    await world.cluster.create(adapter(world.namespace, "doors", adapterFrom=source))
    refused = await world.until_condition("doors", "Ready", "False", "ImportFailed")
    assert "s3://elsewhere/pickle could not be imported: its weights are pickled: convert them" in (refused["message"])
    [old] = await jobs(world)

    async def reported() -> bool:
        events = await world.cluster.list("Event", world.namespace)
        return any(
            event["reason"] == "ImportFailed" and event.get("type") == "Warning" and "are pickled" in event["message"]
            for event in events
            if (event.get("involvedObject") or event.get("regarding"))["name"] == "doors"
        )

    await until(reported, "an Event about the failure")
    change = {"spec": {"adapterFrom": {"artifact": {"uri": "s3://elsewhere/doors"}}}}
    await world.cluster.patch("AdapterDeployment", "doors", world.namespace, change)
    await world.until_condition("doors", "Ready", "True", "Resident")

    async def replaced() -> bool:
        return old["metadata"]["name"] not in {job["metadata"]["name"] for job in await jobs(world)}

    await until(replaced, "deletion of the earlier Job")
