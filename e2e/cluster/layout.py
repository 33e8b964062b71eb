"""Paths and addresses of the cluster: the state of a checkout, the cache of a user, the ports on this machine."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = Path(__file__).resolve().parent

NODE_NAME = "node1"
POD_NETWORK = "10.244.0.0/16"
SERVICE_NETWORK = "10.96.0.0/16"
API_SERVICE_ADDRESS = "10.96.0.1"
DNS_ADDRESS = "10.96.0.10"
BRIDGE = "tunesmith0"
CNI_NETWORK = "tunesmith"
STORAGE_CLASS = "local"

API_PORT = 6443
# What listens on a fixed port, so that a port in use is reported by name before anything starts.
PORTS = {
    "kube-apiserver": API_PORT,
    "etcd": 2379,
    "etcd peers": 2380,
    "kubelet health": 10248,
    "kube-proxy metrics": 10249,
    "kubelet": 10250,
    "kube-proxy health": 10256,
    "kube-controller-manager": 10257,
    "kube-scheduler": 10259,
}


class ClusterError(Exception):
    """Problem that the user can fix: a sentence with what is wrong, where, and what to do."""


def cache_folder() -> Path:
    """Cache that survives `down`: programs, image layers, models."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunesmith"


@dataclass(frozen=True)
class Layout:
    """The paths of the cluster whose state lies in `state`."""

    state: Path = REPOSITORY / ".cluster"

    @property
    def identity(self) -> str:
        """Eight hex digits that identify this checkout's cluster; socket paths are limited to 108 bytes."""
        return hashlib.sha256(str(self.state).encode()).hexdigest()[:8]

    @property
    def run(self) -> Path:
        """Sockets and the run-time state of containerd."""
        return Path("/run") / f"tunesmith-{self.identity}"

    @property
    def build_run(self) -> Path:
        """Buildah's run-time state, apart from the cluster's: an image may be building while the cluster goes."""
        return Path("/run") / f"tunesmith-{self.identity}-build"

    @property
    def bin(self) -> Path:
        """kubectl, helm, kubeconform and the components, as links into the cache."""
        return self.state / "bin"

    @property
    def log(self) -> Path:
        """One file per component."""
        return self.state / "log"

    @property
    def pki(self) -> Path:
        """Certificates and keys."""
        return self.state / "pki"

    @property
    def config(self) -> Path:
        """Configuration files of the components."""
        return self.state / "config"

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig, for people and tests."""
        return self.state / "kubeconfig"

    @property
    def images(self) -> Path:
        """JSON: image name to the reference to use in Helm values."""
        return self.state / "images.json"

    @property
    def containerd_socket(self) -> Path:
        """Where containerd listens."""
        return self.run / "containerd.sock"

    @property
    def containerd_root(self) -> Path:
        """Image content and snapshots: in the cache, so that a new cluster need not import 6 GB again."""
        return cache_folder() / "containerd"

    @property
    def cgroup(self) -> str:
        """Parent of every pod's cgroup, which identifies the pods' processes."""
        return f"tunesmith-{self.identity}"
