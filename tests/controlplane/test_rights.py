"""Rights of the chart's identities on an API server. The operator's own flow, in the other modules, has the same."""

from __future__ import annotations

import asyncio
import copy
import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.controlplane.apiserver import until
from tests.controlplane.manifests import job, pool
from tests.controlplane.operatorprocess import Operator
from tests.controlplane.operatorprocess import until as eventually
from tests.controlplane.rights import grant, kubeconfig_of
from tunesmith.cluster.client import Cluster
from tunesmith.cluster.errors import ForbiddenError
from tunesmith.gateway.catalog import Catalog
from tunesmith.gateway.feed import Feed
from tunesmith.gateway.keys import KeyTable

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path

    from tests.controlplane.apiserver import ApiServer

    Kubectl = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.controlplane

SYSTEM, TEAM = "tunesmith-system", "team"
Object = dict[str, Any]
DENIED = "denied request: "
RBAC = "cannot "
LABELS = {"app.kubernetes.io/managed-by": "tunesmith"}
POD_SPEC: Object = {
    "restartPolicy": "Always",
    "automountServiceAccountToken": False,
    "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
    "containers": [
        {
            "name": "main",
            "image": "localhost/agent:1",
            "command": ["tunesmith-agent"],
            "envFrom": [{"secretRef": {"name": "tunesmith-store"}}],
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            },
            "volumeMounts": [
                {"name": "data", "mountPath": "/work"},
                {"name": "hub", "mountPath": "/etc/tunesmith/secrets/hub"},
            ],
        }
    ],
    "volumes": [{"name": "data", "emptyDir": {}}, {"name": "hub", "secret": {"secretName": "hub"}}],
}


def owner(kind: str = "ServingPool") -> Object:
    return {"apiVersion": "tunesmith.dev/v1alpha1", "kind": kind, "name": "small", "uid": "u-1", "controller": True}


def owned(kind: str, api: str, namespace: str = TEAM, **content: object) -> Object:
    metadata = {"name": "made", "namespace": namespace, "labels": dict(LABELS), "ownerReferences": [owner()]}
    return {"apiVersion": api, "kind": kind, "metadata": metadata, **content}


def deployment(namespace: str = TEAM, **pod: object) -> Object:
    labels = {**LABELS, "tunesmith.dev/pool": "small", "tunesmith.dev/pool-uid": "u-1"}
    template = {"metadata": {"labels": labels}, "spec": {**copy.deepcopy(POD_SPEC), **pod}}
    spec = {"selector": {"matchLabels": labels}, "template": template}
    return owned("Deployment", "apps/v1", namespace, spec=spec)


def container(**changes: object) -> list[Object]:
    return [{**POD_SPEC["containers"][0], **changes}]


def unconfined(**changes: object) -> list[Object]:
    return container(securityContext={**POD_SPEC["containers"][0]["securityContext"], **changes})


def secret(namespace: str = TEAM, name: str = "small-keys", **changes: object) -> Object:
    made = owned("Secret", "v1", namespace, type="Opaque", stringData={"control": "x"}) | changes
    made["metadata"]["name"] = name
    return made


def without(item: Object, field: str) -> Object:
    changed = copy.deepcopy(item)
    del changed["metadata"][field]
    return changed


def volume(**source: object) -> list[Object]:
    return [{"name": "data", **source}, POD_SPEC["volumes"][1]]


def network_policy(**pods: str) -> Object:
    spec = {"podSelector": {"matchLabels": pods} if pods else {}, "policyTypes": ["Ingress"]}
    return owned("NetworkPolicy", "networking.k8s.io/v1", spec=spec)


def service(**spec: object) -> Object:
    selector = {"tunesmith.dev/finetunejob": "tone"}
    return owned("Service", "v1", spec={"clusterIP": "None", "ports": [{"port": 1}], "selector": selector, **spec})


