"""Ways to damage a checkpoint's folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith_trainer.training.checkpoint import MANIFEST

if TYPE_CHECKING:
    from pathlib import Path


def flip(folder: Path) -> None:
    data = bytearray((folder / "weights").read_bytes())
    data[500] ^= 1
    (folder / "weights").write_bytes(data)


def truncate(folder: Path) -> None:
    (folder / "weights").write_bytes(b"w" * 999)


def lose_a_file(folder: Path) -> None:
    (folder / "state").unlink()


def lose_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()
