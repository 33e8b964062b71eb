"""Pools that a namespace may use, as far as the user may read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.api.servingpool import AllowedNamespaces
from tunesmith.cli.connection import read_installation
from tunesmith.cluster.errors import ForbiddenError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunesmith.cluster.client import Cluster
    from tunesmith.cluster.resources import Object, Objects


async def usable_pools(cluster: Cluster, namespace: str) -> Objects:
    """Return the ServingPools to which adapters of a namespace may attach.

    A user who may not list the ServingPools of the whole cluster gets those of the namespace, and those in the
    namespaces that the platform shares pools from.
    """
    try:
        found = await cluster.list("ServingPool")
    except ForbiddenError:
        found = await cluster.list("ServingPool", namespace)
        for shared in (await read_installation(cluster)).shared_pool_namespaces:
            if shared != namespace:
                found += await _list_shared(cluster, shared)
    labels = await _labels(cluster, namespace)
    return [pool for pool in found if _admits(pool, namespace, labels)]


async def _list_shared(cluster: Cluster, namespace: str) -> Objects:
    try:
        return await cluster.list("ServingPool", namespace)
    except ForbiddenError:
        # The chart's value rbac.discovery is off.
        return []


async def _labels(cluster: Cluster, namespace: str) -> Mapping[str, str] | None:
    """Return the labels of a namespace; None if it does not exist or the user may not read it."""
    try:
        found = await cluster.find("Namespace", namespace)
    except ForbiddenError:
        return None
    return found and found["metadata"].get("labels")


def _admits(pool: Object, namespace: str, labels: Mapping[str, str] | None) -> bool:
    allowed = AllowedNamespaces.model_validate(pool["spec"].get("allowedNamespaces") or {})
    return allowed.admits(pool["metadata"]["namespace"], namespace, labels)
