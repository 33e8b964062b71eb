"""What runs inside the cluster from the start: name service, default storage class, S3 server."""

from __future__ import annotations

import base64
import json
import secrets
from pathlib import Path
from string import Template

import binaries
from archive import ensure_program_image
from layout import DNS_ADDRESS, SOURCES, ClusterError, Layout
from s3 import ensure_bucket
from steps import output_of, wait_until

BUCKET = "tunesmith"
AUTHORITIES = Path("/etc/ssl/certs/ca-certificates.crt")


def kubectl(layout: Layout, *arguments: str, stdin: str | None = None) -> str:
    """Runs kubectl as the cluster's administrator and returns what it printed."""
    command = [str(layout.bin / "kubectl"), f"--kubeconfig={layout.kubeconfig}", *arguments]
    return output_of(command, stdin=None if stdin is None else stdin.encode())


def apply(layout: Layout, manifest: str, **values: str) -> None:
    """Applies a file of `manifests/` with `values` put in for its ${NAMES}."""
    text = Template((SOURCES / "manifests" / manifest).read_text()).substitute(values)
    kubectl(
        layout,
        "apply",
        "--server-side",
        "--field-manager=tunesmith-cluster",
        "--force-conflicts",
        "-f",
        "-",
        stdin=text,
    )


def wait_available(layout: Layout, namespace: str, deployment: str, seconds: float) -> None:
    """Waits until every replica of a deployment is available.

    Raises:
        ClusterError: it is not in time; says what its pods wait for.
    """

    def missing() -> str | None:
        status = json.loads(kubectl(layout, "--namespace", namespace, "get", "deployment", deployment, "-o", "json"))
        wanted = status["spec"]["replicas"]
        conditions = status["status"]
        current = conditions.get("observedGeneration") == status["metadata"]["generation"]
        if current and conditions.get("availableReplicas", 0) == conditions.get("updatedReplicas", 0) == wanted:
            return None
        return f"deployment {namespace}/{deployment} is not available: {_pods_wait_for(layout, namespace)}"

    wait_until(missing, seconds, 0.3)


def _pods_wait_for(layout: Layout, namespace: str) -> str:
    reasons = []
    for pod in json.loads(kubectl(layout, "--namespace", namespace, "get", "pods", "-o", "json"))["items"]:
        name = pod["metadata"]["name"]
        for container in pod["status"].get("containerStatuses", []):
            if "waiting" in container["state"]:
                waiting = container["state"]["waiting"]
                reasons.append(f"{name}: {waiting.get('reason', 'waiting')} {waiting.get('message', '')}".strip())
            elif not container["ready"]:
                reasons.append(f"{name}: started, not ready")
        if "containerStatuses" not in pod["status"]:
            said = [c.get("message", "") for c in pod["status"].get("conditions", []) if c["status"] == "False"]
            reasons.append(f"{name}: {' '.join(said) or pod['status']['phase']}")
    return "; ".join(reasons) or "it has no pods yet"


def apply_base(layout: Layout) -> None:
    """Storage class and name service: applied, not awaited."""
    apply(layout, "storage.yaml")
    image = ensure_program_image(layout, "coredns", binaries.build("coredns") / "coredns", certificates=AUTHORITIES)
    apply(layout, "coredns.yaml", COREDNS_IMAGE=image, DNS_ADDRESS=DNS_ADDRESS)


def ensure_s3_credentials(layout: Layout) -> tuple[str, str]:
    """The S3 server's access key and secret key: made at random once, kept in the Secret s3/credentials."""
    found = kubectl(layout, "--namespace", "s3", "get", "secret", "credentials", "--ignore-not-found", "-o", "json")
    if found:
        data = json.loads(found)["data"]
        return base64.b64decode(data["AWS_ACCESS_KEY_ID"]).decode(), base64.b64decode(
            data["AWS_SECRET_ACCESS_KEY"]
        ).decode()
    access, secret = f"TS{secrets.token_hex(8).upper()}", secrets.token_urlsafe(30)
    manifest = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "credentials", "namespace": "s3"},
        "stringData": {"AWS_ACCESS_KEY_ID": access, "AWS_SECRET_ACCESS_KEY": secret},
    }
    kubectl(layout, "create", "-f", "-", stdin=json.dumps(manifest))
    return access, secret


def apply_s3(layout: Layout) -> None:
    """The S3 server, its credentials and its volume: applied, not awaited."""
    image = ensure_program_image(layout, "s3", binaries.build("versitygw") / "versitygw")
    apply(layout, "s3.yaml", S3_IMAGE=image)
    ensure_s3_credentials(layout)


def ensure_s3_bucket(layout: Layout) -> None:
    """Waits for the S3 server and makes the bucket `tunesmith`.

    Raises:
        ClusterError: the server is not up in time or refuses.
    """
    wait_available(layout, "s3", "s3", 90)
    service = json.loads(kubectl(layout, "--namespace", "s3", "get", "service", "s3", "-o", "json"))
    access, secret = ensure_s3_credentials(layout)
    last: list[str] = []

    def missing() -> str | None:
        try:
            ensure_bucket(service["spec"]["clusterIP"], 7070, BUCKET, access, secret)
        except ClusterError as error:  # kube-proxy may still be writing the service's rules
            last[:] = [str(error)]
            return last[0]
        return None

    wait_until(missing, 20)
