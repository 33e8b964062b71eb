"""ResourceQuotas that leave no room for a pod of a Job.

The Job controller reports a refused pod only by an Event, which the operator has no right to read: Events contain what
other programs write about other tenants.
"""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any

from tunesmith.contracts.quantities import PODS, pod_resources, quantities

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Object = dict[str, Any]
_MUST_BE_SET = frozenset({"cpu", "memory", "requests.cpu", "requests.memory", "limits.cpu", "limits.memory"})
"""Resources that every container must set if a quota bounds them (the API server's quota evaluator of pods)."""


def quota_shortage(pod: Mapping[str, Any], quotas: Iterable[Object]) -> str:
    """Return a sentence on a ResourceQuota that leaves no room for one more pod; empty if each has room.

    Args:
        pod: the pod's spec.
        quotas: the ResourceQuotas of its namespace.
    """
    required = _required(pod)
    for quota in quotas:
        if not all(_matches(pod, scope) for scope in _scopes(quota)):
            continue
        status = quota.get("status") or {}
        hard, used = status.get("hard") or {}, status.get("used") or {}
        limits, amounts = quantities(hard), quantities(used)
        for name, limit in limits.items():
            amount = required.get(name)
            if amount is None and name in _MUST_BE_SET:
                return (
                    f"ResourceQuota {quota['metadata']['name']} needs {name} on every container, which this pod does "
                    "not set: add a LimitRange with a default to the namespace"
                )
            if amount is not None and amounts.get(name, Decimal(0)) + amount > limit:
                return (
                    f"ResourceQuota {quota['metadata']['name']} allows {hard[name]} of {name}, {used.get(name, 0)} are "
                    f"used, and a pod needs {amount.normalize():f}: delete what uses it, or ask for a larger quota"
                )
    return ""


def _required(pod: Mapping[str, Any]) -> dict[str, Decimal]:
    requests, limits = pod_resources(pod, "requests"), pod_resources(pod, "limits")
    return {
        PODS: Decimal(1),
        f"count/{PODS}": Decimal(1),
        **requests,
        **{f"requests.{name}": quantity for name, quantity in requests.items()},
        **{f"limits.{name}": quantity for name, quantity in limits.items()},
    }


def _scopes(quota: Object) -> list[Object]:
    spec = quota.get("spec") or {}
    named = [{"scopeName": name, "operator": "Exists"} for name in spec.get("scopes") or ()]
    return [*named, *((spec.get("scopeSelector") or {}).get("matchExpressions") or ())]


def _matches(pod: Mapping[str, Any], scope: Object) -> bool:
    """Return True if a quota with that scope counts the pod. Pods of Jobs have requests, so none is BestEffort."""
    match scope["scopeName"]:
        case "NotBestEffort":
            return True
        case "Terminating":
            return "activeDeadlineSeconds" in pod
        case "NotTerminating":
            return "activeDeadlineSeconds" not in pod
        case "PriorityClass":
            name, values = pod.get("priorityClassName"), scope.get("values") or ()
            match scope["operator"]:
                case "In":
                    return name in values
                case "NotIn":
                    return name not in values
                case "Exists":
                    return bool(name)
                case _:
                    return not name
        case _:
            return False
