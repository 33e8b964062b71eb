"""Find the files of a data set's sources and copy them to this machine."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from tunesmith_trainer.data.formats import EXTENSIONS, DataFile, format_of
from tunesmith_trainer.errors import DatasetInvalidError, DatasetNotFoundError
from tunesmith_trainer.store import file_sha256

if TYPE_CHECKING:
    import hashlib
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from pathlib import Path

    from tunesmith.api.dataset import DatasetSource
    from tunesmith.storage.folder import Folder
    from tunesmith_trainer.store import Stores


class Part(StrEnum):
    """Part of a data set that a source belongs to."""

    TRAIN = "train"
    VALIDATION = "validation"


MAX_FILES = 10_000
"""Maximum number of files of a source. Each is opened, hashed and copied."""
_GLOB = re.compile(r"[*?\[]")
_METADATA = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
"""Files that the `datasets` library writes beside the rows."""


_DICTIONARY = "dataset_dict.json"
"""File that `datasets` writes beside the folders of a data set's splits."""
_TRAIN = frozenset({"train", "training"})
_VALIDATION = frozenset({"validation", "valid", "val", "dev"})
_TEST = frozenset({"test", "testing", "eval", "evaluation"})
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")
"""Name of a file of the Hub: its split, and the number of the file."""


@dataclass(frozen=True)
class Source:
    """Files of a source, in the order in which they are read.

    Args:
        uri: uri of the source.
        files: files that are read.
        split: split that is read; None if the files have no splits.
        skipped: number of files by split that is not read.
    """

    uri: str
    files: list[DataFile]
    split: str | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)


def fetch(sources: Sequence[DatasetSource], stores: Stores, folder: Path, part: Part = Part.TRAIN) -> list[Source]:
    """Download the files of sources into `folder`; files on this machine's disk are read in place.

    Args:
        sources: locations of the files.
        stores: opens the locations.
        folder: local folder.
        part: part of the data set, which determines the split that is read if a source does not name one.

    Raises:
        DatasetNotFoundError: a file does not exist, or a folder or a glob has no data files.
        DatasetInvalidError: a folder has files of several formats, or a file's name does not indicate a format, or the
            split to read is unclear.
    """
    return [_fetch(source, stores, folder / str(number), part) for number, source in enumerate(sources)]


def add_content(sources: Iterable[Source], digest: hashlib._Hash) -> None:
    """Add the content of all files, without their names, to a digest."""
    for source in sources:
        for file in source.files:
            digest.update(f"{file_sha256(file.path)}\n".encode())


def _fetch(source: DatasetSource, stores: Stores, target: Path, part: Part) -> Source:
    base, found = _listed(source, stores, part)
    files = []
    for path in found.paths:
        *parents, name = path.split("/")
        folder = base
        for parent in parents:
            folder = folder.child(parent)
        shown = _shown(path)
        if folder.local is not None:
            files.append(DataFile(shown, folder.local / name))
            continue
        copy = target.joinpath(*parents, name)
        copy.parent.mkdir(parents=True, exist_ok=True)
        folder.download(name, copy)
        files.append(DataFile(shown, copy))
    skipped = {_shown(split): count for split, count in found.skipped.items()}
    return Source(source.uri, files, found.split and _shown(found.split), skipped)


def _listed(source: DatasetSource, stores: Stores, part: Part) -> tuple[Folder, _Found]:
    """Return a folder and the source's files in it."""
    uri = source.uri.rstrip("/")
    secret = source.secret_ref.name if source.secret_ref else None
    glob = _GLOB.search(uri)
    if glob is not None:
        begin = uri.rindex("/", 0, glob.start())
        folder = stores.folder(uri[:begin], what="the data set", missing=DatasetNotFoundError, secret=secret)
        return folder, _data_files(folder.below(uri[begin + 1 :]), source, part)
    parent, name = stores.file(uri, what="the data set", missing=DatasetNotFoundError, secret=secret)
    if not parent.is_folder(name):
        if format_of(name) is None:
            raise DatasetInvalidError(
                f"the name of {source.uri} does not indicate its format: use one of the extensions"
                f" {', '.join(EXTENSIONS)}"
            )
        if source.split is not None:
            raise DatasetInvalidError(f"{source.uri} is one file, so it has no split {source.split}: remove split")
        return parent, _Found([name])
    folder = parent.child(name)
    return folder, _data_files(folder.below(), source, part)


