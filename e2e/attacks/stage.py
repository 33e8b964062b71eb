"""Pool, tenants and keys of the attacks: a platform's shared pool, a victim, and a hostile tenant."""

from __future__ import annotations

import base64
import json
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from e2e.attacks.artifacts import Template
from e2e.containers import container_status, processes_of
from e2e.custom_resources import API_VERSION, adapter_manifest, job_manifest
from e2e.demo import JOB, NODE_PORT
from e2e.installation import (
    DEMO,
    STORE,
    SYSTEM,
    InstallationError,
    Object,
    apply,
    condition,
    delete,
    gateway_address,
    get,
    images,
    in_store,
    items,
    kubectl,
    restricted_namespace,
    store_secret,
    tunesmith,
    until,
)
from tunesmith.contracts.agent import Keys, parse_keys
from tunesmith.contracts.apikey import KEY_KIND, KEY_PREFIX
from tunesmith.contracts.artifact import digest_of
from tunesmith.contracts.location import ARTIFACT_MANIFEST, artifact_uri

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PLATFORM = "attack-pool"
"""Namespace of the shared pool."""
VICTIM = "attack-victim"
HOSTILE = "attack-hostile"
POOL = "shared"
SINGLE = "single"
"""The pool of one pod."""
ADAPTER = "assistant"
"""The victim's AdapterDeployment."""
READY_SECONDS = 300
_LISTEN = "0A"
_LOOPBACK6 = "00000000000000000000000001000000"
GATEWAY_LABELS = "app.kubernetes.io/component=gateway,app.kubernetes.io/name=tunesmith"


