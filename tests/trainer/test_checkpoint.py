"""Checkpoints on a disk: what is damaged is never used, and what cannot be written leaves nothing behind."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from checkpoint_damage import flip, lose_a_file, lose_the_manifest, truncate

from tunesmith_trainer.checkpoint import (
    MANIFEST,
    Checkpoints,
    DamagedCheckpointError,
    NotWrittenError,
    OtherJobError,
    name_of,
    verify,
    write,
)
from tunesmith_trainer.errors import InvalidSpecError, StorageUnavailableError
from tunesmith_trainer.store import Stores

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BINDING = "sha256:of-this-run"


def fill(folder: Path) -> None:
    (folder / "weights").write_bytes(b"w" * 1000)
    (folder / "state").write_bytes(b"s" * 10)


def add_a_file(folder: Path) -> None:
    (folder / "stranger").write_bytes(b"")


def claim_another_step(folder: Path) -> None:
    document = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**document, "step": 9}))


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (flip, "the content of weights changed"),
    (truncate, "weights has 999 bytes instead of 1000"),
    (lose_a_file, "state is missing"),
    (lose_the_manifest, "checkpoint.json is missing"),
    (add_a_file, "stranger is not of it"),
    (claim_another_step, "the content of checkpoint.json changed"),
]


def checkpoints(folder: Path, said: list[str], *, keep: int = 2) -> Checkpoints:
    folder.mkdir(exist_ok=True)
    stores = Stores(secrets=folder, allow_file=True)
    place = stores.folder(f"file://{folder}", what="the checkpoints", missing=StorageUnavailableError)
    return Checkpoints(place, folder.parent / "scratch", binding=BINDING, keep=keep, say=said.append)


def test_a_whole_checkpoint_verifies(tmp_path: Path) -> None:
    path = write(tmp_path, 4, BINDING, fill)
    verify(path, 4, BINDING)
    assert sorted(entry.name for entry in path.iterdir()) == [MANIFEST, "state", "weights"]


@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_damage_is_found_and_the_older_checkpoint_is_taken(
    tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    folder, said = tmp_path / "checkpoints", list[str]()
    kept = checkpoints(folder, said)
    for step in (4, 8):
        assert kept.save(step, fill)
    damage(folder / name_of(8))
    with pytest.raises(DamagedCheckpointError, match=words):
        verify(folder / name_of(8), 8, BINDING)
    found = kept.newest()
    assert found is not None
    assert found.step == 4
    assert any("step 8 is damaged and not used" in line and words in line for line in said)


def test_where_none_is_usable_training_begins_anew_and_says_so(tmp_path: Path) -> None:
    folder, said = tmp_path / "checkpoints", list[str]()
    kept = checkpoints(folder, said)
    kept.save(4, fill)
    flip(folder / name_of(4))
    assert kept.newest() is None
    assert said[-1].strip() == "no checkpoint is usable: training begins at step 0"


def test_the_checkpoints_of_another_run_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "checkpoints", 4, "sha256:of-another-run", fill)
    with pytest.raises(OtherJobError):
        verify(path, 4, BINDING)
    with pytest.raises(InvalidSpecError, match="holds checkpoints of another spec, base model or data set"):
        checkpoints(tmp_path / "checkpoints", []).newest()


def test_a_full_disk_leaves_the_older_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    def too_much(folder: Path) -> None:
        (folder / "weights").symlink_to("/dev/full")
        (folder / "weights").write_bytes(b"w" * 100_000)

    folder, said = tmp_path / "checkpoints", list[str]()
    kept = checkpoints(folder, said)
    kept.save(4, fill)
    with pytest.raises(NotWrittenError, match=r"the disk of .* is full"):
        write(folder, 8, BINDING, too_much)
    assert not kept.save(8, too_much)
    assert "that of step 4 stays, training goes on" in said[-1]
    assert [entry.name for entry in folder.iterdir()] == [name_of(4)]
    found = kept.newest()
    assert found is not None
    assert found.step == 4


def test_what_a_killed_process_left_unfinished_is_not_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    kept = checkpoints(folder, [])

    def killed(unfinished: Path) -> None:
        fill(unfinished)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(folder, 4, BINDING, killed)
    assert kept.newest() is None
    assert kept.save(8, fill)
    assert [entry.name for entry in folder.iterdir()] == [name_of(8)]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    kept = checkpoints(folder, [], keep=2)
    for step in (4, 8, 12):
        kept.save(step, fill)
    assert sorted(entry.name for entry in folder.iterdir()) == [name_of(8), name_of(12)]