CREATED: dict[str, tuple[Object, str]] = {
    "a Deployment in kube-system": (deployment("kube-system"), "writes no objects in the namespaces kube-system"),
    "a Secret in kube-public": (secret("kube-public"), "writes no objects in the namespaces kube-system"),
    "a Deployment that nobody owns": (without(deployment(), "ownerReferences"), "are owned by"),
    "a Deployment without the label": (without(deployment(), "labels"), "have the label"),
    "a Deployment of a Deployment": (
        deployment()
        | {
            "metadata": {
                **deployment()["metadata"],
                "ownerReferences": [{**owner("Deployment"), "apiVersion": "apps/v1"}],
            }
        },
        "are owned by",
    ),
    "a privileged pod": (
        deployment(containers=unconfined(privileged=True, allowPrivilegeEscalation=True)),
        "standard restricted",
    ),
    "a pod that may escalate": (deployment(containers=unconfined(allowPrivilegeEscalation=True)), "restricted"),
    "a pod with a capability": (
        deployment(containers=unconfined(capabilities={"drop": ["ALL"], "add": ["NET_RAW"]})),
        "standard restricted",
    ),
    "a pod that keeps its capabilities": (deployment(containers=unconfined(capabilities={})), "standard restricted"),
    "a pod with a writable root": (deployment(containers=unconfined(readOnlyRootFilesystem=False)), "read-only root"),
    "a container of root": (deployment(containers=unconfined(runAsUser=0)), "standard restricted"),
    "an init container of root": (
        deployment(initContainers=[{**unconfined(runAsNonRoot=False)[0], "name": "init"}]),
        "standard restricted",
    ),
    "an unconfined container": (
        deployment(containers=unconfined(seccompProfile={"type": "Unconfined"})),
        "security profiles of their pod",
    ),
    "a port of the host": (
        deployment(containers=container(ports=[{"containerPort": 80, "hostPort": 80}])),
        "no host ports",
    ),
    "a pod of root": (deployment(securityContext={"runAsUser": 0}), "standard restricted"),
    "an unconfined pod": (
        deployment(securityContext={"runAsNonRoot": True, "seccompProfile": {"type": "Unconfined"}}),
        "standard restricted",
    ),
    "a pod in its host's network": (deployment(hostNetwork=True), "no host namespaces"),
    "a pod in its host's processes": (deployment(hostPID=True), "no host namespaces"),
    "a pod on a chosen node": (deployment(nodeName="control-plane"), "no nodeName"),
    "a pod with a token": (deployment(automountServiceAccountToken=True), "without its token"),
    "a pod with the operator's account": (
        deployment(serviceAccountName="tunesmith-operator"),
        "use the default service account",
    ),
    "a pod that evicts the cluster's own": (
        deployment(priorityClassName="system-node-critical"),
        "no system priority class",
    ),
    "a folder of the host": (deployment(volumes=volume(hostPath={"path": "/"})), "are of the types emptyDir"),
    "a token as a volume": (
        deployment(volumes=volume(projected={"sources": [{"serviceAccountToken": {"path": "token"}}]})),
        "are of the types emptyDir",
    ),
    "a volume of a driver": (
        deployment(volumes=volume(csi={"driver": "secrets.example"})),
        "are of the types emptyDir",
    ),
    "the installation key as a volume": (
        deployment(volumes=volume(secret={"secretName": "tunesmith-installation-key"})),
        "never mount the installation's keys",
    ),
    "variables of a user's Secret": (
        deployment(containers=container(envFrom=[{"secretRef": {"name": "mine"}}])),
        "from tunesmith-store only",
    ),
    "a variable of a user's Secret": (
        deployment(
            containers=container(env=[{"name": "A", "valueFrom": {"secretKeyRef": {"name": "mine", "key": "a"}}}])
        ),
        "from tunesmith-store only",
    ),
    **{
        what: (deployment(containers=container(**changes)), "get a user's Secret, without settings that make them run")
        for what, changes in {
            "a user's Secret in another image": {"image": "docker.io/evil:1"},
            "a user's Secret in an image whose name begins so": {"image": "localhost/agent-evil:1"},
            "a user's Secret in another program": {"command": ["sh", "-c", "cat /etc/tunesmith/secrets/hub/*"]},
            "a user's Secret in the trainer's program of the agent's image": {"command": ["tunesmith-trainer"]},
            "a user's Secret beside code of a job": {"args": ["train", "--allow-task-code"]},
            "a user's Secret beside a module": {"env": [{"name": "PYTHONPATH", "value": "/work"}]},
            "a user's Secret beside a library": {"env": [{"name": "LD_PRELOAD", "value": "/work/a.so"}]},
            "a user's Secret beside tasks": {"env": [{"name": "TUNESMITH_LM_EVAL_TASKS", "value": "/work"}]},
            "a user's Secret beside a folder of programs": {
                "volumeMounts": [*POD_SPEC["containers"][0]["volumeMounts"], {"name": "data", "mountPath": "/usr"}]
            },
            "a user's Secret beside a hook": {"lifecycle": {"preStop": {"exec": {"command": ["sh"]}}}},
            "a user's Secret beside a probe": {"livenessProbe": {"exec": {"command": ["sh"]}}},
        }.items()
    },
    "a token as a Secret": (
        secret(type="kubernetes.io/service-account-token")
        | {
            "metadata": {
                **secret()["metadata"],
                "annotations": {"kubernetes.io/service-account.name": "default"},
            }
        },
        "of the type Opaque",
    ),
    "the credentials of a namespace's store": (secret(name="tunesmith-store"), "with the keys of a pool"),
    "an API key": (
        {
            **owned("ConfigMap", "v1", SYSTEM, data={"hash": "0" * 64, "namespace": TEAM}),
            "metadata": {
                **owned("ConfigMap", "v1", SYSTEM)["metadata"],
                "labels": {**LABELS, "tunesmith.dev/api-key": "true"},
            },
        },
        "creates no API keys",
    ),
    "another Secret of the installation": (
        without(secret(SYSTEM, "api-key-forged"), "ownerReferences"),
        "are owned by",
    ),
    "a policy that cuts off every pod": (network_policy(), "that select the pods of a FineTuneJob or a pool"),
    "a policy for other pods": (network_policy(app="shop"), "that select the pods of a FineTuneJob or a pool"),
    "a budget for other pods": (
        owned("PodDisruptionBudget", "policy/v1", spec={"selector": {"matchLabels": {"app": "shop"}}}),
        "that select the pods of a FineTuneJob or a pool",
    ),
    "a Service of others' pods": (service(selector={"app": "shop"}), "only headless Services"),
    "a Service with an address": (service(clusterIP=None, externalIPs=["8.8.8.8"]), "only headless Services"),
    "a Pod": (owned("Pod", "v1", spec=POD_SPEC), RBAC),
    "a DaemonSet": (owned("DaemonSet", "apps/v1", spec=deployment()["spec"]), RBAC),
    "a FineTuneJob": (job(TEAM), RBAC),
    "a ServingPool": (pool(TEAM), RBAC),
    "a Role": (owned("Role", "rbac.authorization.k8s.io/v1", rules=[]), RBAC),
    "an admission policy": (
        {
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": "ValidatingAdmissionPolicyBinding",
            "metadata": {"name": "made"},
            "spec": {"policyName": "tunesmith-operator-objects", "validationActions": ["Audit"]},
        },
        RBAC,
    ),
}
CALLED: dict[str, tuple[tuple[str, ...], str]] = {
    "read a user's Secret": (("get", "secret", "mine", "-n", TEAM), RBAC),
    "list Secrets": (("get", "secrets", "-A"), RBAC),
    "list Secrets of its own namespace": (("get", "secrets", "-n", SYSTEM), RBAC),
    "delete a Secret": (("delete", "secret", "mine", "-n", TEAM), RBAC),
    "read a ConfigMap": (("get", "configmap", "mine", "-n", TEAM), RBAC),
    "read events": (("get", "events", "-n", TEAM), RBAC),
    "change a namespace": (("label", "namespace", TEAM, "a=b"), RBAC),
    "change a node": (("label", "node", "n", "a=b"), RBAC),
    "run a command in a pod": (("exec", "theirs", "-n", TEAM, "--", "id"), RBAC),
    "read a pod's log": (("get", "--raw", f"/api/v1/namespaces/{TEAM}/pods/theirs/log"), RBAC),
    "delete a pod": (("delete", "pod", "theirs", "-n", TEAM), RBAC),
    "change another's pod": (("annotate", "pod", "theirs", "-n", TEAM, "a=b"), "only pods of its pools"),
    "change the image of another's pod": (
        ("set", "image", "pod/theirs", "-n", TEAM, "main=evil"),
        "only pods of its pools",
    ),
    "change the image of a pool's pod": (
        ("set", "image", "pod/ours", "-n", TEAM, "main=evil"),
        "and one readiness gate",
    ),
    "take a pool's pod from its pool": (("label", "pod", "ours", "-n", TEAM, "a=b"), "and one readiness gate"),
    "annotate a pool's pod": (("annotate", "pod", "ours", "-n", TEAM, "a=b"), "and one readiness gate"),
    "take over the cluster's name service": (
        ("set", "image", "deployment/coredns", "-n", "kube-system", "main=localhost/agent:2"),
        "writes no objects in the namespaces kube-system",
    ),
    "change another's Deployment": (
        ("set", "image", "deployment/theirs", "-n", TEAM, "main=localhost/agent:2"),
        "are owned by",
    ),
    "read another's Deployment's variables by a label": (
        ("label", "deployment", "theirs", "-n", TEAM, "app.kubernetes.io/managed-by=tunesmith"),
        "are owned by",
    ),
    "get another token": (("create", "token", "default", "-n", TEAM), RBAC),
    "be somebody else": (("get", "pods", "-n", TEAM, "--as", "admin"), RBAC),
    "give itself a right": (
        (
            *("create", "clusterrolebinding", "mine", "--clusterrole=cluster-admin"),
            f"--serviceaccount={SYSTEM}:tunesmith-operator",
        ),
        RBAC,
    ),
    "change its own rights": (("patch", "clusterrole", "tunesmith-operator", "-p", '{"rules": []}'), RBAC),
    "lift its own policy": (("delete", "validatingadmissionpolicy", "tunesmith-operator-pods"), RBAC),
    "change a job's spec": (
        ("patch", "finetunejob", "tone", "-n", TEAM, "--type=merge", "-p", '{"spec": {"suspend": true}}'),
        RBAC,
    ),
    "delete a job that does not expire": (
        ("delete", "finetunejob", "tone", "-n", TEAM),
        "only finished FineTuneJobs with spec.ttlSecondsAfterFinished",
    ),
    "take another's lease": (("get", "lease", "other", "-n", SYSTEM), RBAC),
}


