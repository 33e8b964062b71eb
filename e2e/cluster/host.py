"""What the cluster changes on the machine outside its own folders, and how each change is undone."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from e2e.cluster.layout import BRIDGE, PORTS, ClusterError, Layout
from e2e.cluster.steps import output_of

if TYPE_CHECKING:
    from collections.abc import Iterator

CGROUPS = Path("/sys/fs/cgroup")
PODS_WEIGHT = 4
"""Processor time of all pods together where others want it too, in that of one process outside."""
# Everything kubelet, kube-proxy and the network plugins write under /proc/sys; saved before, restored after.
SETTINGS = (
    "net/ipv4/ip_forward",
    "net/ipv4/conf/all/route_localnet",
    "net/ipv4/conf/default/forwarding",
    "net/ipv4/conf/all/forwarding",
    "net/netfilter/nf_conntrack_max",
    "net/netfilter/nf_conntrack_tcp_timeout_established",
    "net/netfilter/nf_conntrack_tcp_timeout_close_wait",
    "net/bridge/bridge-nf-call-iptables",
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)
# Places outside the state that the components' sources fix; removed when they were not there before and are empty.
FIXED_PLACES = (
    "/var/lib/kubelet/device-plugins",
    "/var/lib/kubelet",
    "/var/log/containers",
    "/var/log/pods",
    "/var/lib/cni/results",
    "/var/lib/cni/cache",
    "/var/lib/cni",
    "/run/containerd/s",
    "/run/containerd/fifo",
    "/run/containerd",
    "/run/netns",
    "/opt/containerd",
    "/run/xtables.lock",
    "/run/runc",
)
OWN_CHAINS = re.compile(r"^(KUBE-|CNI-)")


def address() -> str:
    """This machine's address, as other machines and the pods see it.

    Raises:
        ClusterError: only the loopback has an address.
    """
    for candidate in output_of(["hostname", "-I"]).split():
        if ":" not in candidate and not candidate.startswith(("10.244.", "10.96.")):
            return candidate
    raise ClusterError("this machine has no IPv4 address besides the loopback: the node needs one (see `ip address`)")


def ports_in_use(timeout: float) -> list[str]:
    """The cluster's ports that a process still listens on after `timeout` seconds, each with its purpose."""
    deadline = time.monotonic() + timeout
    while (busy := _ports_in_use()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return busy


def _ports_in_use() -> list[str]:
    busy = []
    for purpose, port in PORTS.items():
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("0.0.0.0", port))  # noqa: S104  only checks that the port is free
            except OSError:
                busy.append(f"{port} ({purpose})")
    return busy


def remember(layout: Layout) -> None:
    """Saves the settings and the existence of the fixed places, once, before anything is changed."""
    file = layout.state / "host-before.json"
    if file.exists():
        return
    before = {
        "settings": {
            name: Path("/proc/sys", name).read_text().strip() for name in SETTINGS if Path("/proc/sys", name).exists()
        },
        "places": [place for place in FIXED_PLACES if Path(place).exists()],
        "tables": {
            command: output_of([f"{command}-save"]) for command in ("iptables", "ip6tables") if shutil.which(command)
        },
    }
    temporary = file.with_suffix(".new")
    temporary.write_text(json.dumps(before, indent=1))
    temporary.replace(file)


def cgroup_roots() -> Iterator[Path]:
    """The mounted hierarchies: one per controller (version 1) or one in all (version 2)."""
    if (CGROUPS / "cgroup.controllers").exists():
        yield CGROUPS
        return
    for folder in sorted(CGROUPS.iterdir()):
        if folder.is_dir() and not folder.is_symlink() and (folder / "cgroup.procs").exists():
            yield folder


def prepare(layout: Layout) -> None:
    """Lets the machine forward packets and makes the cgroup that all pods live in."""
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1\n")
    for root in cgroup_roots():
        if (root / "cgroup.controllers").exists() and root == CGROUPS:
            wanted = (root / "cgroup.controllers").read_text().split()
            (root / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in wanted))
        own = root / layout.cgroup
        own.mkdir(exist_ok=True)
        if root.name == "cpuset" or (root / "cpuset.cpus").exists():
            for setting in ("cpuset.cpus", "cpuset.mems"):  # version 1 starts empty, and an empty set admits no process
                if (own / setting).exists() and not (own / setting).read_text().strip():
                    (own / setting).write_text((root / setting).read_text())
        for setting, of_a_process in (("cpu.shares", 1024), ("cpu.weight", 100)):  # version 1, version 2
            if (own / setting).exists():
                (own / setting).write_text(str(of_a_process * PODS_WEIGHT))


def pod_processes(layout: Layout) -> list[int]:
    """Processes inside the cluster's cgroup."""
    found: set[int] = set()
    for root in cgroup_roots():
        for folder, _, _ in os.walk(root / layout.cgroup):  # passes over groups that are removed meanwhile
            with contextlib.suppress(OSError):
                found.update(int(line) for line in Path(folder, "cgroup.procs").read_text().split())
    return sorted(found)


