"""Folder of base models that pods share, on a volume of their node or of all nodes.

    tunesmith-models/
        <key>/              one version of a model: the key is a digest of its uri and of its files' versions
            files.json      written last: uri, and hashes of all files. Without it the model is incomplete
            files/ parts/   complete and incomplete files
            size            size of the complete model, in bytes
            fill            locked by the process that downloads
            use             locked by the processes that use the model, shared; its time is that of the last start
        access/<digest>     key of the version that a uri had at the last start with the same credentials

Locks are those of the kernel (flock), so a killed process holds none. They save downloads; they are not needed for
correctness, since two processes that download one version write the same bytes. Everything else on the volume may have
been written by another pod: nothing is followed, and nothing is trusted until its hash is checked.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from tunesmith.contracts.sentence import one_line
from tunesmith_server.base_download import FileRecord
from tunesmith_server.safe_folder import SafeFolder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from tunesmith_server.base_source import BaseFile

FOLDER = "tunesmith-models"
FILES, PARTS = "files", "parts"
USE = "use"
STALL_SECONDS = 120.0
"""Time without progress after which a pod no longer waits for another one's download."""
KEPT_SECONDS = 3600.0
"""Time after the last start of a pod with a model in which the model is not removed."""
_MANIFEST, _SIZE, _FILL, _ACCESS = "files.json", "size", "fill", "access"
_POLL_SECONDS = 0.5
_LOCK_SECONDS = 60.0
"""Time after which a process continues without a lock that other processes hold only briefly."""
_MAX_SIZE = 2**60
_NAMED = 4
"""Highest number of other models in a message."""
_KEY = re.compile(r"[0-9a-f]{32}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHARED_LOCKS = frozenset({"btrfs", "ceph", "ext2", "ext3", "ext4", "lustre", "nfs4", "overlay", "tmpfs", "xfs", "zfs"})
"""File systems on which every pod that has the volume sees the locks of the others."""

log = logging.getLogger(__name__)


class CacheFullError(Exception):
    """The model does not fit; the message has the sizes and the fix."""


@dataclass(frozen=True)
class Manifest:
    """Complete model.

    Attributes:
        uri: its uri.
        files: its files by name.
    """

    uri: str
    files: dict[str, FileRecord]


@dataclass(frozen=True)
class _Use:
    """Bytes that a version uses: `size` when it is complete, and `on_disk` now."""

    uri: str
    size: int
    on_disk: int


@dataclass(frozen=True)
class Limits:
    """Limits of the folder.

    Attributes:
        size: highest number of bytes of all models; None: the volume's size.
        remedy: end of the sentence about a full folder, such as "make the claim larger".
    """

    size: int | None
    remedy: str


def version_key(uri: str, files: Sequence[BaseFile]) -> str:
    """Return the key of a version of a model."""
    listed = sorted((file.name, file.size, file.version) for file in files)
    return hashlib.sha256(json.dumps([uri, listed]).encode()).hexdigest()[:32]


def access_key(uri: str, revision: str | None, credentials: Mapping[str, str]) -> str:
    """Return a digest of a uri and the credentials that could read it, by which they are recognised in an outage.

    It is readable on the volume, so it is expensive to find credentials that match it.
    """
    document = json.dumps([uri, revision, sorted(credentials.items())]).encode()
    return hashlib.scrypt(document, salt=b"tunesmith-models", n=2**14, r=8, p=1, dklen=16).hex()


class ModelCache:
    """Models in a folder.

    Args:
        root: the folder, such as the root of a volume.
        limits: limits of all models.
        clock: returns the seconds since 1970.
    """

    def __init__(self, root: Path, limits: Limits, clock: Callable[[], float] = time.time) -> None:
        self._limits, self._clock = limits, clock
        with SafeFolder.open(root) as volume:
            self._folder = volume.folder(FOLDER, create=True)
        self._access = self._folder.folder(_ACCESS, create=True)

    def remember(self, access: str, key: str) -> None:
        """Record the version that a uri has for these credentials."""
        self._access.write(access, key.encode())

    def recall(self, access: str) -> str | None:
        """Return the complete version that a uri had at the last start with these credentials, or None."""
        with suppress(OSError, ValueError):
            key = self._access.read(access).decode()
            if _KEY.fullmatch(key):
                with self._folder.folder(key) as folder:
                    return key if folder.status(_MANIFEST) else None
        return None

    @contextmanager
    def use(self, key: str) -> Iterator[CachedModel]:
        """Open a version for a block, in which it is not removed."""
        while True:
            folder = self._folder.folder(key, create=True)
            with folder, folder.file(USE, os.O_RDONLY | os.O_CREAT) as lock:
                _lock(lock, fcntl.LOCK_SH)
                if not folder.is_current(USE, lock):
                    continue  # the folder was removed after it was opened
                with folder.file(USE, os.O_WRONLY) as used:
                    os.utime(used)
                with folder.folder(FILES, create=True) as files, folder.folder(PARTS, create=True) as parts:
                    yield CachedModel(folder, files, parts)
                return

    def make_room(self, key: str, size: int) -> None:
        """Remove models that no pod uses, the least recently used first, until a model of `size` bytes fits.

        Raises:
            CacheFullError: it does not fit.
        """
        with self._folder.file(_FILL, os.O_RDONLY | os.O_CREAT) as lock:
            _lock(lock, fcntl.LOCK_EX)
            problem = self._shortage(key, size)
            for candidate in self._candidates(key) if problem else ():
                if self._remove(candidate):
                    problem = self._shortage(key, size)
                    if not problem:
                        break
            if problem:
                raise CacheFullError(f"{problem}: {self._limits.remedy}")
            with self._folder.folder(key) as folder:
                folder.write(_SIZE, str(size).encode())

    def _shortage(self, key: str, size: int) -> str:
        """Return why a model does not fit; an empty text if it does."""
        others = sorted((self._used(name) for name in self._keys() if name != key), key=lambda use: -use.size)
        named = ", ".join(f"{use.uri} ({use.size})" for use in others[:_NAMED] if use.size)
        more = f"; other models use {sum(use.size for use in others)} bytes: {named}" if named else ""
        if self._limits.size is not None and sum(use.size for use in others) + size > self._limits.size:
            return f"it has {size} bytes, and the limit is {self._limits.size} bytes{more}"
        promised = sum(max(0, use.size - use.on_disk) for use in others)
        present = self._used(key).on_disk
        volume = os.statvfs(self._folder.path)
        free = max(0, volume.f_bavail * volume.f_frsize - promised)
        if size - present > free:
            return f"it has {size} bytes, and its volume has {free + present} bytes for it{more}"
        return ""

    def _used(self, key: str) -> _Use:
        try:
            with self._folder.folder(key) as folder:
                sizes, manifest = folder.sizes(), read_manifest(folder)
                if manifest is not None:
                    return _Use(manifest.uri, sizes.on_disk, sizes.on_disk)
                announced = min(int(folder.read(_SIZE)), _MAX_SIZE)
                return _Use("an incomplete model", max(announced, sizes.on_disk), sizes.on_disk)
        except (OSError, ValueError):
            return _Use("", 0, 0)

    def _keys(self) -> list[str]:
        return [name for name in self._folder.names() if _KEY.fullmatch(name)]

    def _candidates(self, key: str) -> list[str]:
        """Return the versions that were not used recently, the least recently used first."""
        kind = file_system(self._folder.path)
        if kind not in _SHARED_LOCKS:
            log.info("no model is removed, because locks on %s may not be seen by all pods", kind)
            return []
        found = []
        for name in self._keys():
            with suppress(OSError), self._folder.folder(name) as folder:
                used = folder.status(USE)
                modified = used.modified if used else 0.0
                if name != key and self._clock() - modified > KEPT_SECONDS:
                    found.append((modified, name))
        return [name for _, name in sorted(found)]

    def _remove(self, key: str) -> bool:
        try:
            with self._folder.folder(key) as folder, folder.file(USE, os.O_RDONLY | os.O_CREAT) as lock:
                if not _try_lock(lock, fcntl.LOCK_EX, without=False):
                    return False
                manifest = read_manifest(folder)
                named = f"{key} ({manifest.uri})" if manifest else f"{key} (incomplete)"
                log.info("base model: %s is removed from the cache, because no pod uses it", named)
                folder.remove(_MANIFEST)
                self._folder.remove(key)
        except OSError as error:
            log.warning("%s cannot be removed from the cache: %s", key, error)
            return False
        for name in self._access.names():
            with suppress(OSError, ValueError):
                if self._access.read(name).decode() == key:
                    self._access.remove(name)
        return True


class CachedModel:
    """A version of a model in the folder, opened by `ModelCache.use`.

    Attributes:
        files: folder of complete files.
        parts: folder of incomplete files.
    """

    def __init__(self, folder: SafeFolder, files: SafeFolder, parts: SafeFolder) -> None:
        self._folder, self.files, self.parts = folder, files, parts

    @property
    def lock_path(self) -> Path:
        """Path of the file that users of the model lock."""
        return self._folder.path / USE

    def manifest(self) -> Manifest | None:
        """Return the files and their hashes; None if the model is incomplete."""
        return read_manifest(self._folder)

    def complete(self, manifest: Manifest) -> None:
        """Record that the model is complete."""
        files = {name: asdict(file) for name, file in manifest.files.items()}
        self._folder.write(_MANIFEST, json.dumps({"uri": manifest.uri, "files": files}).encode())

    def discard(self, names: Sequence[str]) -> None:
        """Remove files that do not have their hashes. The model is incomplete from then on."""
        self._folder.remove(_MANIFEST)
        for name in names:
            self.files.remove(name)

    @contextmanager
    def filling(self, is_complete: Callable[[], bool], clock: Callable[[], float] = time.monotonic) -> Iterator[bool]:
        """Wait until no other process downloads the model; False if it is complete by then.

        A process that makes no progress for STALL_SECONDS is not waited for.
        """
        with self._folder.file(_FILL, os.O_RDONLY | os.O_CREAT) as lock:
            moved, size = clock(), -1
            while not _try_lock(lock, fcntl.LOCK_EX):
                now, found = clock(), self._folder.sizes().on_disk
                if found != size:
                    log.info("base model: another pod downloads it, %.1f MiB so far", found / 2**20)
                    moved, size = now, found
                elif now - moved > STALL_SECONDS:
                    log.warning("base model: another pod's download makes no progress for %g s", STALL_SECONDS)
                    break
                time.sleep(_POLL_SECONDS)
            yield not is_complete()


def lock_in_use(link: Path) -> None:
    """Keep the model that a pod uses in the cache until this process exits.

    Args:
        link: link to the file that users of the model lock; it does not exist if the model is not in a cache.
    """
    try:
        descriptor = os.open(link, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("the base model may be removed from the cache, because %s cannot be opened: %s", link, error)
        return
    _lock(descriptor, fcntl.LOCK_SH)


def file_system(path: Path) -> str:
    """Return the type of the file system at a path, such as ext4; empty if it is unknown."""
    resolved = os.path.realpath(path)
    found = ("", "")
    with suppress(OSError), open("/proc/self/mountinfo") as table:  # noqa: PTH123 - a file of the kernel
        for line in table:
            place, _, kind = line.partition(" - ")
            point = place.split(" ")[4].encode().decode("unicode_escape")
            if (resolved == point or resolved.startswith(point.rstrip("/") + "/")) and len(point) >= len(found[0]):
                found = (point, kind.split(" ")[0])
    return found[1]


def read_manifest(folder: SafeFolder) -> Manifest | None:
    """Return the files of a complete model; None if it is incomplete or its manifest is not valid."""
    try:
        document = json.loads(folder.read(_MANIFEST))
        files = {name: FileRecord(int(file["size"]), str(file["sha256"])) for name, file in document["files"].items()}
        uri = one_line(str(document["uri"]), 200)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        log.warning("%s cannot be read and is replaced: %s", folder.path / _MANIFEST, error)
        return None
    are_valid = all("/" not in name and _SHA256.fullmatch(file.sha256) for name, file in files.items())
    return Manifest(uri, files) if are_valid else None


def _lock(descriptor: int, kind: int) -> None:
    deadline = time.monotonic() + _LOCK_SECONDS
    while not _try_lock(descriptor, kind):
        if time.monotonic() > deadline:
            log.warning("another process holds a lock of the models' folder for %g s", _LOCK_SECONDS)
            return
        time.sleep(_POLL_SECONDS / 10)


def _try_lock(descriptor: int, kind: int, *, without: bool = True) -> bool:
    """Return True if the lock was taken. `without`: result on a volume without locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.warning("locks are not available on this volume (%s): pods may download a model twice", error.strerror)
        return without
    return True
