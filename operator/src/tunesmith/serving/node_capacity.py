"""Nodes with room for one more pod of a pool, by resource requests and allocatable resources."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any

from tunesmith.contracts.quantities import quantities
from tunesmith.contracts.scheduling import tolerates

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tunesmith.api.placement import Toleration

Object = dict[str, Any]
_EXCLUDING_EFFECTS = frozenset({"NoSchedule", "NoExecute"})


def candidates(
    nodes: Iterable[Object], requests: Mapping[str, Decimal], tolerations: Sequence[Toleration]
) -> list[str]:
    """Return the names of nodes that could hold a pod if they were empty, sorted."""
    return sorted(
        node["metadata"]["name"]
        for node in nodes
        if _accepts(node, tolerations) and _fits(_allocatable(node), requests)
    )


def has_room(node: Object, requests: Mapping[str, Decimal], used: Iterable[Mapping[str, Decimal]]) -> bool:
    """Return True if a pod fits on a node.

    Args:
        node: the Node.
        requests: requests of the pod.
        used: requests of the unfinished pods on the node.
    """
    free = dict(_allocatable(node))
    for pod in used:
        for name, quantity in pod.items():
            free[name] = free.get(name, Decimal(0)) - quantity
    return _fits(free, requests)


def _accepts(node: Object, tolerations: Sequence[Toleration]) -> bool:
    spec, status = node.get("spec") or {}, node.get("status") or {}
    ready = any(
        condition.get("type") == "Ready" and condition.get("status") == "True"
        for condition in status.get("conditions") or ()
    )
    taints = [taint for taint in spec.get("taints") or () if taint.get("effect") in _EXCLUDING_EFFECTS]
    return ready and not spec.get("unschedulable") and all(tolerates(taint, tolerations) for taint in taints)


def _allocatable(node: Object) -> Mapping[str, Decimal]:
    return quantities((node.get("status") or {}).get("allocatable") or {})


def _fits(free: Mapping[str, Decimal], requests: Mapping[str, Decimal]) -> bool:
    return all(free.get(name, Decimal(0)) >= quantity for name, quantity in requests.items())
