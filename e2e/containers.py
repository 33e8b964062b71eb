"""Processes of the local cluster's containers, as processes of this machine."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable

    from e2e.installation import Object

_SAMPLE_SECONDS = 0.05


def container_status(pod: Object, container: str) -> Object:
    """Return the status of a container or init container of the pod.

    Raises:
        KeyError: the pod reports none yet.
    """
    status = pod["status"]
    for entry in [*status.get("containerStatuses", []), *status.get("initContainerStatuses", [])]:
        if entry["name"] == container:
            found: Object = entry
            return found
    raise KeyError(f"{pod['metadata']['name']} reports no container {container}")


def processes_of(container_id: str) -> list[int]:
    """Return the processes of this machine that belong to the container."""
    identity = container_id.rpartition("/")[2]
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if identity in (entry / "cgroup").read_text():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def resident_bytes(process: int) -> int:
    """Return the resident memory of the process; 0 once it is gone."""
    try:
        status = (Path("/proc") / str(process) / "status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:")), 0)


class PeakMemory:
    """Highest resident memory of some processes while the block runs: `with PeakMemory(processes) as peak`."""

    def __init__(self, processes: Callable[[], list[int]]) -> None:
        self._processes = processes
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.before = 0
        self.bytes = 0

    def __enter__(self) -> Self:
        self.before = self.bytes = sum(map(resident_bytes, self._processes()))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        processes = self._processes()
        while not self._stop.wait(_SAMPLE_SECONDS):
            self.bytes = max(self.bytes, sum(map(resident_bytes, processes)))

    def __str__(self) -> str:
        return f"{self.before / 2**20:.0f} → {self.bytes / 2**20:.0f} MiB"
