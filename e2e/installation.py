"""Access to Tunesmith on a cluster for the demo and the scenarios: kubectl, helm, the store and waiting.

The cluster is the one of .cluster/kubeconfig, which `make cluster-up` writes: the local one, or that of KUBECONTEXT.
"""

from __future__ import annotations

import base64
import ipaddress
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

REPOSITORY = Path(__file__).resolve().parents[1]
STATE = REPOSITORY / ".cluster"
SYSTEM = "tunesmith-system"
DEMO = "demo"
STORE = "s3://tunesmith/store"
GATEWAY = "tunesmith-gateway"
Object = dict[str, Any]


class InstallationError(Exception):
    """Problem for the user: what failed, where, and how to fix it."""


def environment() -> dict[str, str]:
    """Return the environment of kubectl, helm and the CLI, with the cluster's kubeconfig and programs first."""
    path = f"{STATE / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "KUBECONFIG": str(STATE / "kubeconfig")}


def run(*command: str | Path, stdin: str | None = None, seconds: float = 300, **more: str) -> str:
    """Run a command and return its standard output.

    Raises:
        InstallationError: it failed; the message contains the command and its error output.
    """
    done = subprocess.run(
        [str(part) for part in command],
        check=False,
        capture_output=True,
        text=True,
        input=stdin,
        env=environment() | more,
        cwd=REPOSITORY,
        timeout=seconds,
    )
    if done.returncode:
        output = (done.stderr or done.stdout).strip()
        raise InstallationError(f"`{' '.join(str(part) for part in command)}` failed: {output}")
    return done.stdout


def kubectl(*arguments: str, stdin: str | None = None, seconds: float = 300) -> str:
    """Run kubectl and return its output."""
    return run("kubectl", *arguments, stdin=stdin, seconds=seconds)


def helm(*arguments: str, values: Object | None = None) -> str:
    """Run helm and return its output. `values` are passed with `--values -`."""
    if values is None:
        return run("helm", *arguments)
    return run("helm", *arguments, "--values", "-", stdin=json.dumps(values))


def tunesmith(*arguments: str) -> str:
    """Run the CLI and return its output."""
    return run(shutil.which("tunesmith") or REPOSITORY / ".venv/bin/tunesmith", *arguments)


def apply(*manifests: Object) -> None:
    """Apply manifests server-side."""
    document = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(manifests)})
    kubectl("apply", "--server-side", "--force-conflicts", "--filename", "-", stdin=document)


def get(kind: str, name: str, namespace: str) -> Object | None:
    """Return the object; None if it does not exist."""
    text = kubectl("get", kind, name, "--namespace", namespace, "--ignore-not-found", "--output", "json")
    return json.loads(text) if text.strip() else None


def items(kind: str, namespace: str, selector: str = "") -> list[Object]:
    """Return the objects of a namespace that match the label selector."""
    text = kubectl("get", kind, "--namespace", namespace, "--selector", selector, "--output", "json")
    found: list[Object] = json.loads(text)["items"]
    return found


def delete(kind: str, name: str, namespace: str) -> None:
    """Delete the object if it exists, and wait until it is gone."""
    kubectl("delete", kind, name, "--namespace", namespace, "--ignore-not-found", "--timeout", "120s")


def condition(resource: Object | None, type_: str) -> Object:
    """Return the condition of a type; an empty one if it is not set."""
    conditions = ((resource or {}).get("status") or {}).get("conditions") or []
    return next(
        (entry for entry in conditions if entry["type"] == type_), {"status": "Unknown", "reason": "", "message": ""}
    )


def until(what: str, probe: Callable[[], Any], seconds: float, interval: float = 0.5) -> Any:  # noqa: ANN401 - the probe's value
    """Call `probe` every `interval` seconds and return its first true value.

    Raises:
        InstallationError: there was none within `seconds`; the message contains the probe's last value.
    """
    deadline = time.monotonic() + seconds
    while True:
        if value := probe():
            return value
        if time.monotonic() > deadline:
            raise InstallationError(f"{what}: not within {seconds:.0f} s (last seen: {value!r})")
        time.sleep(interval)


