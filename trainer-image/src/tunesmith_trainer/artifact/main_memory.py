"""Main memory that is still available to this process."""

from __future__ import annotations

from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def available_memory(cgroup: Path = _CGROUP, meminfo: Path = _MEMINFO) -> int:
    """Return the bytes available before the machine or the container is out of memory; reclaimable file pages count.

    Args:
        cgroup: folder of the container's control group (version 2); if it has no limit, the machine's memory counts.
        meminfo: memory statistics of the machine.
    """
    figures = _figures(meminfo)
    machine = 1024 * figures["MemAvailable:"]
    try:
        limit = (cgroup / "memory.max").read_text(encoding="ascii").strip()
        used = int((cgroup / "memory.current").read_text(encoding="ascii")) - _figures(cgroup / "memory.stat")["file"]
    except FileNotFoundError:
        return machine
    return machine if limit == "max" else max(0, min(machine, int(limit) - used))


def _figures(path: Path) -> dict[str, int]:
    lines = (line.split() for line in path.read_text(encoding="ascii").splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}
