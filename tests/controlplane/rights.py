"""The rights that the chart gives, on an API server, and credentials that have no others."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any

import yaml

from tests.controlplane.apiserver import ROOT, program

if TYPE_CHECKING:
    from pathlib import Path

    from tests.controlplane.apiserver import ApiServer

RIGHTS = {
    "ServiceAccount",
    "Role",
    "RoleBinding",
    "ClusterRole",
    "ClusterRoleBinding",
    "ValidatingAdmissionPolicy",
    "ValidatingAdmissionPolicyBinding",
}


def render(namespace: str, *, release: str = "tunesmith", **values: object) -> list[dict[str, Any]]:
    """Return the documents of the chart `tunesmith`.

    Raises:
        RuntimeError: helm refused the values.
    """
    images = {"registry": "localhost", **{name: {"repository": name, "tag": "1"} for name in ("trainer", "agent")}}
    complete = {"store": "s3://tunesmith/store", "images": images, **values}
    done = subprocess.run(
        [
            *(program("helm"), "template", release, ROOT / "charts/tunesmith", "--namespace", namespace),
            *("--kube-version", "1.34.0", "--values", "-"),
        ],
        check=False,
        capture_output=True,
        text=True,
        input=json.dumps(complete),
        timeout=60,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def grant(server: ApiServer, namespace: str, *, release: str = "tunesmith", **values: object) -> Path:
    """Apply the rights that the chart gives in a namespace; return the kubeconfig of an operator that has no others."""
    documents = [item for item in render(namespace, release=release, **values) if item["kind"] in RIGHTS]
    server.apply(json.dumps({"apiVersion": "v1", "kind": "List", "items": documents}), "--force-conflicts")
    [account] = [
        item["metadata"]["name"]
        for item in documents
        if item["kind"] == "ServiceAccount" and item["metadata"]["name"].endswith("-operator")
    ]
    return kubeconfig_of(server, namespace, account)


def kubeconfig_of(server: ApiServer, namespace: str, account: str) -> Path:
    """Write a kubeconfig with a token of a service account.

    Raises:
        RuntimeError: there is no such account.
    """
    done = server.kubectl("create", "token", account, "--namespace", namespace, "--duration=24h")
    if done.returncode:
        raise RuntimeError(done.stderr)
    config = json.loads(server.kubeconfig.read_text())
    config["users"] = [{"name": "admin", "user": {"token": done.stdout.strip()}}]
    path = server.folder / f"kubeconfig-{namespace}-{account}"
    path.write_text(json.dumps(config))
    path.chmod(0o600)
    return path
