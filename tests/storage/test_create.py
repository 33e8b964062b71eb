"""Creation of a file once, by writers that start at the same time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TYPE_CHECKING

from tunesmith.storage.credentials import Credentials, Origin
from tunesmith.storage.folder import ONE_TRY, Access, open_folder

if TYPE_CHECKING:
    from pathlib import Path

WRITERS = 6
SIZE = 200_000


def test_one_of_several_writers_of_a_local_file_succeeds_with_its_whole_content(tmp_path: Path) -> None:
    start = Barrier(WRITERS)
    nobody = Credentials({}, "none", Origin.ENVIRONMENT)
    folder = open_folder(f"file://{tmp_path}", nobody, Access(ONE_TRY), allow_file=True)

    def create(name: str, writer: int) -> bool:
        start.wait()
        return folder.create(name, str(writer).encode() * SIZE)

    with ThreadPoolExecutor(WRITERS) as pool:
        for attempt in range(20):
            name = f"file{attempt}"
            created = list(pool.map(create, [name] * WRITERS, range(WRITERS)))
            assert created.count(True) == 1
            assert (tmp_path / name).read_bytes() == str(created.index(True)).encode() * SIZE
    assert len(list(tmp_path.iterdir())) == 20
