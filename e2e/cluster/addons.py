"""Add-ons of the cluster: name service, default storage class, S3 server."""

from __future__ import annotations

import base64
import json
import re
import secrets
import subprocess
from contextlib import contextmanager
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from e2e.cluster import binaries
from e2e.cluster.archive import ensure_program_image
from e2e.cluster.layout import DNS_ADDRESS, SOURCES, ClusterError, Layout
from e2e.cluster.s3 import ensure_bucket
from e2e.cluster.steps import output_of, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

BUCKET = "tunesmith"
AUTHORITIES = Path("/etc/ssl/certs/ca-certificates.crt")


def kubectl(layout: Layout, *arguments: str, stdin: str | None = None) -> str:
    """Runs kubectl as the cluster's administrator and returns what it printed."""
    command = [str(layout.bin / "kubectl"), f"--kubeconfig={layout.kubeconfig}", *arguments]
    return output_of(command, stdin=None if stdin is None else stdin.encode())


def apply(layout: Layout, manifest: str, **values: str) -> None:
    """Applies a file of `manifests/` with `values` substituted for its ${NAMES}."""
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
        ClusterError: it is not available in time, with the reason of its pods.
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
            messages = [c.get("message", "") for c in pod["status"].get("conditions", []) if c["status"] == "False"]
            reasons.append(f"{name}: {' '.join(messages) or pod['status']['phase']}")
    return "; ".join(reasons) or "it has no pods yet"


def apply_base(layout: Layout) -> None:
    """Storage class and name service: applied, not awaited."""
    apply(layout, "storage.yaml")
    image = ensure_program_image(layout, "coredns", binaries.build("coredns") / "coredns", certificates=AUTHORITIES)
    apply(layout, "coredns.yaml", COREDNS_IMAGE=image, DNS_ADDRESS=DNS_ADDRESS)


def ensure_s3_credentials(layout: Layout) -> tuple[str, str]:
    """Return the S3 server's keys, which are generated once and kept in the Secret s3/credentials."""
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


def apply_s3(layout: Layout, image: str) -> None:
    """The S3 server, its credentials and its volume: applied, not awaited."""
    apply(layout, "s3.yaml", S3_IMAGE=image)
    ensure_s3_credentials(layout)


def s3_image(layout: Layout) -> str:
    """Imports the S3 server's image into the local cluster; returns its reference."""
    return ensure_program_image(layout, "s3", binaries.build("versitygw") / "versitygw")


def ensure_s3_bucket(layout: Layout) -> None:
    """Waits for the S3 server and makes the bucket `tunesmith`, through a forwarded port, as any cluster allows.

    Raises:
        ClusterError: the server is not up in time or refuses.
    """
    wait_available(layout, "s3", "s3", 120)
    access, secret = ensure_s3_credentials(layout)

    def missing() -> str | None:
        try:
            with forwarded_port(layout, "s3", "service/s3", 7070) as port:
                ensure_bucket("127.0.0.1", port, BUCKET, access, secret)
        except ClusterError as error:  # the request may reach a pod that is being replaced
            return str(error)
        return None

    wait_until(missing, 60)


@contextmanager
def forwarded_port(layout: Layout, namespace: str, target: str, port: int) -> Iterator[int]:
    """Forwards a free local port to `port` of `target` while its block runs.

    Raises:
        ClusterError: kubectl could not.
    """
    command = [str(layout.bin / "kubectl"), f"--kubeconfig={layout.kubeconfig}", "--namespace", namespace]
    command += ["port-forward", target, f":{port}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            found = re.search(r"127\.0\.0\.1:(\d+) ->", process.stdout.readline())
            if found is None:
                process.terminate()
                raise ClusterError(
                    f"port {port} of {namespace}/{target} cannot be forwarded: {process.stderr.read().strip()}"
                )
            yield int(found[1])
        finally:
            process.terminate()
