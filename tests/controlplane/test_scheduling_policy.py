"""The admission policy of `scheduling` against the operator's own check of the same lists."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.controlplane.apiserver import until
from tests.controlplane.manifests import job, pool
from tests.controlplane.rights import grant
from tunesmith.api.placement import Resources, Scheduling
from tunesmith.contracts.scheduling import DEFAULT_SCHEDULING, AllowedScheduling, scheduling_violation

if TYPE_CHECKING:
    from tests.controlplane.apiserver import ApiServer

pytestmark = pytest.mark.controlplane

Object = dict[str, Any]
DENIED = "denied request: "
RULES: dict[str, AllowedScheduling] = {
    "rules-default": DEFAULT_SCHEDULING,
    "rules-listed": AllowedScheduling(
        allowed_priority_classes=("batch", "team-*"),
        allowed_tolerations=("spot=yes", "gpu:NoSchedule", "team*=a:NoExecute", "empty="),
        allowed_runtime_classes=(),
        allowed_node_selectors=("zone*",),
        allowed_gpu_resources=("example.com/gpu",),
    ),
    "rules-open": AllowedScheduling(
        allowed_priority_classes=("*",),
        allowed_tolerations=("*",),
        allowed_runtime_classes=("*",),
        allowed_node_selectors=("*",),
        allowed_gpu_resources=("*",),
    ),
    "rules-effect": AllowedScheduling(allowed_tolerations=("*:NoSchedule",)),
}
ASKED: list[Object] = [
    *({"priorityClassName": name} for name in ("system-node-critical", "batch", "batch2", "team-a")),
    *({"runtimeClassName": name} for name in ("nvidia", "runc")),
    *({"nodeSelector": {key: "a"}} for key in ("topology.kubernetes.io/zone", "zone-1", "nvidia.com/gpu.product")),
    {"nodeSelector": {"zone": "a", "node-role.kubernetes.io/control-plane": ""}},
    *(
        {"tolerations": [toleration]}
        for toleration in (
            {"operator": "Exists"},
            {"operator": "Exists", "effect": "NoSchedule"},
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
            {"key": "nvidia.com/gpu2", "operator": "Exists"},
            {"key": "spot", "value": "yes"},
            {"key": "spot", "value": "no"},
            {"key": "spot", "operator": "Exists"},
            {"key": "gpu", "operator": "Exists", "effect": "NoSchedule"},
            {"key": "gpu", "operator": "Exists", "effect": "NoExecute"},
            {"key": "team-a", "value": "a", "effect": "NoExecute"},
            {"key": "team-a", "value": "b", "effect": "NoExecute"},
            {"key": "empty"},
            {"key": "empty", "value": "x"},
        )
    ),
    {},
]
HARDWARE: list[Object] = [{}, {"gpus": 0, "gpuResource": "devices.kubevirt.io/kvm"}, {"gpuResource": "example.com/gpu"}]


@pytest.fixture(scope="module")
def ruled(apiserver: ApiServer) -> None:
    """A namespace for each set of rules, with an installation of its own that serves it."""
    for name, allowed in RULES.items():
        apiserver.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
        values: dict[str, object] = {
            "watchNamespaces": [name],
            "scheduling": {
                "allowedPriorityClasses": list(allowed.allowed_priority_classes),
                "allowedTolerations": list(allowed.allowed_tolerations),
                "allowedRuntimeClasses": list(allowed.allowed_runtime_classes),
                "allowedNodeSelectorKeys": list(allowed.allowed_node_selectors),
                "allowedGpuResources": list(allowed.allowed_gpu_resources),
            },
            "rbac": {"aggregateToUserRoles": False},
        }
        grant(apiserver, name, release=name, **values)

    def in_force() -> bool:
        refused = job("rules-default", scheduling={"priorityClassName": "system-node-critical"})
        closed = job("rules-effect", scheduling={"priorityClassName": "system-node-critical"})
        return all(
            DENIED in apiserver.kubectl("create", "--dry-run=server", "-f", "-", manifest=item).stderr
            for item in (refused, closed)
        )

    until(in_force, seconds=180, what="the rules in force")


@pytest.mark.usefixtures("ruled")
@pytest.mark.parametrize("name", RULES)
def test_the_policy_decides_as_the_operator_does(apiserver: ApiServer, name: str) -> None:
    cases = [(scheduling, {}) for scheduling in ASKED] + [({}, hardware) for hardware in HARDWARE]
    manifests, expected = [], {}
    for number, (scheduling, resources) in enumerate(cases):
        changes = {"scheduling": scheduling, "resources": resources}
        for make, kind in ((job, "finetunejob"), (pool, "servingpool")):
            manifests.append(make(name, f"case-{number}", **changes))
            sentence = scheduling_violation(
                Scheduling.model_validate(scheduling), Resources.model_validate(resources), RULES[name]
            )
            expected[f"{kind}.tunesmith.dev/case-{number}"] = sentence is None
    done = apiserver.kubectl(
        *("create", "--dry-run=server", "--output=name", "-f", "-"),
        manifest={"apiVersion": "v1", "kind": "List", "items": manifests},
    )
    admitted = set(done.stdout.split())
    assert admitted == {what for what, allowed in expected.items() if allowed}, done.stderr
    assert done.stderr.count(DENIED) == len(expected) - len(admitted), done.stderr


@pytest.mark.usefixtures("ruled")
def test_objects_that_an_older_policy_admitted_can_still_be_changed(
    apiserver: ApiServer,
) -> None:
    apiserver.apply(job("rules-open", "older", scheduling={"priorityClassName": "batch"}))
    values: dict[str, object] = {"watchNamespaces": ["rules-open"], "rbac": {"aggregateToUserRoles": False}}
    grant(apiserver, "rules-open", release="rules-open", **values)

    def shorter() -> bool:
        again = job("rules-open", "newer", scheduling={"priorityClassName": "batch"})
        return DENIED in apiserver.kubectl("create", "--dry-run=server", "-f", "-", manifest=again).stderr

    until(shorter, seconds=180, what="the shorter list in force")
    where = ("finetunejob", "older", "-n", "rules-open")
    assert apiserver.kubectl("label", *where, "a=b").returncode == 0
    done = apiserver.kubectl("patch", *where, "--type=merge", "-p", '{"spec": {"suspend": true}}')
    assert done.returncode == 0, done.stderr
