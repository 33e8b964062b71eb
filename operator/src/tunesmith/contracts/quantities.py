"""Quantities of the resources that pods request."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any, Literal

from tunesmith.api.placement import quantity_value

if TYPE_CHECKING:
    from collections.abc import Mapping

PODS = "pods"


def pod_requests(spec: Mapping[str, Any]) -> Mapping[str, Decimal]:
    """Return the resources that a pod requests of its node; the pod itself counts as one of the resource `pods`."""
    return _sum({PODS: Decimal(1)}, pod_resources(spec, "requests"))


def pod_resources(spec: Mapping[str, Any], part: Literal["requests", "limits"]) -> Mapping[str, Decimal]:
    """Return the sum of a pod's requests or limits.

    Containers and sidecars run together; each other init container runs with the sidecars that precede it.
    """
    running: Mapping[str, Decimal] = {}
    peak: Mapping[str, Decimal] = {}
    for container in spec.get("initContainers") or ():
        requested = quantities((container.get("resources") or {}).get(part) or {})
        if container.get("restartPolicy") == "Always":
            running = _sum(running, requested)
        else:
            peak = _maximum(peak, _sum(running, requested))
    for container in spec.get("containers") or ():
        running = _sum(running, quantities((container.get("resources") or {}).get(part) or {}))
    return _sum(_maximum(running, peak), quantities(spec.get("overhead") or {}))


def quantities(texts: Mapping[str, Any]) -> dict[str, Decimal]:
    """Parse quantities. Unknown notations count as zero: the API server and the scheduler have the final decision."""
    found = {}
    for name, text in texts.items():
        try:
            found[name] = quantity_value(str(text))
        except InvalidOperation:
            found[name] = Decimal(0)
    return found


def _sum(first: Mapping[str, Decimal], second: Mapping[str, Decimal]) -> dict[str, Decimal]:
    return {name: first.get(name, Decimal(0)) + second.get(name, Decimal(0)) for name in {*first, *second}}


def _maximum(first: Mapping[str, Decimal], second: Mapping[str, Decimal]) -> dict[str, Decimal]:
    return {name: max(first.get(name, Decimal(0)), second.get(name, Decimal(0))) for name in {*first, *second}}
