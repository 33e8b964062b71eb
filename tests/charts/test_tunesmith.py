"""The chart `tunesmith`: rendered objects and refused values."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tunesmith.api.credentials import REPORTING_SECRET, STORE_SECRET
from tunesmith.contracts import installation

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
    ("store", "arguments"),
    [
        ("s3://bucket/store", "--from-literal=AWS_ENDPOINT_URL=https://…"),
        ("gs://bucket/store", "--from-file=GOOGLE_SERVICE_ACCOUNT_KEY=key.json"),
        ("az://container/store", "--from-literal=AZURE_STORAGE_CONNECTION_STRING="),
    ],
)
def test_the_notes_name_the_keys_of_the_store(helm: Helm, tmp_path: Path, store: str, arguments: str) -> None:
    """Helm renders notes only with a cluster: they are rendered as a ConfigMap."""
    chart = tmp_path / "tunesmith"
    shutil.copytree(CHARTS / "tunesmith", chart)
    notes = (chart / "templates/NOTES.txt").read_text()
    document = (
        '{{- define "notes" }}' + notes + "{{ end }}\nkind: ConfigMap\nmetadata: {name: notes}\n"
        'data: {notes: {{ include "notes" . | quote }}}\n'
    )
    (chart / "templates/notes.yaml").write_text(document)
    values = yaml.safe_dump({**COMPLETE, "store": store})
    arguments_of_helm = ("--kube-version", "1.34.0", "--show-only", "templates/notes.yaml", "--values", "-")
    done = helm("template", "t", str(chart), *arguments_of_helm, stdin=values)
    assert done.returncode == 0, done.stderr
    assert arguments in yaml.safe_load(done.stdout)["data"]["notes"]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"store": "/var/lib/adapters"}, "store"),
        ({"store": "abfs://container/adapters"}, "(s3|gs|az)://"),
        ({"operator": {"replicas": 0}}, "replicas"),
        ({"operator": {"replica": 2}}, "replica"),
        ({"gateway": {"service": {"type": "ExternalName"}}}, "type"),
        (
            {"gateway": {"service": {"nodePort": 30080}}},
            "gateway.service.nodePort is set, but gateway.service.type is not NodePort or LoadBalancer",
        ),
        (
            {"gateway": {"service": {"type": "NodePort", "loadBalancerSourceRanges": ["10.0.0.0/8"]}}},
            "gateway.service.loadBalancerClass and loadBalancerSourceRanges need gateway.service.type LoadBalancer",
        ),
        (
            {"gateway": {"service": {"externalTrafficPolicy": "Local"}}},
            "gateway.service.externalTrafficPolicy is set, but gateway.service.type is not NodePort or LoadBalancer",
        ),
        ({"gateway": {"service": {"type": "LoadBalancer", "loadBalancerSourceRanges": ["everyone"]}}}, "everyone"),
        ({"gateway": {"drainSeconds": -1}}, "drainSeconds"),
        ({"gateway": {"externalUrl": "llm.example.com"}}, "externalUrl"),
        ({"gateway": {"externalUrl": "https://llm.example.com/v1"}}, "externalUrl"),
        ({"gateway": {"maxUnavailable": 0}}, "maxUnavailable"),
        ({"gateway": {"limits": {"maxSequence": 1}}}, "maxSequence"),
        ({"gateway": {"oidc": {"issuer": "http://login.example.com"}}}, "issuer"),
        (
            {"gateway": {"oidc": {"issuer": "https://login.example.com"}}},
            "gateway.oidc.issuer needs gateway.oidc.audience and gateway.oidc.namespaceClaim",
        ),
        ({"gateway": {"redis": {"url": "redis://:secret@redis"}}}, "url"),
        (
            {"gateway": {"redis": {"caKey": "ca.crt"}}},
            "gateway.redis.caKey is set, but gateway.redis.secretName is not",
        ),
        ({"gateway": {"topologySpread": [{"topologyKey": "zone"}]}}, "maxSkew"),
        ({"watchNamespaces": ["Team_A"]}, "Team_A"),
        ({"networkPolicy": {"metricsFrom": [{"namespace": "monitoring"}]}}, "namespace"),
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


def test_user_roles_can_be_omitted(template: Template) -> None:
    roles = of_kind(template("tunesmith", {"rbac": {"aggregateToUserRoles": False}}), "ClusterRole")
    assert set(roles) == {
        *("tunesmith-operator", "tunesmith-operator-cluster", "tunesmith-gateway", "tunesmith-gateway-cluster")
    }


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
    assert "--agent-image=other.example:5000/tunesmith/agent:0.2.0" in operator["command"]
    assert any(part.startswith("--engine-image=docker.io/vllm/vllm-openai:v") for part in operator["command"])


def test_the_operator_selects_gateways_by_all_labels_of_their_pods(template: Template) -> None:
    deployments = of_kind(template("tunesmith", {}), "Deployment")
    labels = deployments["tunesmith-gateway"]["spec"]["template"]["metadata"]["labels"]
    command = deployments["tunesmith-operator"]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert f"--instance={labels['app.kubernetes.io/instance']}" in command


def test_the_url_of_redis_is_mounted_from_its_secret(template: Template) -> None:
    def pod(redis: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
        documents = template("tunesmith", {"gateway": {"redis": redis}})
        spec = of_kind(documents, "Deployment")["tunesmith-gateway"]["spec"]["template"]["spec"]
        return spec["containers"][0]["command"], {volume["name"]: volume for volume in spec["volumes"]}

    command, volumes = pod({})
    assert "redis" not in volumes
    assert not any(part.startswith("--redis-url-file") for part in command)
    command, volumes = pod({"secretName": "limits", "urlKey": "address", "caKey": "authority", "timeoutSeconds": 1})
    assert {
        "--redis-url-file=/etc/tunesmith/redis/url",
        "--redis-ca-file=/etc/tunesmith/redis/ca.crt",
        "--redis-timeout-seconds=1",
    } <= set(command)
    assert volumes["redis"]["secret"] == {
        "secretName": "limits",
        "defaultMode": 0o440,
        "items": [{"key": "address", "path": "url"}, {"key": "authority", "path": "ca.crt"}],
    }


def test_gateway_service_and_its_url_agree(template: Template) -> None:
    documents = template("tunesmith", {"gateway": {"service": {"type": "NodePort", "nodePort": 30080, "port": 8000}}})
    port = of_kind(documents, "Service")["tunesmith-gateway"]["spec"]["ports"][0]
    assert (port["port"], port["nodePort"]) == (8000, 30080)
    operator = of_kind(documents, "Deployment")["tunesmith-operator"]["spec"]["template"]["spec"]["containers"][0]
    assert "--gateway-url=http://tunesmith-gateway.tunesmith-system.svc:8000" in operator["command"]


def test_the_external_url_is_published(template: Template) -> None:
    url = "https://llm.example.com"
    documents = template("tunesmith", {"gateway": {"externalUrl": url}})
    assert f"--gateway-url={url}" in container_of(documents, "operator")["command"]
    published = of_kind(documents, "ConfigMap")[installation.CONFIG_MAP_NAME]
    assert installation.parse_installation(published) == installation.InstallationInfo(url, ("tunesmith-system",))
    inside = of_kind(template("tunesmith"), "ConfigMap")[installation.CONFIG_MAP_NAME]["data"]["url"]
    assert inside == "http://tunesmith-gateway.tunesmith-system.svc"


def test_every_user_may_read_the_installation_and_shared_pools(template: Template) -> None:
    values = {"serving": {"sharedPoolNamespaces": ["models", "more"]}}
    documents = template("tunesmith", values)
    everybody = [
        document["metadata"]
        for document in documents
        if document["kind"] == "RoleBinding" and document["subjects"][0]["kind"] == "Group"
    ]
    assert {(metadata["namespace"], metadata["name"]) for metadata in everybody} == {
        ("tunesmith-system", "tunesmith-installation"),
        ("models", "tunesmith-shared-pools"),
        ("more", "tunesmith-shared-pools"),
    }
    assert set(rules(documents, "tunesmith-installation")) == {("", "configmaps", "get")}
    [rule] = of_kind(documents, "Role")["tunesmith-installation"]["rules"]
    assert rule["resourceNames"] == [installation.CONFIG_MAP_NAME]
    assert {verb for _, _, verb in rules(documents, "tunesmith-shared-pools")} == {"get", "list", "watch"}
    closed = template("tunesmith", {**values, "rbac": {"discovery": False}})
    bindings = [document for document in closed if document["kind"].endswith("RoleBinding")]
    assert {subject["kind"] for document in bindings for subject in document["subjects"]} == {"ServiceAccount"}


def container_of(documents: list[dict[str, Any]], component: str) -> dict[str, Any]:
    pod = of_kind(documents, "Deployment")[f"tunesmith-{component}"]["spec"]["template"]["spec"]
    found: dict[str, Any] = pod["containers"][0]
    return found


def test_the_gateways_service_can_be_a_clouds_load_balancer(template: Template) -> None:
    values = {
        "type": "LoadBalancer",
        "annotations": {"service.beta.kubernetes.io/aws-load-balancer-type": "external"},
        "loadBalancerClass": "service.k8s.aws/nlb",
        "loadBalancerSourceRanges": ["203.0.113.0/24"],
        "externalTrafficPolicy": "Local",
    }
    service = of_kind(template("tunesmith", {"gateway": {"service": values}}), "Service")["tunesmith-gateway"]
    assert service["metadata"]["annotations"] == values["annotations"]
    assert {key: service["spec"][key] for key in values if key != "annotations"} == {
        key: value for key, value in values.items() if key != "annotations"
    }


def test_services_have_every_family_of_the_cluster(template: Template) -> None:
    services = of_kind(template("tunesmith"), "Service")
    assert [service["spec"]["ipFamilyPolicy"] for service in services.values()] == ["PreferDualStack"]


def test_the_grace_period_of_gateway_pods_follows_their_drain(template: Template) -> None:
    for values, drain, grace in (({}, 600, 620), ({"drainSeconds": 30, "lingerSeconds": 10}, 30, 55)):
        documents = template("tunesmith", {"gateway": values})
        pod = of_kind(documents, "Deployment")["tunesmith-gateway"]["spec"]["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] == grace
        assert f"--drain-seconds={drain}" in container_of(documents, "gateway")["command"]


def test_unhealthy_pods_do_not_block_a_drain(template: Template) -> None:
    budgets = of_kind(template("tunesmith", {"gateway": {"maxUnavailable": "20%"}}), "PodDisruptionBudget")
    assert {name: budget["spec"]["maxUnavailable"] for name, budget in budgets.items()} == {
        "tunesmith-operator": 1,
        "tunesmith-gateway": "20%",
    }
    assert {budget["spec"]["unhealthyPodEvictionPolicy"] for budget in budgets.values()} == {"AlwaysAllow"}


def test_pods_are_spread_according_to_the_values(template: Template) -> None:
    zones = [{"topologyKey": "topology.kubernetes.io/zone", "maxSkew": 2, "whenUnsatisfiable": "DoNotSchedule"}]
    deployments = of_kind(template("tunesmith", {"gateway": {"topologySpread": zones}}), "Deployment")
    for component, expected in (("gateway", zones[0]), ("operator", {"topologyKey": "kubernetes.io/hostname"})):
        deployment = deployments[f"tunesmith-{component}"]["spec"]
        [spread] = deployment["template"]["spec"]["topologySpreadConstraints"]
        assert expected.items() <= spread.items()
        assert spread["labelSelector"] == deployment["selector"]


def test_with_listed_namespaces_rights_are_limited_to_them_and_nodes(template: Template) -> None:
    documents = template(
        "tunesmith",
        {"watchNamespaces": ["team-a", "team-b"], "rbac": {"aggregateToUserRoles": False, "discovery": False}},
    )
    cluster_roles = of_kind(documents, "ClusterRole")
    assert set(cluster_roles) == {"tunesmith-operator-cluster", "tunesmith-gateway-cluster"}
    labels = {("", "namespaces", "list"), ("", "namespaces", "watch")}
    assert set(rules(documents, "tunesmith-gateway-cluster")) == labels
    assert set(rules(documents, "tunesmith-operator-cluster")) == {
        *labels,
        ("", "namespaces", "get"),
        ("", "nodes", "list"),
    }
    named = [
        rule["resourceNames"]
        for role in cluster_roles.values()
        for rule in role["rules"]
        if rule["resources"] == ["namespaces"]
    ]
    assert sorted(named) == [["kube-system"], ["team-a", "team-b"], ["team-a", "team-b"]]
    for kind in ("Role", "RoleBinding"):
        places = {
            (document["metadata"]["namespace"], document["metadata"]["name"])
            for document in documents
            if document["kind"] == kind
        }
        assert places == {
            (namespace, f"tunesmith-{component}{suffix}")
            for component in ("operator", "gateway")
            for namespace, suffix in (
                ("tunesmith-system", ""),
                ("team-a", "-tunesmith-system"),
                ("team-b", "-tunesmith-system"),
            )
        }
    for component in ("operator", "gateway"):
        assert "--watch-namespaces=team-a,team-b" in container_of(documents, component)["command"]
    everywhere = template("tunesmith")
    for component in ("operator", "gateway"):
        assert not [part for part in container_of(everywhere, component)["command"] if "watch-namespaces" in part]


def test_network_policies_admit_the_flows_and_no_others(template: Template) -> None:
    monitoring = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}

    def admitted(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
        policies = of_kind(template("tunesmith", {"networkPolicy": values}), "NetworkPolicy")
        return {
            f"{name.removeprefix('tunesmith-')}/{port['port']}": rule.get("from")
            for name, policy in policies.items()
            for rule in policy["spec"]["ingress"]
            for port in rule["ports"]
        }

    labels = {"app.kubernetes.io/name": "tunesmith", "app.kubernetes.io/instance": "tunesmith"}
    operator = {"podSelector": {"matchLabels": {**labels, "app.kubernetes.io/component": "operator"}}}
    assert admitted({}) == {"gateway/http": None, "gateway/internal": [operator]}
    assert admitted({"metricsFrom": [monitoring], "clientsFrom": [monitoring]}) == {
        "operator/metrics": [monitoring],
        "gateway/http": [monitoring],
        "gateway/internal": [operator, monitoring],
    }
    off = template("tunesmith", {"networkPolicy": {"enabled": False}})
    assert not of_kind(off, "NetworkPolicy")
    assert "--no-network-policies" in container_of(off, "operator")["command"]


def test_admission_policies_name_the_secrets_that_pods_get() -> None:
    templates = CHARTS / "tunesmith/templates"
    assert f"source.secretRef.name == '{STORE_SECRET}'" in (templates / "admission-operator.yaml").read_text()
    assert f"['{STORE_SECRET}', '{REPORTING_SECRET}']" in (templates / "admission-credentials.yaml").read_text()
