"""Both charts against a real API server: its schemas accept them, it installs and upgrades them."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from e2e.cluster import binaries
from tests.controlplane.apiserver import ApiServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Helm = Callable[..., subprocess.CompletedProcess[str]]
    Template = Callable[..., list[dict[str, Any]]]

REPOSITORY = Path(__file__).resolve().parents[2]
SYSTEM, MODELS = "tunesmith-system", "models"
VALUES = {"store": "s3://bucket/store", "images": {"registry": "registry.example"}}
POOL = {"modelName": "base", "baseModel": {"uri": "s3://bucket/base"}}
ADAPTER = {"adapterFrom": {"fineTuneJob": {"name": "job"}}, "pool": {"name": "shared"}}

OPTIONAL = {
    "gateway": {
        "ingress": {
            "enabled": True,
            "className": "nginx",
            "annotations": {"nginx.ingress.kubernetes.io/proxy-buffering": "off"},
            "host": "llm.example.com",
            "tlsSecretName": "llm-tls",
        },
        "httpRoute": {
            "enabled": True,
            "annotations": {"example.com/team": "platform"},
            "parentRefs": [{"name": "public", "namespace": "gateways", "sectionName": "https"}],
            "hostnames": ["llm.example.com", "*.llm.example.com"],
            "requestTimeout": "0s",
        },
        "tracing": {"endpoint": "http://collector.observability:4318"},
    },
    "metrics": {
        "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}, "interval": "30s"},
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}, "interval": "1m30s"},
    },
    "test": {"model": "team-a/support", "keySecret": {"name": "test-key"}},
}
"""Values that add objects to the release."""
CUSTOM_RESOURCES = {
    ("github.com/prometheus-operator/prometheus-operator@v0.85.0", "h1:M5xLCLEoaW2IJfnuCwFzzpL+jSVQu3KGT84Pye+fW8s="): [
        f"example/prometheus-operator-crd/monitoring.coreos.com_{plural}.yaml"
        for plural in ("podmonitors", "servicemonitors")
    ],
    ("sigs.k8s.io/gateway-api@v1.6.3", "h1:lKpJa5bGlraC/QeACvCpsHLdmO6y0iKfzVl6gzaFEYc="): [
        "config/crd/standard/gateway.networking.k8s.io_httproutes.yaml"
    ],
}
"""Files of CustomResourceDefinitions that the chart's optional objects need, by the Go module that has them."""

pytestmark = pytest.mark.controlplane

DEFINITIONS = "_definitions.json"
# Written as strings or numbers, which the API server's own document leaves out.
LOOSE = ("io.k8s.apimachinery.pkg.util.intstr.IntOrString", "io.k8s.apimachinery.pkg.api.resource.Quantity")


def write_schemas(openapi: dict[str, Any], folder: Path) -> None:
    """One strict schema per kind, `<kind>-<group>-<version>.json`, from the API server's own `/openapi/v2`."""
    definitions = {name: strict(node) for name, node in openapi["definitions"].items()}
    for name in LOOSE:
        definitions[name] = {"type": ["string", "number"]}
    (folder / DEFINITIONS).write_text(json.dumps({"definitions": definitions}))
    for name, node in definitions.items():
        for kind in node.get("x-kubernetes-group-version-kind", []):
            group = kind["group"].split(".")[0]
            file = "-".join(part for part in (kind["kind"].lower(), group, kind["version"]) if part)
            (folder / f"{file}.json").write_text(json.dumps({"$ref": f"{DEFINITIONS}#/definitions/{name}"}))


def strict(definition: dict[str, Any]) -> dict[str, Any]:
    """The definition, closed against unknown fields where it lists its fields."""
    open_ended = definition.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in definition
    if "properties" not in definition or open_ended:
        return definition
    return definition | {"additionalProperties": False}


@pytest.fixture(scope="module")
def kubernetes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with ApiServer(tmp_path_factory.mktemp("apiserver")) as server:
        for name in (SYSTEM, MODELS):
            labels = {"pod-security.kubernetes.io/enforce": "restricted"}
            server.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
        for path in custom_resources():
            server.apply(path.read_text())
        yield server


def custom_resources() -> Iterator[Path]:
    """The files of `CUSTOM_RESOURCES`, of the modules' pinned contents."""
    for (module, checksum), names in CUSTOM_RESOURCES.items():
        command = ["go", "mod", "download", "-json", module]
        environment = binaries.go_environment()
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, timeout=600)
        found = json.loads(done.stdout)
        assert found["Sum"] == checksum
        yield from (Path(found["Dir"]) / name for name in names)


