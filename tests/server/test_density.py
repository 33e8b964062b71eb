"""64 adapters on two pods with 8 slots each, and caches that hold a third of them: each answers with its own marker."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

from tests.server.server_rig import REPOSITORY

if TYPE_CHECKING:
    from pathlib import Path

ADAPTERS, MEMORY = 64, 12 * 600_000
"""Each pod holds 32 adapters of 561 KB."""


def test_every_adapter_answers_as_itself_whatever_is_swapped(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "benchmarks.density.benchmark", f"--folder={tmp_path}", f"--adapters={ADAPTERS}"),
        *("--sizes", str(ADAPTERS), "--clients=24", "--seconds=5", "--repeats=1", f"--memory={MEMORY}"),
        "--plain",
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=3000)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["all"]["requests"] == ADAPTERS + ADAPTERS // 4
    assert results["registration"]["pods"] == [ADAPTERS // 2] * 2
    assert max(results["registration"]["cache_mib"]) <= MEMORY / 2**20
    assert all(count > 0 for count in results["reloads"]), "adapters were read from disk again"
