"""A namespace in which pools and adapters are served: trainers, kubelet and agents are played."""

from __future__ import annotations

import asyncio
import hashlib
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from tests.controlplane.kubelet import Kubelet, failed, published, result
from tests.controlplane.manifests import adapter, job, pool
from tests.controlplane.operatorprocess import until
from tests.controlplane.poolkubelet import FINGERPRINT, PoolKubelet

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.controlplane.operatorprocess import Operator
    from tunesmith.cluster.client import Cluster

Object = dict[str, Any]


def digest_of(name: str) -> str:
    return f"sha256:{hashlib.sha256(name.encode()).hexdigest()}"


def trained(pod: Object) -> Any:
    """A trainer whose artifact's digest follows from its job's name; a job called `bad` fails."""
    labels = pod["metadata"]["labels"]
    name = labels.get("tunesmith.dev/finetunejob")
    if name is None:
        return None
    ending = published(pod)
    document = json.loads(ending.message)
    if labels["app.kubernetes.io/component"] == "validate":
        if name == "bad":
            return failed(2, retryable=False, reason="DatasetInvalid", message="line 3 of data.jsonl is not JSON")
        document["resolved"]["baseModelFingerprint"] = FINGERPRINT
    else:
        document["artifact"]["digest"] = digest_of(name)
    return type(ending)(message=result(**document))


class World:
    """A namespace with a pool, whose pods are played."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster = cluster
        self.namespace = namespace
        self.pods = PoolKubelet(cluster, namespace)
        self.trainers = Kubelet(cluster, trained, namespace)

    async def pool(self, **changes: object) -> Object:
        return await self.cluster.create(pool(self.namespace, **changes))

    async def train(self, name: str) -> Object:
        return await self.cluster.create(job(self.namespace, name))

    async def serve(self, name: str, source: str, **changes: object) -> Object:
        return await self.cluster.create(
            adapter(self.namespace, name, adapterFrom__fineTuneJob__name=source, **changes)
        )

    async def get(self, name: str, kind: str = "AdapterDeployment") -> Object:
        return await self.cluster.get(kind, name, self.namespace)

    def engine_name(self, model: str, source: str) -> str:
        return f"{self.namespace}/{model}@{digest_of(source)[7:19]}"

    async def condition(self, name: str, type_: str, kind: str = "AdapterDeployment") -> Object:
        conditions = (await self.get(name, kind)).get("status", {}).get("conditions", [])
        return next((condition for condition in conditions if condition["type"] == type_), {})

    async def until_condition(
        self,
        name: str,
        type_: str,
        status: str,
        reason: str = "",
        kind: str = "AdapterDeployment",
        *,
        seconds: float = 180.0,
    ) -> Object:
        async def holds() -> bool:
            found = await self.condition(name, type_, kind)
            return found.get("status") == status and reason in {"", found["reason"]}

        try:
            await until(holds, f"{type_}={status} {reason} of {name}", seconds=seconds)
        except TimeoutError as error:
            raise TimeoutError(f"{error}: {await self.get(name, kind)}") from None
        return await self.condition(name, type_, kind)

    async def until_holders(self, engine_name: str, count: int) -> list[str]:
        await self.until(lambda: len(self.pods.holders(engine_name)) == count, f"{engine_name} on {count} pods")
        return self.pods.holders(engine_name)

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        async def holds() -> bool:
            return condition()

        await until(holds, what)


@asynccontextmanager
async def serving_world(
    operator: Operator, cluster: Cluster, script: Callable[[Object], Any] = trained
) -> AsyncIterator[World]:
    """A new namespace with the operator; `script` plays the trainers."""
    assert operator.process.poll() is None
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    made = await cluster.create(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"generateName": "test-", "labels": labels}}
    )
    found = World(cluster, made["metadata"]["name"])
    found.trainers.script = script
    tasks = [asyncio.create_task(found.pods.run()), asyncio.create_task(found.trainers.run())]
    yield found
    # Before the namespace goes, whose Secrets may go first.
    for task in tasks:
        task.cancel()
    for ended in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(ended, asyncio.CancelledError), ended
    await cluster.delete("Namespace", found.namespace)