def complete_openapi(kubernetes: ApiServer) -> dict[str, Any]:
    """The API server's OpenAPI document, once it has the custom resources, some time after their creation."""
    deadline = time.monotonic() + 120
    while True:
        openapi: dict[str, Any] = json.loads(kubernetes.kubectl("get", "--raw", "/openapi/v2").stdout)
        missing = {"HTTPRoute", "PodMonitor", "ServiceMonitor"} - {
            kind["kind"]
            for node in openapi["definitions"].values()
            for kind in node.get("x-kubernetes-group-version-kind", [])
        }
        if not missing:
            return openapi
        assert time.monotonic() < deadline, f"no schema of {missing}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def conforms(
    kubernetes: ApiServer, kubeconform: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    schemas = tmp_path_factory.mktemp("schemas")
    write_schemas(complete_openapi(kubernetes), schemas)

    def run(documents: list[dict[str, Any]]) -> dict[str, Any]:
        done = subprocess.run(
            [
                kubeconform,
                *("-strict", "-summary", "-output", "json"),
                *("-schema-location", f"{schemas}/{{{{ .ResourceKind }}}}{{{{ .KindSuffix }}}}.json"),
                *(
                    "-schema-location",
                    f"{REPOSITORY}/crds/schemas/{{{{ .ResourceKind }}}}_{{{{ .ResourceAPIVersion }}}}.json",
                ),
                "-",
            ],
            check=False,
            capture_output=True,
            text=True,
            input=yaml.safe_dump_all(documents),
            timeout=60,
        )
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    return run


def test_every_document_is_valid_and_none_is_skipped(
    conforms: Callable[..., dict[str, Any]], template: Template
) -> None:
    documents = template("tunesmith")
    documents += template("tunesmith", OPTIONAL)
    documents += template("adapters", {"pools": {"shared": POOL}, "adapters": {"first": ADAPTER}})
    for path in (REPOSITORY / "examples").glob("*.yaml"):
        if not path.name.startswith("values"):
            documents += yaml.safe_load_all(path.read_text())
    result = conforms(documents)
    problems = [(entry["kind"], entry["name"], entry["msg"]) for entry in result["resources"]]
    assert result["summary"] == {"valid": len(documents), "invalid": 0, "errors": 0, "skipped": 0}, problems


def test_the_check_itself_finds_a_field_that_does_not_exist(
    conforms: Callable[..., dict[str, Any]], template: Template
) -> None:
    documents = template("tunesmith")
    deployment = next(document for document in documents if document["kind"] == "Deployment")
    deployment["spec"]["replicaz"] = 2
    assert conforms(documents)["summary"]["invalid"] == 1


def test_an_api_server_accepts_the_optional_objects(kubernetes: ApiServer, template: Template) -> None:
    """Rules in the CRDs' schemas and the pod security standard `restricted` count as well."""
    usual = {(document["kind"], document["metadata"]["name"]) for document in template("tunesmith")}
    added = [
        document
        for document in template("tunesmith", OPTIONAL)
        if (document["kind"], document["metadata"]["name"]) not in usual
    ]
    assert sorted(document["kind"] for document in added) == [
        *("HTTPRoute", "Ingress", "Pod", "PodMonitor", "Service", "Service", "ServiceMonitor", "ServiceMonitor")
    ]
    for document in added:
        kubernetes.apply(document, "--dry-run=server")


def test_install_upgrade_uninstall_and_install_again_keep_the_custom_resources(
    kubernetes: ApiServer, helm: Helm
) -> None:
    def release(verb: str, name: str, namespace: str, chart: str = "", values: dict[str, Any] | None = None) -> None:
        where = ("--kubeconfig", str(kubernetes.kubeconfig), "--namespace", namespace)
        what = (str(REPOSITORY / "charts" / chart), "--values", "-") if chart else ()
        done = helm(verb, name, *what, *where, stdin=yaml.safe_dump(values or {}))
        assert done.returncode == 0, done.stderr

    def uids() -> dict[str, str]:
        items = kubernetes.get("spool,adep,ftj", "--all-namespaces")["items"]
        return {f"{item['kind']}/{item['metadata']['name']}": item["metadata"]["uid"] for item in items}

    adapters = {"pools": {"shared": POOL}, "adapters": {"first": ADAPTER}}
    release("install", "tunesmith", SYSTEM, "tunesmith", VALUES)
    kubernetes.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
    release("install", "adapters", MODELS, "adapters", adapters)
    kubernetes.apply(
        {
            "apiVersion": "tunesmith.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": "job", "namespace": MODELS},
            "spec": {
                "baseModel": {"uri": "s3://bucket/base"},
                "dataset": {"train": [{"uri": "s3://bucket/rows.jsonl"}]},
                "method": {"lora": {}},
            },
        }
    )
    before = uids()
    assert set(before) == {"ServingPool/shared", "AdapterDeployment/first", "FineTuneJob/job"}

    release("upgrade", "tunesmith", SYSTEM, "tunesmith", {**VALUES, "gateway": {"replicas": 3}})
    assert kubernetes.get("deployment", "tunesmith-gateway", "-n", SYSTEM)["spec"]["replicas"] == 3
    assert uids() == before

    kubernetes.kubectl("scale", "adep/first", "-n", MODELS, "--replicas=2")
    release("upgrade", "adapters", MODELS, "adapters", adapters)
    assert kubernetes.get("adep", "first", "-n", MODELS)["spec"]["replicas"] == 2
    assert uids() == before

    release("uninstall", "tunesmith", SYSTEM)
    assert uids() == before
    release("install", "tunesmith", SYSTEM, "tunesmith", VALUES)
    assert uids() == before
