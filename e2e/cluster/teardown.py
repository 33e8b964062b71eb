"""Stops a cluster in any state and removes all of it from the machine."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

from e2e.cluster import host, processes
from e2e.cluster.archive import ctr
from e2e.cluster.layout import ClusterError, Layout, cache_folder
from e2e.cluster.steps import step, wait_until


def _remove_containers(layout: Layout) -> None:
    """Removes the containers from containerd's books, which outlive the cluster in the cache beside the images."""
    containers = ctr(layout, "containers", "ls", "--quiet").split()
    for container in containers:
        subprocess.run(
            [
                "ctr",
                "--address",
                str(layout.containerd_socket),
                "--namespace",
                "k8s.io",
                "tasks",
                "delete",
                "--force",
                container,
            ],
            check=False,
            capture_output=True,
        )
    if containers:
        ctr(layout, "containers", "delete", *containers)


def down(layout: Layout) -> None:
    """Stops every process of the cluster, undoes its changes to the machine and removes its state.

    Raises:
        ClusterError: something could not be removed, with the reason.
    """
    state = str(layout.state)
    with step("stopping the control plane and the kubelet"):
        names = {
            "kubelet",
            "kube-proxy",
            "kube-scheduler",
            "kube-controller-manager",
            "volume-provisioner",
            "kube-apiserver",
            "etcd",
        }
        processes.stop_all(layout, sorted(names), grace=1.0)  # their state goes too: nothing is worth a longer wait
    with step("ending the pods"):
        wait_until(lambda: _kill_pods(layout), 20, 0.1)
        if any(p.state == state and Path(p.command[0]).name == "containerd" for p in processes.marked_processes()):
            try:
                _remove_containers(layout)
            except ClusterError as error:
                # Only the books in the cache are affected; the next kubelet removes what it does not know.
                print(f"  containerd did not answer ({error}); continuing without it")
        processes.stop_all(layout)
    with step("unmounting and restoring the machine"):
        host.unmount_below(layout.state, layout.run, layout.build_run, cache_folder())
        host.remove_cgroups(layout)
        before: dict[str, Any] = host.restore(layout)
        others = {p.state for p in processes.marked_processes()} - {state}
        if not others:
            host.remove_interfaces()
            host.remove_rules(before.get("tables", {}))
        host.remove_stale_sockets()
        for folder in (layout.run, layout.build_run):
            shutil.rmtree(folder, ignore_errors=True)
        host.remove_fixed_places(layout, before.get("places", []))
    with step(f"removing {layout.state}"):
        if layout.state.exists():
            shutil.rmtree(layout.state)


def forget_context(layout: Layout) -> None:
    """Removes what this checkout keeps about a cluster of the user's; the cluster stays as it is."""
    host.unmount_below(layout.build_run, cache_folder() / "buildah")
    for folder in (layout.state, layout.build_run):
        shutil.rmtree(folder, ignore_errors=True)


def _kill_pods(layout: Layout) -> str | None:
    pids = host.pod_processes(layout)
    if not pids:
        return None
    processes.stop(pids, grace=0)
    return f"{len(pids)} processes of pods are still alive, among them {pids[0]}"
