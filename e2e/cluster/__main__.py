"""A real one-node Kubernetes on this machine, for `make demo` and the end-to-end tests.

    python3 -m e2e.cluster up        # build what is missing, start, wait until it is usable
    python3 -m e2e.cluster images    # build the project's images and bring them into the cluster
    python3 -m e2e.cluster down      # stop and remove everything except the cache

State lies in .cluster/ of the checkout: the kubeconfig in .cluster/kubeconfig, logs in .cluster/log, programs (kubectl,
helm, kubeconform) in .cluster/bin. What is dear to build is cached in ${XDG_CACHE_HOME:-~/.cache}/tunesmith.

With KUBECONTEXT=name in the environment that cluster of yours is used instead: nothing is started or stopped, and
images are pushed to $REGISTRY, from which its nodes must be able to pull.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from e2e.cluster import addons, binaries, certificates, host, images, node, processes, teardown
from e2e.cluster.archive import ensure_program_image, program_reference
from e2e.cluster.layout import NODE_NAME, ClusterError, Layout, cache_folder
from e2e.cluster.steps import output_of, report, step, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

FREE_DISK = 3 << 30
PORT_PATIENCE = 5.0
"""Seconds that the sockets of a process which was just killed may take to close."""


@contextmanager
def only_one(name: str) -> Iterator[None]:
    """Allow one process at a time in its block; others report that they wait."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"  waiting for another run, which holds {lock.name}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def check_machine(layout: Layout) -> None:
    """Raise ClusterError with all problems that prevent a cluster from starting on this machine."""
    problems = []
    if os.geteuid() != 0:
        problems.append("containers need root: run this as root")
    if not any(host.cgroup_roots()):
        problems.append("no cgroups are mounted below /sys/fs/cgroup: the kubelet needs them")
    layout.state.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(layout.state).free
    if free < FREE_DISK:
        problems.append(f"only {free >> 20} MiB are free for {layout.state}: free at least {FREE_DISK >> 30} GiB")
    marked = processes.marked_processes()
    others = {process.state for process in marked} - {str(layout.state)}
    if others:
        problems.append(
            f"the cluster of {min(others)} runs on this machine: stop it with `make cluster-down` in its checkout"
        )
    elif not any(process.state == str(layout.state) for process in marked):
        busy = host.ports_in_use(PORT_PATIENCE)
        if busy:
            problems.append(f"in use: port {', '.join(busy)}: stop what listens there (see `ss -ltnp`)")
    if problems:
        raise ClusterError("; ".join(problems))


def use_context(layout: Layout, context: str) -> None:
    """Write the user's context to .cluster/kubeconfig, after checking that its API server answers."""
    layout.state.mkdir(parents=True, exist_ok=True)
    binaries.link_clients(layout)
    with step(f"asking the cluster of context {context}"):
        kubectl = str(layout.bin / "kubectl")
        flat = output_of([kubectl, "config", "view", "--minify", "--flatten", f"--context={context}"])
        version = json.loads(
            output_of([kubectl, f"--context={context}", "--request-timeout=15s", "get", "--raw=/version"])
        )
        layout.kubeconfig.touch(mode=0o600)
        layout.kubeconfig.write_text(flat)
    report(f"  Kubernetes {version['gitVersion']} answers; nothing was started")


def ready_node(layout: Layout) -> str | None:
    """Return None if the node is Ready, otherwise the reason."""
    found = addons.kubectl(layout, "get", "node", NODE_NAME, "--ignore-not-found", "-o", "json")
    if not found:
        return f"node {NODE_NAME} has not registered: see {layout.log}/kubelet.log"
    for condition in json.loads(found)["status"].get("conditions", []):
        if condition["type"] == "Ready":
            return None if condition["status"] == "True" else f"node {NODE_NAME} is not Ready: {condition['message']}"
    return f"node {NODE_NAME} has no Ready condition: see {layout.log}/kubelet.log"


def start_control_plane(layout: Layout, address: str) -> node.ControlPlane:
    """etcd, API server and containerd run and answer; the pause image is there."""
    pause_program = binaries.build("pause") / "pause"
    components = node.control_plane(layout, address)
    containerd = node.containerd(layout, program_reference("pause", pause_program))
    with step("etcd, API server and containerd"):
        for component in (components.etcd, components.apiserver, containerd):
            processes.ensure(layout, component)

        def missing() -> str | None:
            for component in (components.etcd, components.apiserver, containerd):
                processes.require_alive(layout, component)
            if not layout.containerd_socket.is_socket():
                return f"containerd does not listen on {layout.containerd_socket}"
            try:
                addons.kubectl(layout, "get", "--raw=/readyz", "--request-timeout=2s")
            except ClusterError:
                return f"the API server is not ready: see {processes.log_of(layout, components.apiserver)}"
            return None

        wait_until(missing, 90)
        ensure_program_image(layout, "pause", pause_program)
    return components