@dataclass(frozen=True)
class _Found:
    """Paths of the files to read; the other fields are those of `Source`."""

    paths: list[str]
    split: str | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)


def _data_files(paths: list[str], source: DatasetSource, part: Part) -> _Found:
    """Return the data files of the split to read."""
    uri = source.uri
    data = [
        path
        for path in paths
        if format_of(path) is not None
        and _name(path) not in _METADATA
        and not any(part.startswith((".", "_")) for part in path.split("/"))
    ]
    if not data:
        raise DatasetNotFoundError(
            f"the data set {uri} has no data files, whose names end with {', '.join(EXTENSIONS)}"
            + (f"; it has {', '.join(paths[:5])}" if paths else "")
        )
    found = _chosen_split(data, {path.rpartition("/")[0] for path in paths if _name(path) == _DICTIONARY}, source, part)
    if len(found.paths) > MAX_FILES:
        raise DatasetInvalidError(
            f"the data set {uri} has {len(found.paths)} data files, more than {MAX_FILES}: put the rows into fewer"
            " files, or choose some of them with a glob"
        )
    formats = {str(format_of(path)) for path in found.paths}
    if len(formats) > 1:
        raise DatasetInvalidError(
            f"the data set {uri} has files of several formats ({', '.join(sorted(formats))}), which may contain the"
            f" same rows: choose one format with a glob, such as {uri.rstrip('/')}/**/*.{min(formats)}"
        )
    return found


def _chosen_split(paths: list[str], dictionaries: Collection[str], source: DatasetSource, part: Part) -> _Found:
    """Return the files of the split to read; all files if their names do not distinguish splits.

    Files for training whose names indicate no split are read too, unless the source names a split.

    Args:
        paths: paths of the data files.
        dictionaries: folders with the file `dataset_dict.json`.
        source: names the split to read, or none.
        part: part of the data set, which determines the split if the source names none.
    """
    splits = {path: _split(path, dictionaries) for path in paths}
    names = sorted({name for name in splits.values() if name is not None})
    unnamed = part is Part.TRAIN and source.split is None and None in splits.values()
    chosen = _default_splits(names, part) if source.split is None else [name for name in names if name == source.split]
    if source.split is not None and not chosen:
        has = f"it has {', '.join(names)}" if names else "the names of its files do not distinguish splits"
        raise DatasetInvalidError(f"the data set {source.uri} has no split {source.split}: {has}")
    if not chosen and dictionaries and len(names) > 1:
        raise DatasetInvalidError(
            f"the data set {source.uri} has the splits {', '.join(names)}: choose one of them with split"
        )
    held_back = {name for name in names if name.lower() in _VALIDATION | _TEST}
    if not chosen and not (unnamed and held_back):
        return _Found(paths)
    read, skipped = [], Counter[str]()
    for path, name in splits.items():
        if name in chosen or (unnamed and name is None) or (not chosen and name not in held_back):
            read.append(path)
        else:
            skipped[name or _name(path)] += 1
    return _Found(read, ", ".join(chosen) or None, skipped)


def _default_splits(names: list[str], part: Part) -> list[str]:
    """Return the splits to read of a source that names none: several if they are all for that part."""
    wanted = [_TRAIN] if part is Part.TRAIN else [_VALIDATION, _TEST]
    for keywords in wanted:
        chosen = [name for name in names if _words(name) & keywords]
        if chosen:
            return chosen
    return []


def _split(path: str, dictionaries: Collection[str]) -> str | None:
    """Return the split that a path indicates; None if it indicates none."""
    for folder in dictionaries:
        below = path.removeprefix(f"{folder}/" if folder else "")
        if "/" in below and (not folder or below != path):
            return below.partition("/")[0]
    *folders, name = path.split("/")
    stem = name.partition(".")[0]
    shard = _SHARD.fullmatch(stem)
    if shard is not None:
        return shard[1]
    known, parts = _TRAIN | _VALIDATION | _TEST, [stem, *reversed(folders)]
    exact = next((part for part in parts if part.lower() in known), None)
    return exact or next((part for part in parts if _words(part) & known), None)


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", name.lower()))


def _shown(name: str) -> str:
    """Return the name of a file, or of a part of it, as text: it may have bytes that are not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _name(path: str) -> str:
    return path.rpartition("/")[2]