PATCHED: dict[str, tuple[tuple[str, str, str], Object, str, str]] = {
    "read a user's Secret by an empty patch": (("Secret", "mine", ""), {}, "merge", RBAC),
    "read the installation's key by an empty patch": (("Secret", "tunesmith-installation-key", ""), {}, "merge", RBAC),
    "read a ConfigMap by an empty patch": (("ConfigMap", "mine", ""), {}, "merge", RBAC),
    "read an event by an empty patch": (("Event", "theirs", ""), {}, "merge", RBAC),
    "change a job's status by a patch": (("FineTuneJob", "tone", "status"), {}, "merge", RBAC),
    "move a pool's pod to another address": (
        ("Pod", "ours", "status"),
        {"status": {"podIP": "10.9.9.9"}},
        "merge",
        "the condition of one readiness gate",
    ),
    "make a pool's pod ready": (
        ("Pod", "ours", "status"),
        {"status": {"conditions": [{"type": "Ready", "status": "True"}]}},
        "strategic",
        "the condition of one readiness gate",
    ),
    "make another's pod ready": (
        ("Pod", "theirs", "status"),
        {"status": {"conditions": [{"type": "tunesmith.dev/adapters", "status": "True"}]}},
        "strategic",
        "only pods of its pools",
    ),
}