def start_node(layout: Layout, address: str, components: node.ControlPlane) -> None:
    """Controllers, kubelet and proxy run and the node is Ready; the add-ons are applied, not awaited."""
    workers = [
        components.manager,
        components.scheduler,
        node.kubelet(layout, address),
        node.kube_proxy(layout),
        node.volume_provisioner(layout),
    ]
    with step(f"node {NODE_NAME}"):
        for component in workers:
            processes.ensure(layout, component)
        addons.apply_base(layout)
        addons.apply_s3(layout, addons.s3_image(layout))

        def missing() -> str | None:
            for component in workers:
                processes.require_alive(layout, component)
            return ready_node(layout)

        wait_until(missing, 90)


def up(layout: Layout) -> None:
    """Start the programs that are not running and wait until the cluster is usable."""
    context = os.environ.get("KUBECONTEXT")
    if context:
        use_context(layout, context)
        return
    check_machine(layout)
    binaries.install_packages(layout)
    build(layout)
    address = host.address()
    with step("certificates"):
        certificates.ensure_certificates(layout, address)
    host.remember(layout)
    host.prepare(layout)
    components = start_control_plane(layout, address)
    start_node(layout, address, components)
    with step("name service"):
        addons.wait_available(layout, "kube-system", "coredns", 90)
    with step("S3 server"):
        addons.ensure_s3_bucket(layout)
    report(f"  usable: export KUBECONFIG={layout.kubeconfig} PATH={layout.bin}:$PATH")


def build(layout: Layout) -> None:
    """Builds every program of the cluster."""
    for name in binaries.PROGRAMS:
        binaries.build(name)
    binaries.link_programs(layout)


def down(layout: Layout) -> None:
    """Stop the cluster and remove everything except the cache."""
    if os.environ.get("KUBECONTEXT"):
        report("  KUBECONTEXT is set: that cluster is not changed")
        teardown.forget_context(layout)
        return
    teardown.down(layout)


def status(layout: Layout) -> None:
    """Print the processes and the cluster's nodes and pods; raise ClusterError if the cluster is not usable."""
    own = [process for process in processes.marked_processes() if process.state == str(layout.state)]
    for process in sorted(own, key=lambda process: process.pid):
        name = Path(process.command[0]).name
        if not name.startswith("containerd-shim"):
            report(f"  {name:24} pid {process.pid}")
    if not layout.kubeconfig.exists():
        raise ClusterError(f"no cluster is running in {layout.state}: start it with `python3 -m e2e.cluster up`")
    report(addons.kubectl(layout, "get", "nodes,pods", "--all-namespaces", "-o", "wide"))


def main() -> int:
    """Command line: see the module's docstring and `--help`."""
    parser = argparse.ArgumentParser(
        prog="python3 -m e2e.cluster", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    command(
        "up",
        "start the cluster, or what of it does not run, and wait until it is usable",
        "python3 -m e2e.cluster up",
    )
    command("down", "stop the cluster and remove everything except the cache", "python3 -m e2e.cluster down")
    command("status", "show processes, node and pods", "python3 -m e2e.cluster status")
    delivery = command(
        "images",
        "build the project's images and bring them into the cluster; writes their references to .cluster/images.json",
        "python3 -m e2e.cluster images operator agent",
    )
    known = [image.name for image in images.IMAGES]
    delivery.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; all when none is named")
    command(
        "build",
        "build the cluster's programs and link them into .cluster/bin; starts nothing",
        "python3 -m e2e.cluster build",
    )
    command(
        "assets",
        "build etcd and kube-apiserver and print their folder, for tests against a bare API server",
        "KUBEBUILDER_ASSETS=$(python3 -m e2e.cluster assets) uv run pytest tests/controlplane",
    )
    arguments = parser.parse_args()
    try:
        run(Layout(), arguments.command, getattr(arguments, "names", []))
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: run the same command again to continue", file=sys.stderr)
        return 130
    return 0


def run(layout: Layout, command: str, names: list[str]) -> None:
    """Run a command; those that change something run one at a time."""
    if command == "status":
        status(layout)
    elif command == "assets":
        with only_one("cluster"), steps_to_stderr():
            folder = binaries.build("kubernetes")
        print(folder)
    elif command == "build":
        with only_one("cluster"):
            build(layout)
    elif command == "images":
        with only_one("images"):
            images.deliver(layout, names or [image.name for image in images.IMAGES])
    elif command == "down":
        with only_one("images"), only_one("cluster"):  # a running build brings its image to the cluster at its end
            down(layout)
    else:
        with only_one("cluster"):
            up(layout)


@contextmanager
def steps_to_stderr() -> Iterator[None]:
    """Keeps standard output for the command's result."""
    real, sys.stdout = sys.stdout, sys.stderr
    try:
        yield
    finally:
        sys.stdout = real


if __name__ == "__main__":
    sys.exit(main())
