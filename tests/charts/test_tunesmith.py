"""The chart `tunesmith`: what it renders, what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tunesmith.contracts.scheduling import DEFAULT_SCHEDULING
from tunesmith.controller.settings import parse

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator

    Helm = Callable[..., subprocess.CompletedProcess[str]]
    Template = Callable[..., list[dict[str, Any]]]

CHARTS = Path(__file__).resolve().parents[2] / "charts"
COMPLETE = {"store": "s3://bucket/store", "images": {"registry": "registry.example"}}


def of_kind(documents: list[dict[str, Any]], *kinds: str) -> dict[str, dict[str, Any]]:
    return {document["metadata"]["name"]: document for document in documents if document["kind"] in kinds}


def rules(documents: list[dict[str, Any]], name: str) -> Iterator[tuple[str, str, str]]:
    for document in documents:
        if document["kind"] in ("Role", "ClusterRole") and document["metadata"]["name"] == name:
            for rule in document["rules"]:
                for group in rule["apiGroups"]:
                    for resource in rule["resources"]:
                        for verb in rule["verbs"]:
                            yield group, resource, verb


@pytest.mark.parametrize("chart", ["tunesmith", "adapters"])
def test_lint_finds_nothing(helm: Helm, chart: str) -> None:
    values = COMPLETE if chart == "tunesmith" else {}
    done = helm("lint", "--strict", str(CHARTS / chart), "--values", "-", stdin=yaml.safe_dump(values))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("store", "store is empty: name the bucket and folder that hold the adapters"),
        ("images", "images.registry is empty: name the registry that holds the image tunesmith/"),
    ],
)
def test_store_and_registry_are_required(rendered: Helm, missing: str, sentence: str) -> None:
    done = rendered("tunesmith", {key: value for key, value in COMPLETE.items() if key != missing})
    assert done.returncode != 0
    assert sentence in done.stderr


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"store": "/var/lib/adapters"}, "store"),
        ({"operator": {"replicas": 0}}, "replicas"),
        ({"operator": {"replica": 2}}, "replica"),
        ({"gateway": {"service": {"type": "LoadBalancer"}}}, "type"),
        (
            {"gateway": {"service": {"nodePort": 30080}}},
            "gateway.service.nodePort is set, but gateway.service.type is not NodePort",
        ),
        (
            {"images": {"operator": {"tag": "1", "digest": "sha256:" + "0" * 64}}},
            "images.operator has both a tag and a digest: keep one of them",
        ),
        ({"images": {"trainer": {"digest": "latest"}}}, "digest"),
        ({"trainer": {"allowedAddresses": ["s3.store.svc"]}}, "allowedAddresses"),
        ({"trainer": {"allowTaskFolders": "false"}}, "allowTaskFolders"),
        ({"scheduling": {"allowedPriorityClasses": ["a b"]}}, "allowedPriorityClasses"),
        ({"scheduling": {"allowedTolerations": ["spot:Never"]}}, "allowedTolerations"),
        ({"imgaes": {}}, "imgaes"),
    ],
)
def test_impossible_values_are_refused_by_name(rendered: Helm, values: dict[str, Any], sentence: str) -> None:
    images = {**COMPLETE["images"], **values.get("images", {})}
    done = rendered("tunesmith", {**COMPLETE, **values, "images": images})
    assert done.returncode != 0
    assert sentence in done.stderr


def test_every_container_is_restricted(template: Template) -> None:
    deployments = of_kind(template("tunesmith"), "Deployment")
    assert set(deployments) == {"tunesmith-operator", "tunesmith-gateway"}
    for deployment in deployments.values():
        pod = deployment["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert all({"emptyDir", "secret"} & set(volume) for volume in pod["volumes"])
        for container in pod["containers"] + pod.get("initContainers", []):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} <= set(container["resources"]["requests"])
            assert "memory" in container["resources"]["limits"]
            assert {"startupProbe", "livenessProbe", "readinessProbe"} <= set(container)


def test_rbac_has_no_wildcard_and_reads_no_foreign_secret(template: Template) -> None:
    documents = template("tunesmith")
    for document in documents:
        for rule in document.get("rules", []) if document["kind"] in ("Role", "ClusterRole") else []:
            assert "*" not in rule["apiGroups"] + rule["resources"] + rule["verbs"]
            assert "nonResourceURLs" not in rule
    cluster_wide = [document for document in documents if document["kind"] == "ClusterRole"]
    for name in ("tunesmith-operator", "tunesmith-gateway"):
        reads = {(resource, verb) for _, resource, verb in rules(cluster_wide, name) if resource == "secrets"}
        assert not reads & {("secrets", "get"), ("secrets", "list"), ("secrets", "watch")}
    assert not {
        verb for _, resource, verb in rules(documents, "tunesmith-gateway") if verb not in ("get", "list", "watch")
    }


@pytest.mark.parametrize(
    ("role", "resource", "writes"),
    [
        ("view", "finetunejobs", False),
        ("view", "servingpools", False),
        ("edit", "finetunejobs", True),
        ("edit", "adapterdeployments", True),
        ("edit", "adapterdeployments/scale", True),
        ("edit", "servingpools", False),
        ("edit", "servingpools/scale", False),
        ("admin", "servingpools", True),
        ("admin", "servingpools/scale", True),
    ],
)
def test_users_write_what_their_role_allows(template: Template, role: str, resource: str, *, writes: bool) -> None:
    roles = of_kind(template("tunesmith"), "ClusterRole")
    label = f"rbac.authorization.k8s.io/aggregate-to-{role}"
    granted = [document for document in roles.values() if document["metadata"]["labels"].get(label) == "true"]
    verbs = {
        verb
        for document in granted
        for _, what, verb in rules([document], document["metadata"]["name"])
        if what == resource
    }
    assert {"get", "list", "watch"} <= verbs
    assert ({"update", "patch"} <= verbs) is writes


def test_user_roles_can_be_left_out(template: Template) -> None:
    roles = of_kind(template("tunesmith", {"rbac": {"aggregateToUserRoles": False}}), "ClusterRole")
    assert set(roles) == {"tunesmith-operator", "tunesmith-gateway"}


def test_crds_are_the_generated_ones_and_outlive_the_release(template: Template) -> None:
    crds = of_kind(template("tunesmith"), "CustomResourceDefinition")
    generated = {}
    for path in sorted((CHARTS.parent / "crds").glob("*.yaml")):
        crd = yaml.safe_load(path.read_text())
        generated[crd["metadata"]["name"]] = crd
    assert set(crds) == set(generated)
    for name, crd in crds.items():
        assert crd["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
        assert crd["spec"] == generated[name]["spec"]
    assert not of_kind(template("tunesmith", {"crds": {"install": False}}), "CustomResourceDefinition")


def test_images_by_tag_digest_and_registry(template: Template) -> None:
    digest = "sha256:" + "1" * 64
    documents = template(
        "tunesmith",
        {
            "images": {
                "operator": {"digest": digest},
                "trainer": {"tag": "7"},
                "agent": {"registry": "other.example:5000"},
            }
        },
    )
    deployments = of_kind(documents, "Deployment")
    operator = deployments["tunesmith-operator"]["spec"]["template"]["spec"]["containers"][0]
    assert operator["image"] == f"registry.example/tunesmith/operator@{digest}"
    assert "--trainer-image=registry.example/tunesmith/trainer:7" in operator["command"]
    assert "--agent-image=other.example:5000/tunesmith/agent:0.1.0" in operator["command"]
    assert any(part.startswith("--engine-image=docker.io/vllm/vllm-openai:v") for part in operator["command"])


def test_the_platforms_evaluation_tasks_reach_the_operator(template: Template) -> None:
    for values, told in (({}, []), ({"trainer": {"lmEvalTasks": "/opt/tasks"}}, ["--lm-eval-tasks=/opt/tasks"])):
        operator = of_kind(template("tunesmith", values), "Deployment")["tunesmith-operator"]
        command = operator["spec"]["template"]["spec"]["containers"][0]["command"]
        assert [part for part in command if part.startswith("--lm-eval-tasks")] == told


def test_tasks_that_jobs_bring_are_allowed_by_the_platform_alone(template: Template) -> None:
    for values, told in (
        ({}, []),
        ({"trainer": {"allowTaskFolders": False}}, []),
        ({"trainer": {"allowTaskFolders": True}}, ["--allow-task-folders"]),
    ):
        operator = of_kind(template("tunesmith", values), "Deployment")["tunesmith-operator"]
        command = operator["spec"]["template"]["spec"]["containers"][0]["command"]
        assert [part for part in command if part.startswith("--allow-task")] == told


def test_the_addresses_that_the_platform_lists_reach_the_operator(template: Template) -> None:
    listed = {"trainer": {"allowedAddresses": ["10.0.0.7/32", "fd00::/8"]}}
    for values, told in (({}, []), (listed, ["--allowed-addresses=10.0.0.7/32,fd00::/8"])):
        operator = of_kind(template("tunesmith", values), "Deployment")["tunesmith-operator"]
        command = operator["spec"]["template"]["spec"]["containers"][0]["command"]
        assert [part for part in command if part.startswith("--allowed-addresses")] == told


def test_where_pods_may_run_reaches_the_operator(template: Template) -> None:
    """The chart's defaults are the operator's own."""
    for values, expected in (
        ({}, DEFAULT_SCHEDULING),
        (
            {"scheduling": {"allowedPriorityClasses": ["batch", "team-*"], "allowedTolerations": []}},
            replace(DEFAULT_SCHEDULING, priority_classes=("batch", "team-*"), tolerations=()),
        ),
    ):
        operator = of_kind(template("tunesmith", values), "Deployment")["tunesmith-operator"]
        command = operator["spec"]["template"]["spec"]["containers"][0]["command"]
        assert parse(command[1:], {}).allowed_scheduling == expected


def test_the_namespaces_of_shared_pools_reach_operator_and_gateway(template: Template) -> None:
    listed = {"serving": {"sharedPoolNamespaces": ["models", "more-models"]}}
    for values, expected in (
        ({}, []),
        ({"serving": None}, []),
        (listed, ["--shared-pool-namespaces=models,more-models"]),
    ):
        deployments = of_kind(template("tunesmith", values), "Deployment")
        for name in ("tunesmith-operator", "tunesmith-gateway"):
            command = deployments[name]["spec"]["template"]["spec"]["containers"][0]["command"]
            assert [part for part in command if part.startswith("--shared-pool")] == expected


def test_the_operator_selects_gateways_by_all_labels_of_their_pods(template: Template) -> None:
    deployments = of_kind(template("tunesmith", {}), "Deployment")
    labels = deployments["tunesmith-gateway"]["spec"]["template"]["metadata"]["labels"]
    command = deployments["tunesmith-operator"]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert f"--instance={labels['app.kubernetes.io/instance']}" in command


def test_gateway_service_and_its_url_agree(template: Template) -> None:
    documents = template("tunesmith", {"gateway": {"service": {"type": "NodePort", "nodePort": 30080, "port": 8000}}})
    port = of_kind(documents, "Service")["tunesmith-gateway"]["spec"]["ports"][0]
    assert (port["port"], port["nodePort"]) == (8000, 30080)
    operator = of_kind(documents, "Deployment")["tunesmith-operator"]["spec"]["template"]["spec"]["containers"][0]
    assert "--gateway-url=http://tunesmith-gateway.tunesmith-system.svc:8000" in operator["command"]
