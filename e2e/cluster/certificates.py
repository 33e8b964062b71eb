"""The cluster's certificate authority, the components' certificates and their kubeconfigs, made with openssl."""

from __future__ import annotations

import base64
import json
import os
from typing import TYPE_CHECKING

from e2e.cluster.layout import API_PORT, API_SERVICE_ADDRESS, NODE_NAME, Layout
from e2e.cluster.steps import output_of

if TYPE_CHECKING:
    from pathlib import Path

VALID_DAYS = "3650"


def _private(path: Path, content: str) -> None:
    """Writes a file that only its owner can read, complete or not at all."""
    temporary = path.with_name(path.name + ".new")
    temporary.touch(mode=0o600)
    temporary.chmod(0o600)
    temporary.write_text(content)
    temporary.replace(path)


def _key(path: Path) -> None:
    if not path.exists():
        _private(path, output_of(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout"]))


def _authority(pki: Path) -> None:
    if (pki / "ca.crt").exists():
        return
    _key(pki / "ca.key")
    command: list[str | Path] = [
        "openssl",
        "req",
        "-x509",
        "-new",
        "-key",
        pki / "ca.key",
        "-subj",
        "/CN=tunesmith-local",
        "-days",
        VALID_DAYS,
    ]
    _private(pki / "ca.crt", output_of(command))


def _certificate(pki: Path, name: str, subject: str, alternative_names: str = "") -> None:
    """Makes `name`.key and `name`.crt unless a certificate for the same subject and names exists."""
    wanted = f"{subject}\n{alternative_names}\n"
    made_for = pki / f"{name}.for"
    if (pki / f"{name}.crt").exists() and made_for.exists() and made_for.read_text() == wanted:
        return
    _key(pki / f"{name}.key")
    request = output_of(["openssl", "req", "-new", "-key", pki / f"{name}.key", "-subj", subject])
    extensions = pki / f"{name}.extensions"
    usage = "extendedKeyUsage=clientAuth,serverAuth\n"
    extensions.write_text(usage + (f"subjectAltName={alternative_names}\n" if alternative_names else ""))
    command: list[str | Path] = [
        "openssl",
        "x509",
        "-req",
        "-CA",
        pki / "ca.crt",
        "-CAkey",
        pki / "ca.key",
        "-set_serial",
        f"0x{os.urandom(8).hex()}",
    ]
    certificate = output_of([*command, "-days", VALID_DAYS, "-extfile", extensions], stdin=request.encode())
    extensions.unlink()
    _private(pki / f"{name}.crt", certificate)
    made_for.write_text(wanted)


def _kubeconfig(path: Path, pki: Path, certificate: str) -> None:
    """Writes a self-contained kubeconfig. It is JSON, which is YAML too."""

    def encoded(file: Path) -> str:
        return base64.b64encode(file.read_bytes()).decode()

    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {
                "name": "tunesmith-local",
                "cluster": {
                    "server": f"https://127.0.0.1:{API_PORT}",
                    "certificate-authority-data": encoded(pki / "ca.crt"),
                },
            }
        ],
        "users": [
            {
                "name": certificate,
                "user": {
                    "client-certificate-data": encoded(pki / f"{certificate}.crt"),
                    "client-key-data": encoded(pki / f"{certificate}.key"),
                },
            }
        ],
        "contexts": [{"name": "tunesmith-local", "context": {"cluster": "tunesmith-local", "user": certificate}}],
        "current-context": "tunesmith-local",
    }
    text = json.dumps(content, indent=1) + "\n"
    if not path.exists() or path.read_text() != text:
        _private(path, text)


def ensure_certificates(layout: Layout, node_address: str) -> None:
    """Makes what is missing: authority, certificates, service-account key, and a kubeconfig per client."""
    pki = layout.pki
    pki.mkdir(parents=True, exist_ok=True, mode=0o700)
    _authority(pki)
    _key(pki / "service-accounts.key")
    names = [
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
        "localhost",
    ]
    server = ",".join(
        [f"IP:{ip}" for ip in ("127.0.0.1", API_SERVICE_ADDRESS, node_address)] + [f"DNS:{name}" for name in names]
    )
    _certificate(pki, "kube-apiserver", "/CN=kube-apiserver", server)
    _certificate(pki, "etcd", "/CN=etcd", "IP:127.0.0.1,DNS:localhost")
    _certificate(pki, "kubelet-server", f"/CN={NODE_NAME}", f"IP:{node_address},DNS:{NODE_NAME}")
    _certificate(pki, "kubelet-client", "/O=system:masters/CN=kube-apiserver-kubelet-client")
    clients = {
        "admin": "/O=system:masters/CN=admin",
        "kube-controller-manager": "/CN=system:kube-controller-manager",
        "kube-scheduler": "/CN=system:kube-scheduler",
        "kubelet": f"/O=system:nodes/CN=system:node:{NODE_NAME}",
        "kube-proxy": "/CN=system:kube-proxy",
        "volume-provisioner": "/CN=tunesmith:volume-provisioner",
    }
    for client, subject in clients.items():
        _certificate(pki, client, subject)
        _kubeconfig(layout.kubeconfig if client == "admin" else pki / f"{client}.kubeconfig", pki, client)
