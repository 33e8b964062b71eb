"""A part of `make verify-fuzz-adapters`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

REPORT = re.compile(
    r"passed: 100 mutations in \d+ s: (?P<refused>\d+) refused with (?P<sentences>\d+) different sentences,"
    r" (?P<placed>\d+) placed, .* highest memory of a child (?P<memory>\d+) MiB"
)


def test_every_mutated_adapter_is_valid_or_refused_with_a_message() -> None:
    # A process of its own: the process that forks children loads modules only when it starts.
    command = [sys.executable, "-m", "tests.server.fuzz_adapters", "--mutations", "100"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report = REPORT.fullmatch(ran.stdout.strip())
    assert report is not None, ran.stdout
    assert int(report["refused"]) > 60
    assert int(report["placed"]) > 3
    assert int(report["sentences"]) > 20
    assert int(report["memory"]) < 400  # shared libraries among it
