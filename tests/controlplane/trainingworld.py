"""FineTuneJobs in a namespace of a real API server, whose pods are played."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.controlplane.kubelet import Kubelet
from tests.controlplane.manifests import job
from tests.controlplane.operatorprocess import until

if TYPE_CHECKING:
    from tunesmith.cluster.client import Cluster

Object = dict[str, Any]
KIND = "FineTuneJob"


class World:
    """A namespace whose pods follow a script."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster = cluster
        self.namespace = namespace
        self.kubelet = Kubelet(cluster, lambda _: None, namespace)

    async def submit(self, name: str = "tone", **changes: object) -> Object:
        return await self.cluster.create(job(self.namespace, name, **changes))

    async def status(self, name: str = "tone") -> Object:
        found: Object = (await self.cluster.get(KIND, name, self.namespace)).get("status", {})
        return found

    async def condition(self, type_: str, name: str = "tone") -> Object:
        conditions = (await self.status(name)).get("conditions", [])
        return next((condition for condition in conditions if condition["type"] == type_), {})

    async def until_condition(
        self, type_: str, status: str = "True", *, reason: str = "", seconds: float = 180.0
    ) -> Object:
        async def holds() -> bool:
            found = await self.condition(type_)
            return found.get("status") == status and reason in {"", found["reason"]}

        await until(holds, f"condition {type_}={status} {reason}", seconds=seconds)
        return await self.condition(type_)

    async def jobs(self) -> list[str]:
        return sorted(item["metadata"]["name"] for item in await self.cluster.list("Job", self.namespace))
