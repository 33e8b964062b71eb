"""Rows of `tunesmith list` and `tunesmith models`, and the resources that they show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunesmith.api.adapterdeployment import AdapterDeployment
from tunesmith.cli.describe import adapter_pool, age, pods, state, summary, waiting
from tunesmith.cli.errors import CliError
from tunesmith.cli.kinds import Kind, parse
from tunesmith.cli.pools import usable_pools

if TYPE_CHECKING:
    from datetime import datetime

    from tunesmith.api.servingpool import ServingPool
    from tunesmith.cluster.client import Cluster
    from tunesmith.cluster.resources import Object, Objects


@dataclass(frozen=True)
class ResourceRow:
    """A resource in the output of `tunesmith list`."""

    kind: str
    namespace: str
    name: str
    state: str
    age: str
    message: str


@dataclass(frozen=True)
class ModelRow:
    """A model in the output of `tunesmith models`.

    `pods` is ready/desired; `message` is the reason why it does not serve yet, empty if it serves.
    """

    model: str
    kind: str
    pool: str
    state: str
    pods: str
    message: str


async def list_resources(cluster: Cluster, kind: Kind, namespace: str | None) -> Objects:
    """Return the resources of a kind in a namespace, or in all if it is None; pools include usable ones of others."""
    if kind is Kind.POOL and namespace is not None:
        return await usable_pools(cluster, namespace)
    return await cluster.list(kind.resource, namespace)


def resource_row(kind: Kind, document: Object, now: datetime) -> ResourceRow:
    """Return a resource's row, even if this release cannot parse the resource."""
    metadata = document["metadata"]
    try:
        resource = parse(kind, document)
    except CliError as error:
        return ResourceRow(kind.value, metadata["namespace"], metadata["name"], "Unknown", "?", str(error))
    return ResourceRow(
        kind=kind.value,
        namespace=resource.metadata.namespace,
        name=resource.metadata.name,
        state=state(resource),
        age=age(resource.metadata.creation_timestamp, now),
        message=summary(resource, now),
    )


def model_row(resource: AdapterDeployment | ServingPool) -> ModelRow:
    """Return the row of the model that an adapter or a pool serves."""
    if isinstance(resource, AdapterDeployment):
        kind, pool = "adapter", adapter_pool(resource)
    else:
        kind, pool = "base", f"{resource.metadata.namespace}/{resource.metadata.name}"
    return ModelRow(
        model=resource.model,
        kind=kind,
        pool=pool,
        state=state(resource),
        pods=pods(resource),
        message=waiting(resource),
    )
