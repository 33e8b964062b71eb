"""The values of the chart and the settings of the programs that it deploys: each value arrives in the field it sets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tunesmith.contracts.settings import ChartValue
from tunesmith.controller.settings import OperatorSettings
from tunesmith.gateway.settings import GatewaySettings
from tunesmith.settings import ProgramSettings, read, source_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Template = Callable[..., list[dict[str, Any]]]

PROGRAMS: dict[str, type[ProgramSettings]] = {"operator": OperatorSettings, "gateway": GatewaySettings}
PEER = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
OTHER: dict[str, Any] = {
    "store": "gs://other/store",
    "watchNamespaces": ["team-a", "team-b"],
    "images.pullPolicy": "Always",
    "trainer.allowedAddresses": ["10.0.0.7/32", "fd00::/8"],
    "trainer.lmEvalTasks": "/opt/tasks of mine",
    "trainer.storage": "7Gi",
    "scheduling.allowedPriorityClasses": ["batch", "team-*"],
    "scheduling.allowedTolerations": [],
    "scheduling.allowedRuntimeClasses": ["kata"],
    "scheduling.allowedNodeSelectorKeys": ["zone"],
    "scheduling.allowedGpuResources": ["*"],
    "prometheus.url": "http://prometheus.monitoring:9090",
    "gateway.corsOrigins": ["https://app.example.com"],
    "gateway.oidc.issuer": "https://login.example.com/realms/main",
    "gateway.oidc.audience": "tunesmith",
    "gateway.oidc.namespaceClaim": "namespaces",
    "gateway.tracing.endpoint": "http://collector.observability:4318",
    "gateway.tracing.samplingRatio": 0.5,
    "serving.sharedPoolNamespaces": ["models"],
    "serving.adapterStorage": "8Gi",
    "serving.baseModelStorage": "64Gi",
}
"""A value that is not the default, by path; those of other numbers and booleans follow from their defaults."""


def placed(model: type[ProgramSettings]) -> Iterator[tuple[str, ChartValue]]:
    """The fields that a value sets as it is."""
    for field in model.model_fields:
        place = source_of(model, field)
        if isinstance(place, ChartValue) and not place.expression:
            yield field, place


def other(model: type[ProgramSettings], field: str, place: ChartValue) -> Any:
    default = model.model_fields[field].default
    if place.path in OTHER:
        return OTHER[place.path]
    if isinstance(default, bool):
        return not default
    assert isinstance(default, int | float), f"{place.path} has no value in OTHER"
    return default + 1


def settings(template: Template, component: str, values: dict[str, Any]) -> ProgramSettings:
    for document in template("tunesmith", values):
        if document["kind"] == "Deployment" and document["metadata"]["name"] == f"tunesmith-{component}":
            command = document["spec"]["template"]["spec"]["containers"][0]["command"]
            assert command[0] == f"tunesmith-{component}"
            return read(PROGRAMS[component], command[1:])
    raise AssertionError(component)


@pytest.mark.parametrize("component", PROGRAMS)
def test_every_value_arrives_in_its_field(template: Template, component: str) -> None:
    model = PROGRAMS[component]
    values: dict[str, Any] = {}
    expected = {field: other(model, field, place) for field, place in placed(model)}
    for field, place in placed(model):
        *sections, name = place.path.split(".")
        section = values
        for key in sections:
            section = section.setdefault(key, {})
        section[name] = expected[field]
    found = settings(template, component, values)
    arrived = {field: getattr(found, field) for field in expected}
    assert {key: list(value) if isinstance(value, tuple) else value for key, value in arrived.items()} == expected


@pytest.mark.parametrize("component", PROGRAMS)
def test_the_charts_defaults_are_the_programs(template: Template, component: str) -> None:
    model = PROGRAMS[component]
    found = settings(template, component, {})
    defaults = {
        field: info.default
        for field, info in model.model_fields.items()
        if not info.is_required() and info.default_factory is None and field not in {"gateway_url", "replicas"}
    }
    assert {field: getattr(found, field) for field in defaults} == defaults


def test_values_set_by_the_release(template: Template) -> None:
    found = settings(
        template, "operator", {"networkPolicy": {"metricsFrom": [PEER]}, "images": {"trainer": {"tag": "7"}}}
    )
    assert isinstance(found, OperatorSettings)
    assert (found.namespace, found.instance) == ("tunesmith-system", "tunesmith")
    assert found.metrics_from == (PEER,)
    assert found.trainer_image == "registry.example/tunesmith/trainer:7"
    assert found.gateway_url == "http://tunesmith-gateway.tunesmith-system.svc"


@pytest.mark.parametrize(
    ("component", "ports"),
    [
        ("operator", {"probes": "probe_port", "metrics": "metrics_port"}),
        ("gateway", {"http": "port", "internal": "internal_port"}),
    ],
)
def test_the_ports_of_the_pods_are_the_programs(template: Template, component: str, ports: dict[str, str]) -> None:
    [deployment] = [
        document
        for document in template("tunesmith")
        if document["kind"] == "Deployment" and document["metadata"]["name"] == f"tunesmith-{component}"
    ]
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    fields = PROGRAMS[component].model_fields
    assert {port["name"]: port["containerPort"] for port in container["ports"]} == {
        name: fields[field].default for name, field in ports.items()
    }
