"""Builds the cluster's programs from Go modules, once per content of their inputs."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster.layout import SOURCES, ClusterError, Layout, cache_folder
from e2e.cluster.steps import output_of, run_logged, step

KUBERNETES_COMPONENTS = (
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "kubectl",
    "volume-provisioner",
)
MINIMUM_GO = (1, 26)
NEWER_GO = "go1.27.3"


@dataclass(frozen=True)
class Program:
    """A program and the Go module, pinned by its go.mod and go.sum, that it is built from."""

    name: str
    folder: str
    package: str
    variables: str = ""
    """`-X` values for the linker."""
    links: tuple[str, ...] = ()
    """Other names it is called by."""


PROGRAMS = {
    program.name: program
    for program in (
        Program(
            "kubernetes", "kubernetes", ".", "k8s.io/component-base/version.gitVersion=v1.34.4", KUBERNETES_COMPONENTS
        ),
        Program("pause", "pause", "."),
        Program("coredns", "tools/coredns", "github.com/coredns/coredns"),
        Program("versitygw", "tools/versitygw", "github.com/versity/versitygw/cmd/versitygw"),
        Program("otelcol", "tools/otelcol", "."),
        Program("helm", "tools/helm", "helm.sh/helm/v3/cmd/helm", "helm.sh/helm/v3/internal/version.version=v3.22.0"),
        Program("kubeconform", "tools/kubeconform", "github.com/yannh/kubeconform/cmd/kubeconform"),
    )
}


def go_environment() -> dict[str, str]:
    """The user's environment for go, with a newer toolchain named where the installed one is too old.

    Raises:
        ClusterError: go is not installed.
    """
    if shutil.which("go") is None:
        raise ClusterError("no `go` on PATH: install Go 1.26 or newer, the cluster's programs are built with it")
    environment = dict(os.environ, CGO_ENABLED="0", GOFLAGS="-buildvcs=false")
    version = re.search(r"go(\d+)\.(\d+)", output_of(["go", "version"]))
    if version is None or (int(version[1]), int(version[2])) < MINIMUM_GO:
        environment["GOTOOLCHAIN"] = NEWER_GO
    return environment


def inputs_digest(program: Program) -> str:
    """Twelve hex digits of everything that decides what the program will be."""
    digest = hashlib.sha256(repr(program).encode())
    for file in sorted((SOURCES / program.folder).iterdir()):
        if file.suffix in {".go", ".mod", ".sum"}:
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def build(name: str) -> Path:
    """Builds a program unless the cache has it; returns the folder with the program and its links.

    Raises:
        ClusterError: the build failed; names its log.
    """
    program = PROGRAMS[name]
    folder = cache_folder() / "bin" / f"{name}-{inputs_digest(program)}"
    if folder.is_dir():
        return folder
    with step(f"building {name}"):
        work = folder.with_name(f".{folder.name}-{os.getpid()}")
        work.mkdir(parents=True, exist_ok=True)
        linker = "-s -w" + (f" -X {program.variables}" if program.variables else "")
        command = ["go", "build", "-trimpath", "-ldflags", linker, "-o", str(work / name), program.package]
        log = cache_folder() / "log" / f"build-{name}.log"
        log.unlink(missing_ok=True)
        try:
            run_logged(command, log, f"building {name}", environment=go_environment(), folder=SOURCES / program.folder)
            for link in program.links:
                (work / link).symlink_to(name)
            if not folder.is_dir():  # another run may have been faster
                work.rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def link_programs(layout: Layout) -> None:
    """Builds what the node and its users need and links it into the state's `bin` folder."""
    for name in ("kubernetes", "helm", "kubeconform"):
        folder = build(name)
        for program in PROGRAMS[name].links or (name,):
            _link(layout, program, folder / program)


def link_clients(layout: Layout) -> None:
    """Link kubectl, helm and kubeconform into the state's `bin` folder; programs that are not installed are built."""
    for program, source in (("kubectl", "kubernetes"), ("helm", "helm"), ("kubeconform", "kubeconform")):
        path = os.pathsep.join(folder for folder in os.get_exec_path() if Path(folder) != layout.bin)
        installed = shutil.which(program, path=path)
        _link(layout, program, Path(installed) if installed else build(source) / program)


def _link(layout: Layout, program: str, target: Path) -> None:
    layout.bin.mkdir(parents=True, exist_ok=True)
    link = layout.bin / program
    if not link.is_symlink() or link.readlink() != target:
        link.unlink(missing_ok=True)
        link.symlink_to(target)


def install_packages(layout: Layout) -> None:
    """Installs the Debian packages that are missing on this machine.

    Raises:
        ClusterError: a package is missing and apt-get is missing or failed.
    """
    needed = {
        "containerd": "containerd",
        "runc": "runc",
        "ctr": "containerd",
        "buildah": "buildah",
        "iptables": "iptables",
        "conntrack": "conntrack",
        "debootstrap": "debootstrap",
        "openssl": "openssl",
        "ip": "iproute2",
    }
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = {package for program, package in needed.items() if shutil.which(program, path=path) is None}
    if not Path("/usr/lib/cni/bridge").exists():
        missing.add("containernetworking-plugins")
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise ClusterError(
            f"these programs are missing and this machine has no apt-get to install them: {', '.join(sorted(missing))}"
        )
    with step(f"installing {', '.join(sorted(missing))}"):
        log = layout.log / "apt-get.log"
        environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
        run_logged(["apt-get", "update"], log, "apt-get update", environment=environment)
        command = ["apt-get", "install", "--yes", "--no-install-recommends", *sorted(missing)]
        run_logged(command, log, "apt-get install", environment=environment)
        # Debian's package starts another containerd if systemd runs.
        if shutil.which("systemctl") and "containerd" in missing and Path("/run/systemd/system").exists():
            subprocess.run(["systemctl", "disable", "--now", "containerd"], check=False, capture_output=True)
