"""Processor time of the benchmark's processes, from /proc."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_TICKS = os.sysconf("SC_CLK_TCK")
_TITLES = {"VLLM::EngineCor": "engine core", "VLLM::EngineCore": "engine core", "VLLM::Worker": "worker"}
_MAIN = "main"


class Usage(dict[str, float]):
    """Processor seconds by process."""

    def since(self, before: Mapping[str, float]) -> Usage:
        """Return the seconds that were used after an earlier measurement."""
        return Usage({name: seconds - before.get(name, 0.0) for name, seconds in self.items()})

    def divided(self, by: float) -> dict[str, float]:
        """Return the seconds divided by a number, rounded."""
        return {name: round(seconds / by, 4) for name, seconds in sorted(self.items())}


def of_group(group: int) -> Usage:
    """Return the processor seconds of a process group so far, by process; a process includes its finished children.

    The first process is `main`. vLLM's others are named by their titles, and any other is a `child`.
    """
    found = Usage()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            if os.getpgid(int(process.name)) != group:
                continue
            name, seconds = _read(process)
            key = _MAIN if int(process.name) == group else _TITLES.get(name, "child")
            found[key] = found.get(key, 0.0) + seconds
    return found


def of_process(number: int) -> float:
    """Return the processor seconds of a process and its finished children."""
    return _read(Path(f"/proc/{number}"))[1]


def _read(process: Path) -> tuple[str, float]:
    head, _, rest = (process / "stat").read_text().rpartition(")")
    # utime, stime, cutime and cstime are the fields 14 to 17; `rest` begins with field 3.
    return head.partition("(")[2], sum(map(int, rest.split()[11:15])) / _TICKS
