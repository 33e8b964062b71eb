from __future__ import annotations

from typing import Any

import pytest

from tunesmith.api.placement import Resources, Scheduling
from tunesmith.contracts.scheduling import (
    DEFAULT_SCHEDULING,
    AllowedScheduling,
    scheduling_violation,
)

GPU = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
CONTROL_PLANE = {"key": "node-role.kubernetes.io/control-plane", "operator": "Exists"}


def refused(scheduling: dict[str, Any], allowed: AllowedScheduling = DEFAULT_SCHEDULING, **resources: Any) -> str:
    return (
        scheduling_violation(Scheduling.model_validate(scheduling), Resources.model_validate(resources), allowed) or ""
    )


@pytest.mark.parametrize(
    "scheduling",
    [
        {},
        {"tolerations": [GPU]},
        {"tolerations": [{"key": "nvidia.com/gpu", "value": "present"}]},
        {"runtimeClassName": "nvidia"},
        {"nodeSelector": {"nvidia.com/gpu.product": "H200", "topology.kubernetes.io/zone": "a"}},
    ],
)
def test_scheduling_that_the_defaults_allow(scheduling: dict[str, Any]) -> None:
    assert refused(scheduling) == ""


@pytest.mark.parametrize(
    ("scheduling", "field", "value", "setting"),
    [
        ({"priorityClassName": "system-node-critical"}, "priorityClassName", "system-node-critical", "PriorityClasses"),
        ({"priorityClassName": "system-cluster-critical"}, "priorityClassName", "system-", "PriorityClasses"),
        ({"priorityClassName": "high"}, "priorityClassName", "high", "PriorityClasses"),
        ({"runtimeClassName": "privileged"}, "runtimeClassName", "privileged", "RuntimeClasses"),
        ({"nodeSelector": {"kubernetes.io/hostname": "a"}}, "nodeSelector", "hostname", "NodeSelectorKeys"),
        ({"tolerations": [GPU, {"operator": "Exists"}]}, "tolerations[1]", "every taint", "Tolerations"),
        ({"tolerations": [{"operator": "Exists", "effect": "NoExecute"}]}, "tolerations[0]", "NoExecute", "Toleration"),
        ({"tolerations": [CONTROL_PLANE]}, "tolerations[0]", "control-plane", "Tolerations"),
        (
            {"tolerations": [{"key": "nvidia.com/gpu2", "value": ""}]},
            "tolerations[0]",
            "nvidia.com/gpu2=",
            "Toleration",
        ),
    ],
)
def test_a_refusal_names_the_field_the_value_and_who_can_change_it(
    scheduling: dict[str, Any], field: str, value: str, setting: str
) -> None:
    sentence = refused(scheduling)
    assert f"spec.scheduling.{field} " in sentence
    assert value in sentence
    assert "(allowed: " in sentence
    assert "ask the platform's administrators" in sentence
    assert f"scheduling.allowed{setting}" in sentence


def test_every_field_that_is_refused_is_named() -> None:
    sentence = refused(
        {"priorityClassName": "high", "tolerations": [CONTROL_PLANE]}, gpuResource="devices.kubevirt.io/kvm"
    )
    assert sentence.count("does not allow") == 3
    assert "spec.resources.gpuResource is devices.kubevirt.io/kvm" in sentence


def test_a_device_that_is_not_requested_is_not_refused() -> None:
    assert refused({}, gpus=0, gpuResource="devices.kubevirt.io/kvm") == ""


@pytest.mark.parametrize(
    ("entry", "toleration", "admitted"),
    [
        ("spot", {"key": "spot", "operator": "Exists"}, True),
        ("spot", {"key": "spot", "value": "yes", "effect": "NoExecute"}, True),
        ("spot", {"key": "spots", "operator": "Exists"}, False),
        ("spot*", {"key": "spots", "operator": "Exists"}, True),
        ("spot=yes", {"key": "spot", "value": "yes"}, True),
        ("spot=yes", {"key": "spot", "value": "no"}, False),
        ("spot=yes", {"key": "spot", "operator": "Exists"}, False),
        ("spot:NoSchedule", {"key": "spot", "operator": "Exists", "effect": "NoSchedule"}, True),
        ("spot:NoSchedule", {"key": "spot", "operator": "Exists"}, False),
        ("spot=yes:NoSchedule", {"key": "spot", "value": "yes", "effect": "NoSchedule"}, True),
        ("s*", {"operator": "Exists"}, False),
        ("*", {"operator": "Exists"}, True),
        ("*:NoSchedule", {"operator": "Exists"}, False),
        ("*:NoSchedule", {"operator": "Exists", "effect": "NoSchedule"}, True),
    ],
)
def test_tolerations_that_an_entry_admits(entry: str, toleration: dict[str, Any], *, admitted: bool) -> None:
    allowed = AllowedScheduling(allowed_tolerations=(entry,))
    assert (refused({"tolerations": [toleration]}, allowed) == "") is admitted


def test_names_may_be_listed_by_prefix() -> None:
    allowed = AllowedScheduling.model_validate({"allowed_priority_classes": "batch, team-*"})
    assert [refused({"priorityClassName": name}, allowed) == "" for name in ("batch", "batch2", "team-a", "x")] == [
        True,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("text", ["a b", "team-*-x", "-a", "**"])
def test_an_invalid_name_is_refused_at_startup(text: str) -> None:
    with pytest.raises(ValueError, match="is not a name"):
        AllowedScheduling(allowed_priority_classes=(text,))


@pytest.mark.parametrize("text", ["a=b=c", "a:Never", ":NoSchedule", "=b"])
def test_an_invalid_taint_is_refused_at_startup(text: str) -> None:
    with pytest.raises(ValueError, match="is not key, key=value"):
        AllowedScheduling(allowed_tolerations=(text,))
