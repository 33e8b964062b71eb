"""Checkpoints in a real S3 server with outages: nothing that was saved is lost or incomplete."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from tests.trainer.checkpoint_damage import flip, lose_a_file, lose_the_manifest, truncate
from tests.trainer.s3server import S3Server
from tunesmith.storage.folder import Retry
from tunesmith_trainer.errors import StorageUnavailableError
from tunesmith_trainer.store import Stores
from tunesmith_trainer.training.checkpoint import Checkpoints, name_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BINDING = "sha256:of-this-run"
PLACE = "store/default/doors-1/tmp/checkpoints"
SECONDS = 60.0


@dataclass
class Store:
    """The checkpoints of a job on a server that can be stopped and started again."""

    folder: Path
    server: S3Server
    reports: list[str] = field(default_factory=list)

    @property
    def stored(self) -> Path:
        return self.server.folder / self.server.bucket / PLACE

    def checkpoints(self, scratch: str = "scratch", *, keep: int = 2) -> Checkpoints:
        """Open the checkpoints as a new attempt does; attempts share no disk."""
        stores = Stores(
            secrets=self.folder,
            allow_file=False,
            environ=self.server.environment(),
            retry=Retry(attempts=3, first=0.1),
        )
        place = stores.folder(f"s3://tunesmith/{PLACE}", what="the checkpoints", missing=StorageUnavailableError)
        return Checkpoints(
            place,
            self.folder / scratch,
            binding=BINDING,
            keep=keep,
            write_line=self.reports.append,
            retry=Retry(attempts=1_000_000, first=0.1, longest=0.5),
        )

    def steps(self) -> list[str]:
        return sorted(entry.name for entry in self.stored.iterdir())

    def until_said(self, words: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not any(words in line for line in self.reports):
            assert time.monotonic() < deadline, f"not reports: {words}; but {self.reports}"
            time.sleep(0.05)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with S3Server(tmp_path / "s3") as server:
        yield Store(tmp_path, server)


def filled(step: int) -> Callable[[Path], None]:
    """Return a function that writes files whose content depends on the step."""

    def fill(folder: Path) -> None:
        (folder / "weights").write_bytes(bytes([step]) * 1_000_000)
        (folder / "state").write_bytes(bytes([step]) * 10)

    return fill


def saved(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        assert checkpoints.save(step, filled(step))
        assert checkpoints.flush(SECONDS)


def assert_newest(store: Store, step: int) -> None:
    """Assert that an attempt on another machine resumes from this step."""
    found = store.checkpoints("another-machine").newest()
    assert found is not None
    assert found.step == step
    assert (found.path / "weights").read_bytes() == bytes([step]) * 1_000_000


def test_an_outage_is_retried_until_the_checkpoint_is_in_the_store(store: Store) -> None:
    kept = store.checkpoints()
    saved(kept, 4)
    store.server.stop()
    assert kept.save(8, filled(8)), "training does not wait for the store"
    store.until_said("the checkpoint of step 8 cannot be uploaded")
    assert not kept.flush(0.1)
    assert kept.last == 4
    store.server.start()
    assert kept.flush(SECONDS)
    assert kept.last == 8
    assert [line.strip() for line in store.reports[1:]] == ["the checkpoint of step 8 is now in the store"]
    assert_newest(store, 8)


def test_during_an_outage_a_newer_checkpoint_replaces_a_waiting_one(store: Store) -> None:
    kept = store.checkpoints()
    saved(kept, 4)
    store.server.stop()
    for step in (8, 12, 16):
        assert kept.save(step, filled(step))
    store.until_said("cannot be uploaded")
    store.server.start()
    assert kept.flush(SECONDS)
    assert kept.last == 16
    assert_newest(store, 16)
    assert store.steps() == [name_of(4), name_of(16)]


def test_remains_of_a_killed_upload_are_neither_used_nor_counted(store: Store) -> None:
    saved(store.checkpoints(), 4)
    half = store.server.filesystem()
    half.pipe_file(f"tunesmith/{PLACE}/{name_of(8)}/weights", b"8")
    assert_newest(store, 4)
    assert "the checkpoint of step 8 is damaged and will not be used: checkpoint.json is missing" in store.reports[-1]
    half.pipe_file(f"tunesmith/{PLACE}/{name_of(8)}/weights", b"8")
    saved(store.checkpoints(), 12)
    assert store.steps() == [name_of(4), name_of(12)]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip, "the content of weights changed"),
        (truncate, "weights has 999 bytes instead of 1000000"),
        (lose_a_file, "state is missing"),
        (lose_the_manifest, "checkpoint.json is missing"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_in_the_store_is_detected_and_the_previous_checkpoint_is_used(
    store: Store, damage: Callable[[Path], None], words: str
) -> None:
    saved(store.checkpoints(), 4, 8)
    damage(store.stored / name_of(8))
    assert_newest(store, 4)
    assert f"the checkpoint of step 8 is damaged and will not be used: {words}" in store.reports[-1]
    assert store.steps() == [name_of(4)]


def test_only_the_newest_are_kept_in_the_store(store: Store) -> None:
    kept = store.checkpoints(keep=2)
    saved(kept, 4, 8, 12)
    assert store.steps() == [name_of(8), name_of(12)]


def test_none_remain_if_they_are_removed_during_an_upload(store: Store) -> None:
    kept = store.checkpoints()
    saved(kept, 4)
    assert kept.save(8, filled(8))
    kept.clear()
    assert kept.flush(SECONDS)
    assert not store.stored.exists()


def test_checkpoints_that_cannot_be_removed_are_reported_without_a_failure(store: Store) -> None:
    kept = store.checkpoints()
    saved(kept, 4)
    store.server.stop()
    kept.clear()
    assert f"the checkpoints in s3://tunesmith/{PLACE} could not be removed" in store.reports[-1]