def secret_value(namespace: str, name: str, key: str) -> str:
    """Return a value of a Secret.

    Raises:
        InstallationError: the Secret or the key does not exist.
    """
    data = (get("secret", name, namespace) or {}).get("data", {})
    if key not in data:
        raise InstallationError(f"the Secret {namespace}/{name} has no {key}")
    return base64.b64decode(data[key]).decode()


def service_address(namespace: str, name: str) -> str:
    """Return `host:port` of a Service's first port, which this machine can reach if it is a node of the cluster.

    Raises:
        InstallationError: the Service does not exist.
    """
    service = get("service", name, namespace)
    if service is None:
        raise InstallationError(f"the Service {namespace}/{name} does not exist: run `make demo` first")
    return f"{service['spec']['clusterIP']}:{service['spec']['ports'][0]['port']}"


def gateway_address(node_port: int) -> str:
    """Return `http://host:port` of the gateway's node port: on this machine for the local cluster, else on a node."""
    if not os.environ.get("KUBECONTEXT"):
        return f"http://127.0.0.1:{node_port}"
    path = "jsonpath={.items[0].status.addresses[?(@.type=='InternalIP')].address}"
    return f"http://{kubectl('get', 'nodes', '--output', path).strip()}:{node_port}"


def images() -> dict[str, str]:
    """Return the references of the images by name, as recorded by `make images`.

    Raises:
        InstallationError: they have not been built.
    """
    path = STATE / "images.json"
    if not path.is_file():
        raise InstallationError(f"{path} does not exist: run `make images` first")
    found: dict[str, str] = json.loads(path.read_text())
    return found


def image_values(reference: str) -> Object:
    """Return a reference, `registry/repository:tag` or `…@digest`, in the format of the chart's values."""
    registry, _, rest = reference.partition("/")
    repository, at, digest = rest.partition("@")
    if at:
        return {"registry": registry, "repository": repository, "tag": "", "digest": digest}
    repository, _, tag = rest.rpartition(":")
    return {"registry": registry, "repository": repository, "tag": tag, "digest": ""}


def store_environment() -> dict[str, str]:
    """Return variables for programs on this machine that use the S3 server of `make cluster-up`.

    Raises:
        InstallationError: the cluster has no S3 server.
    """
    if get("secret", "credentials", "s3") is None:
        raise InstallationError(
            "the cluster has no S3 server in the namespace s3: `make cluster-up` starts a cluster with one"
        )
    return {
        "AWS_ACCESS_KEY_ID": secret_value("s3", "credentials", "AWS_ACCESS_KEY_ID"),
        "AWS_SECRET_ACCESS_KEY": secret_value("s3", "credentials", "AWS_SECRET_ACCESS_KEY"),
        "AWS_ENDPOINT_URL": f"http://{service_address('s3', 's3')}",
        "AWS_REGION": "us-east-1",
    }


def store_network() -> str:
    """Return the S3 server's address inside the cluster, as a network with one address."""
    return str(ipaddress.ip_network(service_address("s3", "s3").rpartition(":")[0]))


def in_store(program: str, *arguments: str, seconds: float = 600) -> str:
    """Run e2e/store.py, which needs the trainer's environment, against the local cluster's S3 server."""
    python = REPOSITORY / "trainer-image/.venv/bin/python"
    return run(python, REPOSITORY / "e2e/store.py", program, *arguments, seconds=seconds, **store_environment())


def store_secret(namespace: str, **changes: str) -> Object:
    """Return the Secret `tunesmith-store` of a namespace, with the address that pods use."""
    variables = store_environment() | {"AWS_ENDPOINT_URL": "http://s3.s3.svc:7070"} | changes
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "tunesmith-store", "namespace": namespace},
        "stringData": variables,
    }


def restricted_namespace(name: str) -> Object:
    """Return a namespace that admits only pods of the standard `restricted`."""
    labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
