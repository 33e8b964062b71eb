"""The local cluster recovers from being killed, and `down` leaves nothing behind.

It takes this checkout's cluster down, with everything in it. So it is skipped unless TUNESMITH_TEST_LIFECYCLE=1.
"""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from e2e.cluster import addons, host, processes, s3
from e2e.cluster.layout import NODE_NAME, Layout
from e2e.cluster.steps import wait_until

REPOSITORY = Path(__file__).resolve().parents[2]

LAYOUT = Layout()
COMMAND = [sys.executable, "-m", "e2e.cluster"]
WATCHED_FOLDERS = (
    "/run",
    "/run/containerd",
    "/run/containerd/s",
    "/var/lib",
    "/var/lib/cni",
    "/var/log",
    "/opt",
    "/etc/cni",
    "/run/netns",
)

pytestmark = pytest.mark.skipif(
    not os.environ.get("TUNESMITH_TEST_LIFECYCLE"), reason="takes the cluster down: set TUNESMITH_TEST_LIFECYCLE=1"
)


def cluster(command: str) -> str:
    done = subprocess.run([*COMMAND, command], capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def own_processes() -> dict[int, tuple[str, ...]]:
    return {p.pid: p.command for p in processes.marked_processes() if p.state == str(LAYOUT.state)}


def components() -> dict[int, str]:
    return {pid: command[0] for pid, command in own_processes().items() if "containerd-shim" not in command[0]}


def rules(command: str) -> list[str]:
    lines = subprocess.run([command], capture_output=True, text=True, check=True).stdout.splitlines()
    return [re.sub(r"\[\d+:\d+\]", "", line) for line in lines if not line.startswith("#")]


def machine() -> dict[str, Any]:
    """Return everything that a cluster may leave behind."""
    mounts = [line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return {
        "processes": own_processes() | dict.fromkeys(host.pod_processes(LAYOUT), ("a pod's",)),
        "mounts": sorted(mounts),
        "interfaces": sorted(path.name for path in Path("/sys/class/net").iterdir()),
        "iptables": rules("iptables-save"),
        "ip6tables": rules("ip6tables-save"),
        "settings": {
            name: Path("/proc/sys", name).read_text() for name in host.SETTINGS if Path("/proc/sys", name).exists()
        },
        "cgroups": sorted(str(path) for root in host.cgroup_roots() for path in root.glob("*tunesmith*")),
        "files": sorted(
            str(path) for folder in map(Path, WATCHED_FOLDERS) if folder.is_dir() for path in folder.iterdir()
        ),
        "state": LAYOUT.state.exists(),
    }


def stored(method: str, key: str) -> int:
    access, secret = addons.ensure_s3_credentials(LAYOUT)
    address = addons.kubectl(LAYOUT, "--namespace", "s3", "get", "service", "s3", "-o", "jsonpath={.spec.clusterIP}")
    return s3.request(address, 7070, method, f"/{addons.BUCKET}/{key}", access, secret)


def not_kept() -> str | None:
    """Return a problem with the objects created earlier, or None; a Service follows its pods after a moment."""
    try:
        code = stored("HEAD", "kept")
    except OSError as error:
        return f"the S3 server's Service does not answer: {error}"
    return None if code == http.client.OK else f"the S3 server answers {code}"


def test_the_cluster_recovers_and_leaves_nothing_behind() -> None:
    cluster("down")
    before = machine()
    assert not before["processes"]
    assert not before["state"]

    # killed at three stages of its start
    for program in ("etcd", "containerd", "kubelet"):
        start = subprocess.Popen([*COMMAND, "up"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=REPOSITORY)
        deadline = time.monotonic() + 120
        while not any(Path(path).name == program for path in components().values()):
            assert time.monotonic() < deadline, f"{program} was not started"
            assert start.poll() is None, f"`up` exited before it started {program}"
            time.sleep(0.01)
        start.send_signal(signal.SIGKILL)
        start.wait()
    cluster("up")

    # run twice, it restarts nothing
    running = components()
    cluster("up")
    assert components() == running

    # all processes killed: the data is still there
    assert stored("PUT", "kept") == http.client.OK
    for pid in [*own_processes(), *host.pod_processes(LAYOUT)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    cluster("up")
    wait_until(not_kept, 30)
    conditions = addons.kubectl(
        LAYOUT, "get", "node", NODE_NAME, "-o", "jsonpath={.status.conditions[?(@.type=='Ready')].status}"
    )
    assert conditions == "True"

    cluster("down")
    after = machine()
    for what in ("mounts", "interfaces", "cgroups", "files"):
        assert set(after[what]) <= set(before[what])
    for what in ("processes", "iptables", "ip6tables", "settings", "state"):
        assert after[what] == before[what]
    cluster("up")
