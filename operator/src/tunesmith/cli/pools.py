"""Pools that a namespace may use, as far as the user may read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.cluster.errors import ForbiddenError

if TYPE_CHECKING:
    from tunesmith.cluster.client import Cluster
    from tunesmith.cluster.resources import Object, Objects


async def usable_pools(cluster: Cluster, namespace: str) -> Objects:
    """Return the ServingPools to which adapters of a namespace may attach.

    A user who may not list the ServingPools of the whole cluster gets those of the namespace.
    """
    try:
        found = await cluster.list("ServingPool")
    except ForbiddenError:
        found = await cluster.list("ServingPool", namespace)
    return [pool for pool in found if _admits(pool, namespace)]


def _admits(pool: Object, namespace: str) -> bool:
    is_open = (pool["spec"].get("allowedNamespaces") or {}).get("from") == "All"
    return is_open or pool["metadata"]["namespace"] == namespace
