"""A part of `make verify-fuzz-adapters`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.server.fuzz_adapters import fuzz

if TYPE_CHECKING:
    from pathlib import Path


def test_every_mutation_of_an_adapter_ends_with_a_sentence_or_is_sound(tmp_path: Path) -> None:
    report = fuzz(range(100), tmp_path)
    assert report.wrong == []
    assert report.outcomes["refused"] > 60
    assert report.outcomes["placed"] > 3
    assert len(report.sentences) > 20
    assert report.memory < 400 * 1024  # KiB, shared libraries among it