@dataclass
class Stage:
    """Objects in the cluster that the attacks use. `setup` is idempotent: objects of an earlier run are reused.

    Attributes:
        folder: for artifacts while they are built.
    """

    folder: Path

    @property
    def gateway(self) -> str:
        """Return the gateway's address, `http://host:port`."""
        return gateway_address(NODE_PORT)

    @property
    def base_model(self) -> str:
        """Return the global id of the shared pool's base."""
        return f"{PLATFORM}/base"

    @property
    def victims_model(self) -> str:
        """Return the global id of the victim's adapter."""
        return f"{VICTIM}/{ADAPTER}"

    @cached_property
    def template(self) -> Template:
        """Return the artifact of the demo's job, on this machine."""
        return Template(self.folder / "template")

    @cached_property
    def victims_key(self) -> str:
        """Return the API key of the victim."""
        return new_key(VICTIM)

    @cached_property
    def hostile_key(self) -> str:
        """Return the API key of the hostile tenant."""
        return new_key(HOSTILE)

    def setup(self) -> None:
        """Create missing objects and wait until the victim's adapter is ready on both pods."""
        for namespace in (PLATFORM, VICTIM, HOSTILE):
            apply(restricted_namespace(namespace))
            apply(store_secret(namespace))
        apply(tenants_role(self.tenant), pool_manifest())
        source = demo_artifact()
        in_store("copy", source, str(self.template.folder))
        self.publish(ADAPTER, self.template.folder, VICTIM)
        self.deploy(ADAPTER, VICTIM, replicas=2)
        self.wait_until_served()

    def wait_until_served(self, seconds: float = READY_SECONDS) -> None:
        """Wait until the victim's adapter is ready on both pods."""

        def served() -> bool:
            adapter = get("adapterdeployment", ADAPTER, VICTIM)
            held = ((adapter or {}).get("status") or {}).get("readyReplicas")
            return condition(adapter, "Ready")["status"] == "True" and held == 2

        until(f"AdapterDeployment {VICTIM}/{ADAPTER} ready on 2 pods", served, seconds)

    def replace_pods(self) -> None:
        """Delete the shared pool's pods and wait until the victim is served from new ones."""
        kubectl("delete", "pods", "--namespace", PLATFORM, "--selector", f"tunesmith.dev/pool={POOL}")
        self.wait_until_served()

    def teardown(self) -> None:
        """Remove all objects, in the cluster and in the store."""
        for name in (VICTIM, HOSTILE):
            delete(KEY_KIND, KEY_PREFIX + name, SYSTEM)
        kubectl("delete", "namespace", PLATFORM, VICTIM, HOSTILE, "--ignore-not-found", "--wait=false")
        for namespace in (VICTIM, HOSTILE):
            in_store("remove", f"{STORE}/{namespace}")

    def publish(self, name: str, folder: Path, namespace: str = HOSTILE) -> None:
        """Upload a folder as the artifact of a FineTuneJob with that name, and set the job to Complete.

        The job never runs: this is what a hostile trainer could leave.
        """
        spec = yaml.safe_load(JOB.read_text())["spec"] | {"suspend": True}
        apply(job_manifest(name, spec, namespace))
        job = get("finetunejob", name, namespace) or {}
        uid = job["metadata"]["uid"]
        uri = artifact_uri(STORE, namespace, name, uid)
        in_store("put", str(folder), uri)
        fingerprint = self.template.manifest.base.fingerprint
        digest = digest_of((folder / ARTIFACT_MANIFEST).read_bytes())
        status = complete_status(uri, digest, fingerprint)
        patch = json.dumps({"status": status})

        def complete() -> bool:
            found = get("finetunejob", name, namespace)
            published = ((found or {}).get("status") or {}).get("artifact") or {}
            if condition(found, "Complete")["status"] == "True" and published.get("digest") == digest:
                return True
            kubectl(
                *("patch", "finetunejob", name, "--namespace", namespace, "--subresource=status", "--type=merge"),
                *("--patch", patch),
            )
            return False

        until(f"FineTuneJob {namespace}/{name} complete", complete, 30)

    def deploy(self, name: str, namespace: str = HOSTILE, job: str | None = None, **spec: object) -> None:
        """Serve the artifact of the job of that name from the shared pool."""
        manifest = adapter_manifest(name, job or name, None, namespace, **spec)
        manifest["spec"]["pool"] = {"name": POOL, "namespace": PLATFORM}
        apply(manifest)

    def remove(self, name: str, namespace: str = HOSTILE) -> None:
        """Remove an AdapterDeployment; `teardown` removes its FineTuneJob and its artifact."""
        delete("adapterdeployment", name, namespace)

    @contextmanager
    def pool(self, manifest: Object, *, ready: bool = True) -> Iterator[str]:
        """Create another pool while the block runs; yield the global id of its base."""
        name = manifest["metadata"]["name"]
        apply(manifest)
        try:
            if ready:
                until(
                    f"ServingPool {name} is available",
                    lambda: condition(get("servingpool", name, PLATFORM), "Available")["status"] == "True",
                    READY_SECONDS,
                )
            yield f"{PLATFORM}/{manifest['spec']['modelName']}"
        finally:
            delete("servingpool", name, PLATFORM)

    @contextmanager
    def attacker_pod(self) -> Iterator[Callable[..., str]]:
        """Create a pod of the hostile tenant, which has its own address; yield a function that runs Python in it."""
        name = "attacker"
        apply(plain_pod(name, HOSTILE))
        kubectl("wait", f"pod/{name}", "--namespace", HOSTILE, "--for=condition=Ready", "--timeout=90s")

        def execute(program: str, *arguments: str) -> str:
            return kubectl(
                "exec", "--stdin", name, "--namespace", HOSTILE, "--", "python3", "-", *arguments, stdin=program
            )

        try:
            yield execute
        finally:
            kubectl("delete", "pod", name, "--namespace", HOSTILE, "--grace-period=0", "--force")

    @property
    def tenant(self) -> str:
        """Return a user with the role `edit` in the hostile tenant's namespace."""
        return "attack-tenant"

    def apply_as_tenant(self, *manifests: Object) -> None:
        """Apply manifests as that user."""
        document = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(manifests)})
        kubectl("apply", "--server-side", "--filename", "-", f"--as={self.tenant}", stdin=document)

    def pods(self, pool: str = POOL) -> list[Object]:
        """Return the pool's pods that are not being deleted."""
        pods = items("pods", PLATFORM, f"tunesmith.dev/pool={pool}")
        return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]

    def pool_keys(self) -> dict[str, Keys]:
        """Return the shared pool's keys by purpose, which only the platform can read."""
        secrets = [
            secret
            for secret in items("secrets", PLATFORM, f"tunesmith.dev/pool={POOL}")
            if "control" in secret.get("data", {})
        ]
        [secret] = secrets
        return {purpose: parse_keys(base64.b64decode(text)) for purpose, text in secret["data"].items()}

    def store_keys(self, variable: str) -> set[str]:
        """Return the values of a key of the store's Secret in the files that the shared pool's agents read."""
        file = f"etc/tunesmith/secrets/{store_secret(PLATFORM)['metadata']['name']}/{variable}"
        return {
            (Path("/proc") / str(process) / "root" / file).read_text()
            for pod in self.pods()
            for process in processes_of(str(container_status(pod, "agent")["containerID"]))[:1]
        }

    def restarts(self, container: str = "engine") -> tuple[int, str]:
        """Return the number of restarts of a container in the shared pool's pods, and for the engine its last crash."""
        count = sum(container_status(pod, container)["restartCount"] for pod in self.pods())
        crash = get("servingpool", POOL, PLATFORM)["status"].get("latestCrash") if container == "engine" else None
        return count, json.dumps(crash)


