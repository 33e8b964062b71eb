"""Download of a base model's files by parallel ranges, which continues in the middle of a file after a kill.

A file's bytes are written to `<name>` in a folder of incomplete files, and `<name>.chunks` beside it records the CRC-32
of every complete chunk. A chunk counts only if its bytes on the disk have the recorded CRC, so the order of the two
writes does not matter. Two processes that fill the same folder write the same bytes.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from tunesmith.storage.checksums import Checksum
from tunesmith.storage.folder import CHUNK_BYTES
from tunesmith_server.store import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from tunesmith_server.base_source import BaseFile, BaseSource
    from tunesmith_server.safe_folder import SafeFolder

PARALLEL_READS = 16
"""Number of ranges that are read at once. A connection to an object store yields 50 to 100 MB/s."""
PARALLEL_FILES = 4
"""Number of files that are downloaded or hashed at once. One core hashes about 1.5 GB/s."""
PROGRESS_SECONDS = 2.0
_BLOCK = 4 * 2**20
_RECORD_BYTES = 8
_DONE = b"done"
_ATTEMPTS = 2

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileRecord:
    """Complete file: its size in bytes, and its SHA-256 in hex."""

    size: int
    sha256: str


class Progress:
    """Progress log with a line about every two seconds.

    Args:
        activity: activity, such as "download".
        total: number of bytes.
        clock: returns a monotonic time in seconds.
    """

    def __init__(self, activity: str, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._activity, self._total, self._clock = activity, total, clock
        self._done = self._present = 0
        self._start = self._last = clock()
        self._lock = threading.Lock()

    def add(self, size: int, *, present: bool = False) -> None:
        """Count processed bytes. `present`: they were there already, so they do not count for the speed."""
        with self._lock:
            self._done += size
            self._present += size if present else 0
            now = self._clock()
            if now - self._last < PROGRESS_SECONDS and self._done < self._total:
                return
            self._last = now
            speed = (self._done - self._present) / max(now - self._start, 1e-3)
            log.info(
                "base model, %s: %.1f of %.1f MiB (%d %%), %.1f MiB/s",
                self._activity,
                self._done / 2**20,
                self._total / 2**20,
                100 * self._done // max(self._total, 1),
                speed / 2**20,
            )


class _PartialFile:
    """Incomplete file on the disk; a context manager.

    Args:
        parts: folder of incomplete files.
        file: the file at its source.
    """

    def __init__(self, parts: SafeFolder, file: BaseFile) -> None:
        self.file = file
        self._parts = parts
        self._data = parts.opened(file.name, os.O_RDWR | os.O_CREAT)
        try:
            self._journal = parts.opened(f"{file.name}.chunks", os.O_RDWR | os.O_CREAT)
        except OSError:
            os.close(self._data)
            raise
        os.ftruncate(self._data, file.size)
        self.count = -(-file.size // CHUNK_BYTES)
        os.ftruncate(self._journal, self.count * _RECORD_BYTES)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._data)
        os.close(self._journal)

    def length(self, chunk: int) -> int:
        """Return the number of bytes of a chunk."""
        return min(CHUNK_BYTES, self.file.size - chunk * CHUNK_BYTES)

    def is_present(self, chunk: int) -> bool:
        """Return True if the chunk is complete on the disk."""
        record = os.pread(self._journal, _RECORD_BYTES, chunk * _RECORD_BYTES)
        if record[: len(_DONE)] != _DONE:
            return False
        data = os.pread(self._data, self.length(chunk), chunk * CHUNK_BYTES)
        return record == _record(data)

    def write(self, chunk: int, data: bytes) -> None:
        """Write a chunk and record it."""
        view, offset = memoryview(data), chunk * CHUNK_BYTES
        while view:
            written = os.pwrite(self._data, view, offset)
            view, offset = view[written:], offset + written
        os.pwrite(self._journal, _record(data), chunk * _RECORD_BYTES)

    def finish(self, files: SafeFolder) -> None:
        """Move the file, all of whose chunks are complete, to the folder of complete files.

        Raises:
            StoreError: another process has replaced it meanwhile.
        """
        os.fsync(self._data)
        if not self._parts.is_current(self.file.name, self._data):
            raise StoreError(
                f"{self._parts.path / self.file.name} was replaced by another process during the download.",
                permanent=False,
            )
        self._parts.move(self.file.name, files, self.file.name)
        self._parts.remove(f"{self.file.name}.chunks")


def _record(data: bytes) -> bytes:
    return _DONE + zlib.crc32(data).to_bytes(4, "big")


class Download:
    """Download of the files of one version of a base model.

    Args:
        source: source of the files.
        parts: folder of incomplete files.
        files: folder of complete files.
        progress: counts the bytes.
    """

    def __init__(self, source: BaseSource, parts: SafeFolder, files: SafeFolder, progress: Progress) -> None:
        self._source, self._parts, self._files, self._progress = source, parts, files, progress
        self.received = 0
        """Number of bytes that were read from the source."""
        self._lock = threading.Lock()

    def fetch(self, wanted: Iterable[BaseFile]) -> dict[str, FileRecord]:
        """Download the files that are not complete, and return the hashes of all, as read from the disk.

        Raises:
            StoreError: the source does not provide a file, or its bytes do not have the checksum of the source.
            OSError: a file cannot be written.
        """
        with ThreadPoolExecutor(PARALLEL_READS) as readers, ThreadPoolExecutor(PARALLEL_FILES) as files:
            jobs = [files.submit(self._fetch_file, file, readers) for file in wanted]
            try:
                return dict(job.result() for job in as_completed(jobs))
            except BaseException:
                for pool in (files, readers):
                    pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _fetch_file(self, file: BaseFile, readers: ThreadPoolExecutor) -> tuple[str, FileRecord]:
        expected = self._source.checksum(file)
        found = ""
        for _ in range(_ATTEMPTS):
            status = self._files.status(file.name)
            if status is not None and status.size == file.size:
                self._progress.add(file.size, present=True)
            else:
                self._files.remove(file.name)
                self._complete(file, readers)
            sha256, found = hash_file(self._files, file.name, expected)
            if found == expected or not expected:
                return file.name, FileRecord(file.size, sha256)
            log.warning("%s has %s instead of %s and is downloaded again", file.name, found, expected)
            self._files.remove(file.name)
        raise StoreError(
            f"{file.name} has the checksum {found}, and its source reports {expected}: upload the file again.",
            permanent=False,
        )

    def _complete(self, file: BaseFile, readers: ThreadPoolExecutor) -> None:
        with _PartialFile(self._parts, file) as part:
            jobs = [readers.submit(self._fetch_chunk, part, chunk) for chunk in range(part.count)]
            try:
                for job in as_completed(jobs):
                    job.result()
            finally:
                for job in jobs:
                    job.cancel()
                wait(jobs)  # they use the descriptors
            part.finish(self._files)

    def _fetch_chunk(self, part: _PartialFile, chunk: int) -> None:
        length = part.length(chunk)
        present = part.is_present(chunk)
        if not present:
            data = self._source.read(part.file, chunk * CHUNK_BYTES, length)
            part.write(chunk, data)
            with self._lock:
                self.received += length
        self._progress.add(length, present=present)


def hash_file(folder: SafeFolder, name: str, like: str = "") -> tuple[str, str]:
    """Return the SHA-256 of a file in hex, and its checksum by the algorithm of `like`, `<algorithm>:<hex>`."""
    algorithm = like.partition(":")[0]
    sums = [Checksum("sha256"), *([Checksum(algorithm)] if algorithm not in {"", "sha256"} else [])]
    with folder.file(name) as descriptor:
        offset = 0
        while block := os.pread(descriptor, _BLOCK, offset):
            for checksum in sums:
                checksum.update(block)
            offset += len(block)
    sha256 = sums[0].text()
    return sha256.partition(":")[2], sums[-1].text() if like else ""
