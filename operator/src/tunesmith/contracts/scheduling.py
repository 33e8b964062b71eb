"""Where an installation lets pods of FineTuneJobs and ServingPools run: the operator and the admission policy check it.

The lists are flags of the operator and values of the chart. An entry is a name; one that ends in `*` admits every name
that begins with the rest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tunesmith.api.placement import Resources, Scheduling, Toleration

_MAX_SHOWN = 12
_ANY = "*"
_NAME = re.compile(r"[A-Za-z0-9][-A-Za-z0-9._/]*\*?|\*")
_TAINT = re.compile(
    r"(?P<key>\*|[A-Za-z0-9][-A-Za-z0-9._/]*\*?)(=(?P<value>[-A-Za-z0-9._]*))?"
    r"(:(?P<effect>NoSchedule|PreferNoSchedule|NoExecute))?"
)


@dataclass(frozen=True)
class AllowedScheduling:
    """What `spec.scheduling` and `resources.gpuResource` may name. The defaults are those of the flags."""

    priority_classes: tuple[str, ...] = ()
    tolerations: tuple[str, ...] = ("nvidia.com/gpu", "amd.com/gpu")
    """Taints that may be tolerated, `key[=value][:effect]`."""
    runtime_classes: tuple[str, ...] = ("nvidia",)
    node_selectors: tuple[str, ...] = (
        "kubernetes.io/arch",
        "node.kubernetes.io/instance-type",
        "topology.kubernetes.io/region",
        "topology.kubernetes.io/zone",
        "nvidia.com/gpu.*",
        "nvidia.com/mig.*",
    )
    """Keys of node labels."""
    gpu_resources: tuple[str, ...] = ("nvidia.com/gpu*", "nvidia.com/mig-*", "amd.com/gpu")
    """Extended resources that stand for a GPU. Other device plugins may hand out devices of the host."""


DEFAULT_SCHEDULING = AllowedScheduling()


def parse_names(text: str) -> tuple[str, ...]:
    """Return the entries of a comma-separated list of names.

    Raises:
        ValueError: an entry is not a name.
    """
    return _parsed(text, _NAME, "a name, or the beginning of names followed by *")


def parse_tolerations(text: str) -> tuple[str, ...]:
    """Return the entries of a comma-separated list of taints that may be tolerated.

    Raises:
        ValueError: an entry is not `key[=value][:effect]`.
    """
    return _parsed(text, _TAINT, "key, key=value, key:effect or key=value:effect of a taint")


def refusal(scheduling: Scheduling, resources: Resources, allowed: AllowedScheduling) -> str | None:
    """Return why the installation does not run such pods, as a sentence for each field; None where it does."""
    refused = [
        _named("priorityClassName", scheduling.priority_class_name, allowed.priority_classes, "PriorityClasses"),
        _named("runtimeClassName", scheduling.runtime_class_name, allowed.runtime_classes, "RuntimeClasses"),
        *(
            _named("nodeSelector", key, allowed.node_selectors, "NodeSelectorKeys")
            for key in scheduling.node_selector or {}
        ),
        *(
            _toleration(number, toleration, allowed.tolerations)
            for number, toleration in enumerate(scheduling.tolerations or [])
        ),
        _gpu(resources, allowed.gpu_resources),
    ]
    sentences = [sentence for sentence in refused if sentence is not None]
    return "; ".join(sentences) or None


def tolerates(taint: Mapping[str, Any], tolerations: Iterable[Toleration]) -> bool:
    """Return True if one of the tolerations is for a node's taint."""
    return any(
        toleration.key in {None, taint["key"]}
        and toleration.effect in {None, taint["effect"]}
        and (toleration.operator == "Exists" or (toleration.value or "") == taint.get("value", ""))
        for toleration in tolerations
    )


def _parsed(text: str, form: re.Pattern[str], expected: str) -> tuple[str, ...]:
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    for entry in entries:
        if form.fullmatch(entry) is None:
            raise ValueError(f"{entry!r} is not {expected}")
    return tuple(entries)


def _named(field: str, value: str | None, entries: Sequence[str], setting: str) -> str | None:
    if value is None or any(_matches(value, entry) for entry in entries):
        return None
    return f"spec.scheduling.{field} names {value}, which {_not_allowed(entries, setting)}"


def _gpu(resources: Resources, entries: Sequence[str]) -> str | None:
    value = resources.gpu_resource
    if not resources.gpus or any(_matches(value, entry) for entry in entries):
        return None
    return f"spec.resources.gpuResource names {value}, which {_not_allowed(entries, 'GpuResources')}"


def _toleration(number: int, toleration: Toleration, entries: Sequence[str]) -> str | None:
    if any(_admits(entry, toleration) for entry in entries):
        return None
    return (
        f"spec.scheduling.tolerations[{number}] tolerates {_taints(toleration)}, which "
        f"{_not_allowed(entries, 'Tolerations')}"
    )


def _admits(entry: str, toleration: Toleration) -> bool:
    parts = _TAINT.fullmatch(entry)
    if parts is None:
        return False
    key, value, effect = parts["key"], parts["value"], parts["effect"]
    # A toleration without a key is for every taint, and so is one without an effect for every effect.
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
