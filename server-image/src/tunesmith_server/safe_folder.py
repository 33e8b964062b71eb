"""Folder on a volume that other pods can write: no link in it is followed, and only regular files are opened."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

MAX_ENTRIES = 10_000
_MAX_DEPTH = 8
_MAX_DOCUMENT = 4 * 2**20
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class UnsafeFileError(OSError):
    """A name in the folder is a link, a device or a folder, or a file is larger than it may be."""


@dataclass(frozen=True)
class FileStatus:
    """Size in bytes, bytes on the disk, and time of the last change in seconds since 1970, of a file."""

    size: int
    on_disk: int
    modified: float


class SafeFolder:
    """Folder that is reached through its descriptor only; a context manager.

    Args:
        descriptor: open descriptor of the folder, which the object closes.
        path: path of the folder, for messages and for links to its files.
    """

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor = descriptor
        self.path = path

    @classmethod
    def open(cls, path: Path) -> SafeFolder:
        """Open a folder that exists, such as the root of a volume."""
        return cls(os.open(path, _FOLDER), path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def folder(self, name: str, *, create: bool = False) -> SafeFolder:
        """Open a folder in this one.

        Raises:
            FileNotFoundError: it does not exist.
            UnsafeFileError: it is not a folder.
        """
        _check(name)
        if create:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o775, dir_fd=self._descriptor)
        try:
            return SafeFolder(os.open(name, _FOLDER, dir_fd=self._descriptor), self.path / name)
        except OSError as error:
            raise self._unsafe(name, error, "a folder") from None

    def names(self) -> list[str]:
        """Return the sorted names of the entries.

        Raises:
            UnsafeFileError: there are more than MAX_ENTRIES.
        """
        found = []
        with os.scandir(self._descriptor) as entries:
            for entry in entries:
                found.append(entry.name)
                if len(found) > MAX_ENTRIES:
                    raise UnsafeFileError(errno.E2BIG, f"more than {MAX_ENTRIES} entries", str(self.path))
        return sorted(found)

    def status(self, name: str) -> FileStatus | None:
        """Return the status of a regular file; None if it is missing."""
        _check(name)
        try:
            found = os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return _status(found) if stat.S_ISREG(found.st_mode) else None

    def opened(self, name: str, flags: int = os.O_RDONLY) -> int:
        """Return the descriptor of a regular file, which the caller closes.

        Raises:
            FileNotFoundError: it does not exist, and `flags` does not create it.
            UnsafeFileError: it is not a regular file.
        """
        _check(name)
        try:
            descriptor = os.open(name, flags | _FILE, 0o664, dir_fd=self._descriptor)
        except OSError as error:
            raise self._unsafe(name, error, "a regular file") from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise UnsafeFileError(errno.ELOOP, "is not a regular file", str(self.path / name))
        return descriptor

    @contextlib.contextmanager
    def file(self, name: str, flags: int = os.O_RDONLY) -> Iterator[int]:
        """Open a regular file for a block; see `opened`."""
        descriptor = self.opened(name, flags)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def is_current(self, name: str, descriptor: int) -> bool:
        """Return True if the name still refers to the opened file."""
        try:
            found = os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(found, os.fstat(descriptor))

    def read(self, name: str, limit: int = _MAX_DOCUMENT) -> bytes:
        """Return the content of a small file.

        Raises:
            UnsafeFileError: it is not a regular file, or is larger than `limit` bytes.
            FileNotFoundError: it does not exist.
        """
        with self.file(name) as descriptor:
            content = os.pread(descriptor, limit + 1, 0)
        if len(content) > limit:
            raise UnsafeFileError(errno.EFBIG, f"is larger than {limit} bytes", str(self.path / name))
        return content

    def write(self, name: str, content: bytes) -> None:
        """Replace a small file; after a power failure it has its old or its new content."""
        temporary = f".{name}.{secrets.token_hex(8)}"
        with self.file(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
            view = memoryview(content)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        self.move(temporary, self, name)

    def move(self, name: str, target: SafeFolder, new_name: str) -> None:
        """Rename a file into another folder of the volume, in place of what has its new name."""
        _check(name)
        _check(new_name)
        try:
            os.replace(name, new_name, src_dir_fd=self._descriptor, dst_dir_fd=target._descriptor)
        except IsADirectoryError:
            target.remove(new_name)
            os.replace(name, new_name, src_dir_fd=self._descriptor, dst_dir_fd=target._descriptor)

    def remove(self, name: str, depth: int = 0) -> None:
        """Remove a file, link or folder with everything in it, if it exists; links are not followed.

        Raises:
            UnsafeFileError: folders are nested too deep.
        """
        _check(name)
        try:
            os.unlink(name, dir_fd=self._descriptor)
        except FileNotFoundError:
            return
        except (IsADirectoryError, PermissionError):
            self._check_depth(depth)
            with self.folder(name) as inner:
                for entry in inner.names():
                    inner.remove(entry, depth + 1)
            os.rmdir(name, dir_fd=self._descriptor)

    def sizes(self, depth: int = 0) -> FileStatus:
        """Return the sums of the sizes of all files in and below the folder, and the newest change.

        Raises:
            UnsafeFileError: folders are nested too deep.
        """
        self._check_depth(depth)
        total = FileStatus(0, 0, 0.0)
        for name in self.names():
            found = os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
            if stat.S_ISDIR(found.st_mode):
                with self.folder(name) as inner:
                    part = inner.sizes(depth + 1)
            else:
                part = _status(found)
            total = FileStatus(total.size + part.size, total.on_disk + part.on_disk, max(total.modified, part.modified))
        return total

    def _check_depth(self, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise UnsafeFileError(errno.ELOOP, f"is nested more than {_MAX_DEPTH} folders deep", str(self.path))

    def _unsafe(self, name: str, error: OSError, expected: str) -> OSError:
        if error.errno in {errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO, errno.EMLINK}:
            return UnsafeFileError(error.errno, f"is not {expected}", str(self.path / name))
        return error


def _status(found: os.stat_result) -> FileStatus:
    return FileStatus(found.st_size, found.st_blocks * 512, found.st_mtime)


def _check(name: str) -> None:
    if "/" in name or "\0" in name or name in {"", ".", ".."}:
        raise ValueError(f"{name!r} is not the name of a file in a folder")
