"""Optional objects of the chart `tunesmith`: access of clients and of Prometheus, and the test of a release."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.charts.test_tunesmith import COMPLETE, container_of, of_kind

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    Helm = Callable[..., subprocess.CompletedProcess[str]]
    Template = Callable[..., list[dict[str, Any]]]

INGRESS = {"enabled": True, "host": "llm.example.com"}
ROUTE = {"enabled": True, "parentRefs": [{"name": "public", "namespace": "gateways"}]}
TOKEN = {"credentials": {"name": "tunesmith-metrics-token", "key": "token"}}


def test_none_is_there_by_default(template: Template) -> None:
    documents = template("tunesmith")
    assert not of_kind(documents, "Ingress", "HTTPRoute", "ServiceMonitor", "PodMonitor", "Pod")
    assert set(of_kind(documents, "Service")) == {"tunesmith-gateway"}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"gateway": {"ingress": {"enabled": True}}}, "gateway.ingress.host is empty: name the host"),
        ({"gateway": {"ingress": {"enabled": True, "host": "https://llm.example.com"}}}, "host"),
        ({"gateway": {"httpRoute": {"enabled": True}}}, "gateway.httpRoute.parentRefs is empty: name the Gateway"),
        ({"gateway": {"httpRoute": {**ROUTE, "requestTimeout": "forever"}}}, "requestTimeout"),
        ({"gateway": {"tracing": {"endpoint": "collector:4317"}}}, "endpoint"),
        ({"gateway": {"tracing": {"samplingRatio": 2}}}, "samplingRatio"),
        ({"metrics": {"podMonitor": {"interval": "often"}}}, "interval"),
        ({"test": {"model": "support"}}, "test.keySecret.name is empty: name the Secret with the API key"),
    ],
)
def test_impossible_values_are_refused_by_name(rendered: Helm, values: dict[str, Any], sentence: str) -> None:
    done = rendered("tunesmith", {**COMPLETE, **values})
    assert done.returncode != 0
    assert sentence in done.stderr


def test_an_ingress_always_terminates_tls(template: Template) -> None:
    for secret in ("", "llm-tls"):
        documents = template("tunesmith", {"gateway": {"ingress": {**INGRESS, "tlsSecretName": secret}}})
        spec = of_kind(documents, "Ingress")["tunesmith-gateway"]["spec"]
        assert spec["tls"] == [{"hosts": ["llm.example.com"], **({"secretName": secret} if secret else {})}]
        assert "--gateway-url=https://llm.example.com" in container_of(documents, "operator")["command"]


def test_the_external_url_comes_before_the_host_of_the_ingress(template: Template) -> None:
    values = {"gateway": {"ingress": INGRESS, "externalUrl": "https://example.com/llm"}}
    assert "--gateway-url=https://example.com/llm" in container_of(template("tunesmith", values), "operator")["command"]


def test_routes_lead_to_the_gateways_service(template: Template) -> None:
    values = {"gateway": {"ingress": INGRESS, "httpRoute": ROUTE, "service": {"port": 8000}}}
    documents = template("tunesmith", values)
    [port] = of_kind(documents, "Service")["tunesmith-gateway"]["spec"]["ports"]
    [rule] = of_kind(documents, "Ingress")["tunesmith-gateway"]["spec"]["rules"]
    assert rule["http"]["paths"][0]["backend"]["service"] == {
        "name": "tunesmith-gateway",
        "port": {"name": port["name"]},
    }
    [rule] = of_kind(documents, "HTTPRoute")["tunesmith-gateway"]["spec"]["rules"]
    assert rule["backendRefs"] == [{"name": "tunesmith-gateway", "port": port["port"]}]
    assert "timeouts" not in rule


@pytest.mark.parametrize("kind", ["PodMonitor", "ServiceMonitor"])
def test_monitors_find_the_ports_of_metrics(template: Template, kind: str) -> None:
    """Each selects the pods or the Service that have the port, and no others of the release."""
    values = {
        "metrics": {
            "podMonitor": {"enabled": kind == "PodMonitor"},
            "serviceMonitor": {"enabled": kind != "PodMonitor"},
        }
    }
    documents = template("tunesmith", values)
    monitors = of_kind(documents, kind)
    for component in ("operator", "gateway"):
        spec = monitors[f"tunesmith-{component}"]["spec"]
        [endpoint] = spec["endpoints" if kind == "ServiceMonitor" else "podMetricsEndpoints"]
        assert endpoint["authorization"] == TOKEN
        assert endpoint["port"] in {port["name"] for port in container_of(documents, component)["ports"]}
        wanted = spec["selector"]["matchLabels"].items()
        if kind == "PodMonitor":
            deployments = of_kind(documents, "Deployment").values()
            selected = [
                found for found in deployments if wanted <= found["spec"]["template"]["metadata"]["labels"].items()
            ]
            assert [found["metadata"]["name"] for found in selected] == [f"tunesmith-{component}"]
        else:
            services = of_kind(documents, "Service").values()
            [service] = [found for found in services if wanted <= found["metadata"]["labels"].items()]
            [port] = service["spec"]["ports"]
            assert (port["name"], service["spec"]["clusterIP"]) == (endpoint["port"], "None")
            [container_port] = [
                found["containerPort"]
                for found in container_of(documents, component)["ports"]
                if found["name"] == port["targetPort"]
            ]
            assert port["port"] == container_port


def test_pods_of_pools_are_monitored_in_the_served_namespaces_with_the_token(template: Template) -> None:
    values = {"metrics": {"podMonitor": {"enabled": True, "labels": {"release": "p"}}, "requireToken": False}}
    for namespaces, selector in (([], {"any": True}), (["team-a"], {"matchNames": ["team-a"]})):
        monitors = of_kind(template("tunesmith", {**values, "watchNamespaces": namespaces}), "PodMonitor")
        pools = monitors["tunesmith-pools"]
        assert pools["metadata"]["labels"]["release"] == "p"
        assert pools["spec"]["namespaceSelector"] == selector
        [endpoint] = pools["spec"]["podMetricsEndpoints"]
        assert endpoint == {"port": "agent", "authorization": TOKEN}
        assert "authorization" not in monitors["tunesmith-gateway"]["spec"]["podMetricsEndpoints"][0]


def test_both_monitors_count_nothing_twice(template: Template) -> None:
    values = {"metrics": {"podMonitor": {"enabled": True}, "serviceMonitor": {"enabled": True}}}
    documents = template("tunesmith", values)
    assert set(of_kind(documents, "PodMonitor")) == {"tunesmith-pools"}
    assert set(of_kind(documents, "ServiceMonitor")) == {"tunesmith-operator", "tunesmith-gateway"}


def test_the_test_of_a_release_asks_the_gateway_for_one_token(template: Template) -> None:
    values = {"test": {"model": "team-a/support", "keySecret": {"name": "test-key", "key": "token"}}}
    documents = template("tunesmith", {**values, "networkPolicy": {"clientsFrom": [{"podSelector": {}}]}})
    pod = of_kind(documents, "Pod")["tunesmith-test-answer"]
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    [container] = pod["spec"]["containers"]
    assert container["image"] == container_of(documents, "gateway")["image"]
    assert container["command"] == [
        *("tunesmith", "chat", "team-a/support", "--message=Hello", "--max-tokens=1"),
        "--url=http://tunesmith-gateway.tunesmith-system.svc",
    ]
    key = next(entry for entry in container["env"] if entry["name"] == "TUNESMITH_API_KEY")
    assert key["valueFrom"]["secretKeyRef"] == {"name": "test-key", "key": "token"}
    policy = of_kind(documents, "NetworkPolicy")["tunesmith-gateway"]
    clients = policy["spec"]["ingress"][0]["from"]
    assert any(
        peer["podSelector"].get("matchLabels", {}).items() <= pod["metadata"]["labels"].items()
        and peer["podSelector"].get("matchLabels")
        for peer in clients
    )