def remove_cgroups(layout: Layout) -> None:
    """Removes the cluster's cgroup from every hierarchy, innermost first."""
    for root in cgroup_roots():
        own = root / layout.cgroup
        if not own.exists():
            continue
        for folder, _, _ in os.walk(own, topdown=False):
            try:
                Path(folder).rmdir()
            except FileNotFoundError:
                continue
            except OSError as error:
                raise ClusterError(
                    f"cgroup {folder} cannot be removed ({error.strerror}): a process in it is still alive"
                ) from None


def unmount_below(*folders: Path) -> None:
    """Unmounts everything mounted below `folders`, innermost first."""
    prefixes = tuple(f"{folder}/" for folder in folders)
    mounted = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        place = line.split(" ")[4].encode().decode("unicode_escape")
        if place.startswith(prefixes):
            mounted.append(place)
    for place in reversed(mounted):
        if subprocess.run(["umount", place], check=False, capture_output=True).returncode:
            output_of(["umount", "--lazy", place])


def remove_interfaces() -> None:
    """Removes the pods' bridge and the interfaces on it."""
    if not Path("/sys/class/net", BRIDGE).exists():
        return
    for interface in Path("/sys/class/net", BRIDGE, "brif").iterdir():
        subprocess.run(["ip", "link", "delete", interface.name], check=False, capture_output=True)
    output_of(["ip", "link", "delete", BRIDGE])


def rule_removals(saved: str) -> str:
    """What to give to `iptables-restore --noflush` to remove our chains and the rules that lead into them.

    Args:
        saved: what `iptables-save` printed.

    Returns:
        the removals per table; empty when there is nothing of ours.
    """
    text = ""
    for table in re.split(r"^\*", saved, flags=re.MULTILINE)[1:]:
        name, *lines = table.splitlines()
        chains = [line[1:].split()[0] for line in lines if line.startswith(":") and OWN_CHAINS.match(line[1:])]
        leading = [
            line[3:]
            for line in lines
            if line.startswith("-A ") and not OWN_CHAINS.match(line[3:]) and re.search(r" -[jg] (KUBE-|CNI-)", line)
        ]
        # every chain is flushed before any is deleted, since they lead into each other
        removals = (
            [f"-D {rule}" for rule in leading]
            + [f"-F {chain}" for chain in chains]
            + [f"-X {chain}" for chain in chains]
        )
        if removals:
            text += "\n".join([f"*{name}", *removals, "COMMIT", ""])
    return text


def remove_rules(before: dict[str, str]) -> None:
    """Removes the chains of kubelet, kube-proxy and the network plugins, and the rules that lead into them.

    Args:
        before: command to what `<command>-save` printed before the cluster came; a table that was not there then and is
            empty now goes too. Empty where that is not known.
    """
    for command, family in (("iptables", "ip"), ("ip6tables", "ip6")):
        if shutil.which(command) is None:
            continue
        removals = rule_removals(output_of([f"{command}-save"]))
        if removals:
            output_of([f"{command}-restore", "--noflush"], stdin=removals.encode())
        if command not in before or shutil.which("nft") is None:
            continue
        for table in re.split(r"^\*", output_of([f"{command}-save"]), flags=re.MULTILINE)[1:]:
            name = table.split()[0]
            if f"*{name}\n" not in before[command] and "\n-A " not in table:
                subprocess.run(["nft", "delete", "table", family, name], check=False, capture_output=True)


def remove_stale_sockets() -> None:
    """Removes the sockets that containerd's killed shims left in the folder fixed in its source."""
    folder = Path("/run/containerd/s")
    for path in folder.iterdir() if folder.is_dir() else ():
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(str(path))
            except (ConnectionRefusedError, FileNotFoundError):
                path.unlink(missing_ok=True)


def remove_fixed_places(layout: Layout, before: list[str]) -> None:
    """Removes what the components leave at fixed places: our links and results, then folders that were new."""
    for link in Path("/var/log/containers").glob("*.log"):
        if link.is_symlink() and str(link.readlink()).startswith(f"{layout.state}/"):
            link.unlink()
    for folder in ("/var/lib/cni/results", "/var/lib/cni/cache/results"):
        for result in Path(folder).glob("*"):
            if f"{layout.run}/".encode() in result.read_bytes():  # the pod's network namespace lies there
                result.unlink()
    if "/var/lib/kubelet" not in before:
        shutil.rmtree("/var/lib/kubelet", ignore_errors=True)
    for place in map(Path, FIXED_PLACES):
        if str(place) in before:
            continue
        try:
            place.unlink() if place.is_file() else place.rmdir()
        except OSError:
            continue  # it is not there, or someone else's things are in it


def restore(layout: Layout) -> dict[str, object]:
    """Writes the saved settings back; returns everything that was remembered, empty where nothing was."""
    file = layout.state / "host-before.json"
    if not file.exists():
        return {}
    before: dict[str, object] = json.loads(file.read_text())
    settings = before["settings"]
    assert isinstance(settings, dict)
    for name, value in settings.items():
        path = Path("/proc/sys", name)
        if path.exists() and path.read_text().strip() != value:
            path.write_text(f"{value}\n")
    return before
