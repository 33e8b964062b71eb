"""Find the files of a data set's sources and copy them to this machine."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunesmith_trainer.data.formats import EXTENSIONS, DataFile, format_of
from tunesmith_trainer.errors import DatasetInvalidError, DatasetNotFoundError
from tunesmith_trainer.store import file_sha256

if TYPE_CHECKING:
    import hashlib
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from tunesmith.api.dataset import DatasetSource
    from tunesmith.storage.folder import Folder
    from tunesmith_trainer.store import Stores

MAX_FILES = 10_000
"""Maximum number of files of a source. Each is opened, hashed and copied."""
_GLOB = re.compile(r"[*?\[]")
_METADATA = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
"""Files that the `datasets` library writes beside the rows."""


@dataclass(frozen=True)
class Source:
    """Files of a source, in the order in which they are read."""

    uri: str
    files: list[DataFile]


def fetch(sources: Sequence[DatasetSource], stores: Stores, folder: Path) -> list[Source]:
    """Download the files of sources into `folder`; files on this machine's disk are read in place.

    Raises:
        DatasetNotFoundError: a file does not exist, or a folder or a glob has no data files.
        DatasetInvalidError: a folder has files of several formats, or a file's name does not indicate a format.
    """
    return [_fetch(source, stores, folder / str(number)) for number, source in enumerate(sources)]


def add_content(sources: Iterable[Source], digest: hashlib._Hash) -> None:
    """Add the content of all files, without their names, to a digest."""
    for source in sources:
        for file in source.files:
            digest.update(f"{file_sha256(file.path)}\n".encode())


def _fetch(source: DatasetSource, stores: Stores, target: Path) -> Source:
    base, paths = _listed(source, stores)
    files = []
    for path in paths:
        *parents, name = path.split("/")
        folder = base
        for parent in parents:
            folder = folder.child(parent)
        if folder.local is not None:
            files.append(DataFile(path, folder.local / name))
            continue
        copy = target.joinpath(*parents, name)
        copy.parent.mkdir(parents=True, exist_ok=True)
        folder.download(name, copy)
        files.append(DataFile(path, copy))
    return Source(source.uri, files)


def _listed(source: DatasetSource, stores: Stores) -> tuple[Folder, list[str]]:
    """Return a folder and the paths of the source's files in it."""
    uri = source.uri.rstrip("/")
    secret = source.secret_ref.name if source.secret_ref else None
    glob = _GLOB.search(uri)
    if glob is not None:
        begin = uri.rindex("/", 0, glob.start())
        folder = stores.folder(uri[:begin], what="the data set", missing=DatasetNotFoundError, secret=secret)
        return folder, _data_files(folder.below(uri[begin + 1 :]), source.uri)
    parent, name = stores.file(uri, what="the data set", missing=DatasetNotFoundError, secret=secret)
    if not parent.is_folder(name):
        if format_of(name) is None:
            raise DatasetInvalidError(
                f"the name of {source.uri} does not indicate its format: use one of the extensions"
                f" {', '.join(EXTENSIONS)}"
            )
        return parent, [name]
    folder = parent.child(name)
    return folder, _data_files(folder.below(), source.uri)


def _data_files(paths: list[str], uri: str) -> list[str]:
    """Return the paths that are data files."""
    found = [
        path
        for path in paths
        if format_of(path) is not None
        and path.rpartition("/")[2] not in _METADATA
        and not any(part.startswith((".", "_")) for part in path.split("/"))
    ]
    if not found:
        raise DatasetNotFoundError(
            f"the data set {uri} has no data files, whose names end with {', '.join(EXTENSIONS)}"
            + (f"; it has {', '.join(paths[:5])}" if paths else "")
        )
    if len(found) > MAX_FILES:
        raise DatasetInvalidError(
            f"the data set {uri} has {len(found)} data files, more than {MAX_FILES}: put the rows into fewer files, or"
            " choose some of them with a glob"
        )
    formats = {str(format_of(path)) for path in found}
    if len(formats) > 1:
        raise DatasetInvalidError(
            f"the data set {uri} has files of several formats ({', '.join(sorted(formats))}), which may contain the"
            f" same rows: choose one format with a glob, such as {uri.rstrip('/')}/**/*.{min(formats)}"
        )
    return found
