"""A real etcd and kube-apiserver for tests: no kubelet, no scheduler, nothing that needs root.

The programs come from $KUBEBUILDER_ASSETS, or from .cluster/bin, which `python3 -m e2e.cluster build` (and so
`make cluster-up`) fills. The controller manager is optional; with it, owner references and Jobs work as in a cluster.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]
READY_SECONDS = 300.0
"""Deadline for a start on a busy machine."""
PORT_ATTEMPTS = 3


def until(condition: Callable[[], bool], *, seconds: float, what: str) -> None:
    """Polls until the condition holds.

    Raises:
        TimeoutError: it did not hold within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {seconds:.0f} s")
        time.sleep(0.05)


def program(name: str) -> Path:
    """The path of etcd, kube-apiserver, kube-controller-manager, kubectl or helm.

    Raises:
        FileNotFoundError: it is not in the folder of such programs.
    """
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    folder = Path(assets) if assets else ROOT / ".cluster" / "bin"
    if not (folder / name).exists():
        raise FileNotFoundError(
            f"{name} is not in {folder}: run `.venv/bin/python -m e2e.cluster build`, or set KUBEBUILDER_ASSETS"
        )
    return folder / name


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class ApiServer:
    """etcd and kube-apiserver in a folder of their own, on free ports; a context manager.

    `arguments`: further arguments of kube-apiserver.
    """

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        self._arguments = arguments
        self.kubeconfig = folder / "kubeconfig"
        self.url = ""
        self._token = secrets.token_hex(16)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "tokens.csv").write_text(f'{self._token},admin,admin,"system:masters"\n')
        _service_account_key(self.folder / "sa.key")
        for attempt in range(1, PORT_ATTEMPTS + 1):
            try:
                self._start()
            except (TimeoutError, ChildProcessError):
                self.stop()
                if attempt == PORT_ATTEMPTS:  # a port can be taken between finding and using it
                    raise
            else:
                break
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends every process, the last started first."""
        for process in reversed(self._processes.values()):
            process.terminate()
            try:
                process.wait(timeout=120)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()

    def start_controller_manager(self) -> None:
        """Starts the controllers that Tunesmith relies on: garbage collection, namespaces, Jobs, service accounts."""
        self._run(
            "kube-controller-manager",
            f"--kubeconfig={self.kubeconfig}",
            f"--service-account-private-key-file={self.folder / 'sa.key'}",
            "--leader-elect=false",
            "--secure-port=0",
        )

    def kubectl(
        self, *arguments: str, manifest: dict[str, Any] | str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs kubectl as administrator. A manifest goes to its standard input (`-f -`). Does not raise on failure."""
        text = manifest if isinstance(manifest, str) or manifest is None else json.dumps(manifest)
        return subprocess.run(
            [program("kubectl"), "--kubeconfig", self.kubeconfig, "--cache-dir", self.folder / "kubectl", *arguments],
            input=text,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def apply(self, manifest: dict[str, Any] | str, *arguments: str) -> str:
        """`kubectl apply --server-side`; returns what kubectl printed.

        Raises:
            RuntimeError: kubectl failed.
        """
        done = self.kubectl("apply", "--server-side", "-f", "-", *arguments, manifest=manifest)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return done.stdout

    def get(self, *arguments: str) -> dict[str, Any]:
        """The object that `kubectl get … -o json` prints.

        Raises:
            RuntimeError: kubectl failed.
        """
        done = self.kubectl("get", *arguments, "-o", "json")
        if done.returncode:
            raise RuntimeError(done.stderr)
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    def install_crds(self, folder: Path = ROOT / "crds") -> None:
        """Applies the CRDs of a folder and waits until the API server offers their kinds."""
        for path in sorted(folder.glob("*.yaml")):
            self.apply(path.read_text())
        done = self.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
        if done.returncode:
            raise RuntimeError(done.stderr)

    def _start(self) -> None:
        client, peer, port = free_port(), free_port(), free_port()
        self.url = f"https://127.0.0.1:{port}"
        self._run(
            "etcd",
            f"--data-dir={self.folder / 'etcd'}",
            "--unsafe-no-fsync",
            f"--listen-client-urls=http://127.0.0.1:{client}",
            f"--advertise-client-urls=http://127.0.0.1:{client}",
            f"--listen-peer-urls=http://127.0.0.1:{peer}",
            f"--initial-advertise-peer-urls=http://127.0.0.1:{peer}",
            f"--initial-cluster=default=http://127.0.0.1:{peer}",
        )
        self._run(
            "kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{client}",
            "--bind-address=127.0.0.1",
            f"--secure-port={port}",
            f"--cert-dir={self.folder / 'certificates'}",
            f"--token-auth-file={self.folder / 'tokens.csv'}",
            "--authorization-mode=RBAC",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={self.folder / 'sa.key'}",
            f"--service-account-signing-key-file={self.folder / 'sa.key'}",
            "--service-cluster-ip-range=10.0.0.0/24",
            "--allow-privileged",
            # without a controller manager no namespace gets its default service account
            "--disable-admission-plugins=ServiceAccount",
            *self._arguments,
        )
        self._write_kubeconfig()
        until(self._is_ready, seconds=READY_SECONDS, what="a ready API server")

    def _is_ready(self) -> bool:
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise ChildProcessError(f"{name} ended with {process.returncode}: see {self.folder / name}.log")
        return (
            self.kubectl("get", "--raw=/readyz").returncode == 0
            and self.kubectl("get", "namespace", "default").returncode == 0
        )

    def _run(self, name: str, *arguments: str) -> None:
        # the kernel ends them with the test run, even one that was killed
        guard = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        with (self.folder / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [*guard, program(name), *arguments], stdout=log, stderr=subprocess.STDOUT, cwd=self.folder
            )

    def _write_kubeconfig(self) -> None:
        cluster = {"server": self.url, "certificate-authority": str(self.folder / "certificates" / "apiserver.crt")}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "admin", "user": {"token": self._token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
            "current-context": "test",
        }
        self.kubeconfig.write_text(json.dumps(config))
        self.kubeconfig.chmod(0o600)


def _service_account_key(path: Path) -> None:
    """An RSA key, which the API server insists on; the standard library makes none."""
    subprocess.run(["openssl", "genrsa", "-out", path, "2048"], check=True, capture_output=True)  # noqa: S607 - from PATH
