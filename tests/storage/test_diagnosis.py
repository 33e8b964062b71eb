"""Errors of the disks that folders are on."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from tunesmith.storage.credentials import Credentials, Origin
from tunesmith.storage.errors import AccessDeniedError, FullError, StorageError, UnavailableError
from tunesmith.storage.folder import Access, Retry, open_folder

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("number", "kind", "text", "tries"),
    [
        (errno.ENOSPC, FullError, "has no room: free some, or use a larger one", 3),
        (errno.EDQUOT, FullError, "has no room", 3),
        (errno.EROFS, AccessDeniedError, "is read-only: use one that can be written", 1),
        (errno.EIO, UnavailableError, "could not be reached", 3),
    ],
)
def test_a_disk_that_cannot_be_written(
    tmp_path: Path, number: int, kind: type[StorageError], text: str, tries: int
) -> None:
    folder = open_folder(
        f"file://{tmp_path}",
        Credentials({}, "none", Origin.ENVIRONMENT),
        Access(Retry(attempts=3, first=0.0, longest=0.0)),
        allow_file=True,
    )
    done: list[int] = []

    def write() -> None:
        done.append(1)
        raise OSError(number, "the system's message", "model.safetensors")

    with pytest.raises(kind, match=text):
        folder._attempt(write, "model.safetensors")
    assert len(done) == tries
