"""Main memory that this process may still take."""

from __future__ import annotations

from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def available_memory(cgroup: Path = _CGROUP, meminfo: Path = _MEMINFO) -> int:
    """Bytes that can be taken before the machine or the container has none; pages of files are given back, and count.

    Args:
        cgroup: folder of the container's control group (version 2); without a limit there the machine's memory counts.
        meminfo: the machine's figures.
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