@pytest.fixture(scope="module")
def operator_kubectl(server: ApiServer) -> Kubectl:
    """Kubectl with the operator's rights, on a cluster with things that are not the operator's."""
    for name in (SYSTEM, TEAM):
        server.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    kubeconfig = grant(server, SYSTEM)
    theirs = without(without(deployment(), "ownerReferences"), "labels")
    coredns = copy.deepcopy(theirs)
    theirs["metadata"]["name"] = "theirs"
    coredns["metadata"] |= {"name": "coredns", "namespace": "kube-system"}
    pods = [owned("Pod", "v1", spec=POD_SPEC), owned("Pod", "v1", spec=POD_SPEC)]
    pods[0]["metadata"]["name"], pods[1]["metadata"]["name"] = "theirs", "ours"
    pods[0]["metadata"]["labels"] = {"app": "shop"}
    pods[1]["metadata"]["labels"] = {**LABELS, "tunesmith.dev/pool": "small", "tunesmith.dev/pool-uid": "u-1"}
    for pod in pods:
        del pod["metadata"]["ownerReferences"]
    mine = without(without(secret(name="mine"), "ownerReferences"), "labels")
    settings = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "mine", "namespace": TEAM}}
    for item in (theirs, coredns, *pods, mine, settings, job(TEAM)):
        server.apply(item)

    def run(*arguments: str, manifest: Object | None = None) -> subprocess.CompletedProcess[str]:
        return server.kubectl("--kubeconfig", str(kubeconfig), *arguments, manifest=manifest)

    def denied() -> bool:
        return DENIED in run("create", "--dry-run=server", "-f", "-", manifest=deployment("kube-system")).stderr

    until(denied, seconds=180, what="the admission policies in force")
    return run


