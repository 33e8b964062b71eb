"""Scheduling that an installation allows its jobs and pools; checked by the operator and by the admission policy.

An entry of a list is a name; one that ends in `*` allows every name with that prefix.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from tunesmith.contracts.settings import COMMA_SEPARATED, MAX_ENTRIES, ChartValue, SettingPattern

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tunesmith.api.placement import Resources, Scheduling, Toleration

_MAX_SHOWN = 12
_ANY = "*"
_TAINT = (
    r"(?P<key>\*|[A-Za-z0-9][-A-Za-z0-9._/]*\*?)(=(?P<value>[-A-Za-z0-9._]*))?"
    r"(:(?P<effect>NoSchedule|PreferNoSchedule|NoExecute))?"
)

_Names = Annotated[
    tuple[
        Annotated[str, SettingPattern(r"[A-Za-z0-9][-A-Za-z0-9._/]*\*?|\*", "a name, or a prefix followed by *")],
        ...,
    ],
    Field(max_length=MAX_ENTRIES),
    COMMA_SEPARATED,
]
_Taints = Annotated[
    tuple[Annotated[str, SettingPattern(_TAINT, "key, key=value, key:effect or key=value:effect of a taint")], ...],
    Field(max_length=MAX_ENTRIES),
    COMMA_SEPARATED,
]


class AllowedScheduling(BaseModel):
    """Settings of the operator: permitted values of `spec.scheduling` and `resources.gpuResource`."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    allowed_priority_classes: Annotated[_Names, ChartValue("scheduling.allowedPriorityClasses")] = ()
    """PriorityClasses that jobs and pools may use; a trailing * matches every suffix."""
    allowed_tolerations: Annotated[_Taints, ChartValue("scheduling.allowedTolerations")] = (
        "nvidia.com/gpu",
        "amd.com/gpu",
    )
    """Taints that jobs and pools may tolerate, each key[=value][:effect]."""
    allowed_runtime_classes: Annotated[_Names, ChartValue("scheduling.allowedRuntimeClasses")] = ("nvidia",)
    """RuntimeClasses that jobs and pools may use."""
    allowed_node_selectors: Annotated[_Names, ChartValue("scheduling.allowedNodeSelectorKeys")] = (
        "kubernetes.io/arch",
        "node.kubernetes.io/instance-type",
        "topology.kubernetes.io/region",
        "topology.kubernetes.io/zone",
        "nvidia.com/gpu.*",
        "nvidia.com/mig.*",
    )
    """Keys of node labels that the nodeSelector of jobs and pools may contain."""
    allowed_gpu_resources: Annotated[_Names, ChartValue("scheduling.allowedGpuResources")] = (
        "nvidia.com/gpu*",
        "nvidia.com/mig-*",
        "amd.com/gpu",
    )
    """Extended resources that jobs and pools may request as GPUs. Other device plugins may expose devices of the
    host."""


DEFAULT_SCHEDULING = AllowedScheduling()


def scheduling_violation(scheduling: Scheduling, resources: Resources, allowed: AllowedScheduling) -> str | None:
    """Return why the installation does not allow such pods, as a sentence per field; None if it does."""
    refused = [
        _named(
            "priorityClassName", scheduling.priority_class_name, allowed.allowed_priority_classes, "PriorityClasses"
        ),
        _named("runtimeClassName", scheduling.runtime_class_name, allowed.allowed_runtime_classes, "RuntimeClasses"),
        *(
            _named("nodeSelector", key, allowed.allowed_node_selectors, "NodeSelectorKeys")
            for key in scheduling.node_selector or {}
        ),
        *(
            _toleration(number, toleration, allowed.allowed_tolerations)
            for number, toleration in enumerate(scheduling.tolerations or [])
        ),
        _gpu(resources, allowed.allowed_gpu_resources),
    ]
    sentences = [sentence for sentence in refused if sentence is not None]
    return "; ".join(sentences) or None


def tolerates(taint: Mapping[str, Any], tolerations: Iterable[Toleration]) -> bool:
    """Return True if a toleration matches a node's taint."""
    return any(
        toleration.key in {None, taint["key"]}
        and toleration.effect in {None, taint["effect"]}
        and (toleration.operator == "Exists" or (toleration.value or "") == taint.get("value", ""))
        for toleration in tolerations
    )


def _named(field: str, value: str | None, entries: Sequence[str], setting: str) -> str | None:
    if value is None or any(_matches(value, entry) for entry in entries):
        return None
    verb = "has the key" if field == "nodeSelector" else "is"
    return f"spec.scheduling.{field} {verb} {value}, which {_not_allowed(entries, setting)}"


def _gpu(resources: Resources, entries: Sequence[str]) -> str | None:
    value = resources.gpu_resource
    if not resources.gpus or any(_matches(value, entry) for entry in entries):
        return None
    return f"spec.resources.gpuResource is {value}, which {_not_allowed(entries, 'GpuResources')}"


def _toleration(number: int, toleration: Toleration, entries: Sequence[str]) -> str | None:
    if any(_admits(entry, toleration) for entry in entries):
        return None
    return (
        f"spec.scheduling.tolerations[{number}] tolerates {_taints(toleration)}, which "
        f"{_not_allowed(entries, 'Tolerations')}"
    )


def _admits(entry: str, toleration: Toleration) -> bool:
    parts = re.fullmatch(_TAINT, entry)
    if parts is None:
        return False
    key, value, effect = parts["key"], parts["value"], parts["effect"]
    # A toleration without a key matches every key, and one without an effect every effect.
    keyed = key == _ANY if toleration.key is None else _matches(toleration.key, key)
    valued = value is None or (toleration.operator == "Equal" and (toleration.value or "") == value)
    return keyed and valued and (effect is None or toleration.effect == effect)


def _taints(toleration: Toleration) -> str:
    if toleration.key is None:
        return "every taint" + (f" with the effect {toleration.effect}" if toleration.effect else "")
    value = f"={toleration.value or ''}" if toleration.operator == "Equal" else ""
    return f"the taint {toleration.key}{value}" + (f":{toleration.effect}" if toleration.effect else "")


def _matches(name: str, entry: str) -> bool:
    return name.startswith(entry[:-1]) if entry.endswith("*") else name == entry


def _not_allowed(entries: Iterable[str], setting: str) -> str:
    shown = list(entries)
    listed = ", ".join(shown[:_MAX_SHOWN]) + (f" and {len(shown) - _MAX_SHOWN} more" if len(shown) > _MAX_SHOWN else "")
    return (
        f"this installation does not allow (allowed: {listed or 'none'}): remove it, or ask the platform's "
        f"administrators to add it to the chart's value scheduling.allowed{setting}"
    )