def pool_manifest(name: str = POOL, **changes: object) -> Object:
    """Return a ServingPool of two small pods, which every namespace may use. Each pod computes on one core."""
    return {
        "apiVersion": API_VERSION,
        "kind": "ServingPool",
        "metadata": {"name": name, "namespace": PLATFORM},
        "spec": {
            "modelName": "base" if name == POOL else name,
            "baseModel": {"uri": "s3://tunesmith/models/SmolLM2-135M-Instruct"},
            "engine": {
                "maxLoras": 3,
                "maxLoraRank": 32,
                "maxModelLength": 1024,
                "dataType": "float32",
                "kvCacheMemory": "256Mi",
                "env": [
                    {"name": "OMP_NUM_THREADS", "value": "1"},
                    {"name": "VLLM_CPU_OMP_THREADS_BIND", "value": "nobind"},
                ],
            },
            # A larger share of busy cores than the demo's pool: the validation of a job requests 500m.
            "resources": {"gpus": 0, "cpu": "300m" if name == POOL else "100m", "memory": "3584Mi"},
            "replicas": 2,
            "drainSeconds": 10,
            "allowedNamespaces": {"from": "All"},
            **changes,
        },
    }


def tenants_role(user: str) -> Object:
    """Return a role and a binding that give the user the chart's rights of editors, and nothing else."""
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": {"name": "tenant", "namespace": HOSTILE},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "tunesmith-edit"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}],
    }


def listening(process: int) -> set[tuple[int, str]]:
    """Return the ports that are open beyond loopback in the process's network namespace, with their families."""
    found = set()
    for family, file in (("IPv4", "tcp"), ("IPv6", "tcp6")):
        for line in (Path("/proc") / str(process) / "net" / file).read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            address, port = local.split(":")
            if state == _LISTEN and not address.endswith("0100007F") and address != _LOOPBACK6:
                found.add((int(port, 16), family))
    return found


def plain_pod(name: str, namespace: str, **labels: str) -> Object:
    """Return an idle pod with the operator's image that meets the standard `restricted`."""
    secure = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": {
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 0,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 65532,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": "main",
                    "image": images()["operator"],
                    "command": ["python3", "-c", "import time; time.sleep(3600)"],
                    "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}, "limits": {"memory": "256Mi"}},
                    "securityContext": secure,
                }
            ],
        },
    }


def demo_artifact() -> str:
    """Return the URI of the artifact that `make demo` trained.

    Raises:
        InstallationError: it does not exist.
    """
    name = yaml.safe_load(JOB.read_text())["metadata"]["name"]
    job = get("finetunejob", name, DEMO)
    if condition(job, "Complete")["status"] != "True" or job is None:
        raise InstallationError(f"the FineTuneJob {DEMO}/{name} is not complete: run `make demo` first")
    return str(job["status"]["artifact"]["uri"])


def complete_status(uri: str, digest: str, fingerprint: str) -> Object:
    """Return the status of a FineTuneJob that published an artifact."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    done = {"status": "True", "reason": "Completed", "message": "", "lastTransitionTime": now}
    return {
        "phase": "Complete",
        "conditions": [{"type": kind, **done} for kind in ("Validated", "Published", "Complete")],
        "resolved": {"baseModelFingerprint": fingerprint},
        "artifact": {"uri": uri, "digest": digest, "sizeBytes": 0, "servable": {"vllm": True}},
    }


def new_key(namespace: str) -> str:
    """Return a new API key of a namespace, which may also call the shared pool's base."""
    delete(KEY_KIND, KEY_PREFIX + namespace, SYSTEM)
    printed = tunesmith(
        *("keys", "create", namespace, "--namespace", namespace, "--gateway-namespace", SYSTEM),
        *("--allow-namespace", PLATFORM),
    )
    return printed.split()[0]


def gateway_pods() -> list[Object]:
    """Return the gateway's running pods."""
    pods = items("pods", SYSTEM, GATEWAY_LABELS)
    return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]


def gateway_processes() -> list[int]:
    """Return the processes of the gateway's containers on this machine."""
    return [
        process
        for pod in gateway_pods()
        for process in processes_of(str(container_status(pod, "gateway").get("containerID", "")) or "none")
    ]


def gateway_restarts() -> dict[str, int]:
    """Return the restarts of the gateway's container by pod."""
    return {pod["metadata"]["name"]: container_status(pod, "gateway")["restartCount"] for pod in gateway_pods()}


def gateway_log(since_seconds: int) -> str:
    """Return the recent log of the gateway's pods."""
    return "".join(
        kubectl("logs", pod["metadata"]["name"], "--namespace", SYSTEM, f"--since={since_seconds}s", "--tail=-1")
        for pod in gateway_pods()
    )
