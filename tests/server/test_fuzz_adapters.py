"""A part of `make verify-fuzz-adapters`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.server.fuzz_adapters import fuzz

if TYPE_CHECKING:
    from pathlib import Path


def test_every_mutated_adapter_is_valid_or_refused_with_a_message(tmp_path: Path) -> None:
    report = fuzz(range(100), tmp_path)
    assert report.wrong == []
    assert report.outcomes["refused"] > 60
    assert report.outcomes["placed"] > 3
    assert len(report.sentences) > 20
    assert report.memory < 400 * 1024  # KiB, shared libraries among it