def test_what_it_needs_is_admitted(operator_kubectl: Kubectl) -> None:
    """The policies are not just closed: each refusal below differs from one of these in one place."""
    for item in (
        deployment(),
        deployment(volumes=volume(persistentVolumeClaim={"claimName": "models"})),
        deployment(volumes=volume(image={"reference": "registry.example/models/llama:1.0"})),
        secret(),
        network_policy(**{"tunesmith.dev/pool": "small"}),
        service(),
        without(secret(SYSTEM, "tunesmith-gateway-key"), "ownerReferences"),
    ):
        done = operator_kubectl("create", "--dry-run=server", "-f", "-", manifest=item)
        assert done.returncode == 0, done.stderr
    cost = "controller.kubernetes.io/pod-deletion-cost=1"
    assert operator_kubectl("annotate", "pod", "ours", "-n", TEAM, cost).returncode == 0


@pytest.mark.parametrize("what", CREATED)
def test_it_cannot_create(operator_kubectl: Kubectl, what: str) -> None:
    manifest, sentence = CREATED[what]
    done = operator_kubectl("create", "--dry-run=server", "-f", "-", manifest=manifest)
    assert done.returncode != 0, done.stdout
    assert sentence in done.stderr
    assert (DENIED in done.stderr) is (sentence != RBAC)


@pytest.mark.parametrize("what", CALLED)
def test_it_cannot(operator_kubectl: Kubectl, what: str) -> None:
    arguments, sentence = CALLED[what]
    done = operator_kubectl(*arguments)
    assert done.returncode != 0, done.stdout
    assert sentence in done.stderr
    assert (DENIED in done.stderr) is (sentence != RBAC)


@pytest.mark.parametrize("what", PATCHED)
async def test_no_patch_lets_it(operator_kubectl: Kubectl, server: ApiServer, what: str) -> None:  # noqa: ARG001
    """By the operator's own client: kubectl reads what it patches, and would be refused for that."""
    (kind, name, subresource), body, type_, sentence = PATCHED[what]
    kubeconfig = kubeconfig_of(server, SYSTEM, "tunesmith-operator")
    async with await Cluster.connect(kubeconfig=kubeconfig) as cluster:
        with pytest.raises(ForbiddenError) as refused:
            await cluster.patch(kind, name, TEAM, body, type_=type_, subresource=subresource or None)  # type: ignore[arg-type]
    assert sentence in str(refused.value)
    assert (DENIED in str(refused.value)) is (sentence != RBAC)


async def test_it_opens_the_gate_of_a_pools_pod(operator_kubectl: Kubectl, server: ApiServer) -> None:  # noqa: ARG001
    kubeconfig = kubeconfig_of(server, SYSTEM, "tunesmith-operator")
    gate = {"status": {"conditions": [{"type": "tunesmith.dev/adapters", "status": "True"}]}}
    async with await Cluster.connect(kubeconfig=kubeconfig) as cluster:
        changed = await cluster.patch("Pod", "ours", TEAM, gate, type_="strategic", subresource="status")
    assert [condition["type"] for condition in changed["status"]["conditions"]] == ["tunesmith.dev/adapters"]


def test_it_cannot_overwrite_a_users_secret(operator_kubectl: Kubectl, server: ApiServer) -> None:
    """PUT needs no read, so the policy must know what is replaced."""
    path = f"/api/v1/namespaces/{TEAM}/secrets/mine"
    done = operator_kubectl("replace", "--raw", path, "-f", "-", manifest=secret(name="mine"))
    assert "are owned by" in done.stderr
    assert "control" in server.get("secret", "mine", "-n", TEAM)["data"]


def test_the_gateway_writes_nothing_and_reads_no_key_of_the_operator(
    operator_kubectl: Kubectl,  # noqa: ARG001 - what it sets up
    server: ApiServer,
) -> None:
    kubeconfig = str(kubeconfig_of(server, SYSTEM, "tunesmith-gateway"))
    for arguments in (
        ("get", "secret", "tunesmith-installation-key", "-n", SYSTEM),
        ("get", "secrets", "-n", SYSTEM),
        ("get", "secrets", "-n", TEAM),
        ("get", "finetunejobs", "-n", TEAM),
        ("annotate", "pod", "ours", "-n", TEAM, "a=b"),
        ("create", "configmap", "made", "-n", SYSTEM),
    ):
        done = server.kubectl("--kubeconfig", kubeconfig, *arguments)
        assert (done.returncode, RBAC in done.stderr) == (1, True), (arguments, done.stdout, done.stderr)
    assert server.kubectl("--kubeconfig", kubeconfig, "get", "pods,spool,adep", "-A").returncode == 0


def test_with_listed_namespaces_the_others_are_closed(server: ApiServer) -> None:
    home, watched, other = "limited", "limited-a", "limited-b"
    for name in (home, watched, other):
        server.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    values: dict[str, object] = {"watchNamespaces": [watched], "rbac": {"aggregateToUserRoles": False}}
    kubeconfig = str(grant(server, home, release="limited", **values))

    def may(*arguments: str) -> bool:
        return server.kubectl("--kubeconfig", kubeconfig, *arguments).returncode == 0

    assert may("get", "pods,jobs.batch,deployments,ftj", "-n", watched)
    assert not may("get", "pods", "-n", other)
    assert not may("get", "pods", "-A")
    assert not may("create", "--dry-run=server", "-f", "-")
    made = server.kubectl(
        *("--kubeconfig", kubeconfig, "create", "--dry-run=server", "-f", "-"), manifest=json.dumps(deployment(other))
    )
    assert RBAC in made.stderr


async def test_only_listed_namespaces_are_served(server: ApiServer, cluster: Cluster, tmp_path: Path) -> None:
    """By an operator and a gateway with the rights of a limited installation, which cannot even look elsewhere."""
    home, watched, other = "served", "served-a", "served-b"
    for name in (home, watched, other):
        server.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    values: dict[str, object] = {"watchNamespaces": [watched], "rbac": {"aggregateToUserRoles": False}}
    kubeconfig = grant(server, home, release="served", **values)
    for name in (watched, other):
        server.apply(job(name))
        server.apply(pool(name, modelName=name))

    async def validating(namespace: str) -> bool:
        return "status" in await cluster.get("FineTuneJob", "tone", namespace)

    async def pods_wanted(namespace: str) -> bool:
        return bool(await cluster.list("Deployment", namespace))

    with Operator(kubeconfig, tmp_path, namespace=home, options=("--watch-namespaces", watched)) as operator:
        await eventually(lambda: validating(watched), "the listed namespace's job is validated")
        await eventually(lambda: pods_wanted(watched), "the listed namespace's pool has a Deployment")
        # Its watches, and not only its first list, are allowed.
        server.apply(job(watched, "second"))

        async def seen() -> bool:
            return "status" in await cluster.get("FineTuneJob", "second", watched)

        await eventually(seen, "a job that is created later is seen", seconds=180)
        assert not await validating(other)
        assert not await pods_wanted(other)
        assert operator.answers("/readyz")
        assert operator.answers("/readyz", "[::1]")
        assert "cannot be read" not in operator.log.read_text(), "labels of the listed namespaces are among its rights"
    keys, catalog = KeyTable(), Catalog()
    gateway = kubeconfig_of(server, home, "served-tunesmith-gateway")
    async with await Cluster.connect(kubeconfig=gateway) as connected:
        feed = Feed(connected, home, (watched,), keys=keys, catalog=catalog, changed=lambda: None)
        following = asyncio.create_task(feed.run())

        async def synced() -> bool:
            return feed.synced()

        await eventually(synced, "the gateway has read what it may")
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
    assert set(catalog._models) == {f"{watched}/{watched}"}
    assert set(catalog._labels) == {watched}
