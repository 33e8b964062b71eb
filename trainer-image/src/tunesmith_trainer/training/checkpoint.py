"""Checkpoints: written atomically, verified before they are used, kept in the job's store.

A checkpoint is a folder `step-<8 digits>`. It is written under another name, every file is fsynced, `checkpoint.json`
with the SHA-256 of each comes last, then the folder is renamed. In a remote store `checkpoint.json` is uploaded last.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.storage.folder import Retry
from tunesmith_trainer.errors import InvalidSpecError, StorageUnavailableError, TrainerError
from tunesmith_trainer.store import file_sha256

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tunesmith.storage.folder import Folder

log = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
_NAME = re.compile(r"^step-(\d{8})$")
_FILE_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")
_UNFINISHED = ".unfinished-"
_SCHEMA_VERSION = 1
_LAST_UPLOAD_SECONDS = 60.0
"""Seconds that an upload in progress at the end of the job may take, before all checkpoints are removed."""
UPLOAD_RETRY = Retry(attempts=1_000_000, first=1.0, longest=60.0)
"""Retries during training; a newer checkpoint replaces one that waits."""


class DamagedCheckpointError(Exception):
    """A checkpoint that must not be used; the text describes the problem."""


class OtherJobError(Exception):
    """A complete checkpoint, but of another spec or other data."""


class CheckpointWriteError(Exception):
    """A checkpoint could not be written; nothing of it is left."""


@dataclass(frozen=True)
class LocalCheckpoint:
    """A verified checkpoint on local disk."""

    step: int
    path: Path


def name_of(step: int) -> str:
    """Return the folder's name; names sort in the order of steps."""
    return f"step-{step:08d}"


def steps_of(names: list[str]) -> list[int]:
    """Return the steps among the names of folders, newest first."""
    return sorted((int(match.group(1)) for match in map(_NAME.match, names) if match), reverse=True)


def write(parent: Path, step: int, binding: str, fill: Callable[[Path], None]) -> Path:
    """Write a checkpoint; it appears under its name once it is complete and on disk.

    Args:
        parent: folder of the checkpoints.
        step: optimizer steps done.
        binding: digest of everything that determines the run.
        fill: writes the files into the folder that it is given.

    Raises:
        CheckpointWriteError: the disk is full or read-only.
    """
    unfinished = parent / f"{_UNFINISHED}{step}"
    final = parent / name_of(step)
    try:
        _remove_unfinished(parent)
        unfinished.mkdir(parents=True)
        fill(unfinished)
        files = sorted(unfinished.iterdir())
        for file in files:
            _sync(file)
        manifest = _manifest(step, binding, files)
        (unfinished / MANIFEST).write_bytes(manifest)
        _sync(unfinished / MANIFEST)
        _sync(unfinished)
        if final.exists():  # a damaged one of that step: the run resumed from an earlier one
            shutil.rmtree(final)
        unfinished.rename(final)
        _sync(parent)
    except Exception as error:
        # torch and safetensors have their own exceptions for a full disk.
        text = describe_disk_problem(error, parent)
        shutil.rmtree(unfinished, ignore_errors=True)
        if text is None:
            raise
        raise CheckpointWriteError(text) from error
    return final


def verify(folder: Path, step: int, binding: str) -> None:
    """Verify every byte of a checkpoint.

    Raises:
        DamagedCheckpointError: a file is missing, unexpected or changed.
        OtherJobError: the checkpoint is complete, but belongs to another run.
    """
    try:
        data = (folder / MANIFEST).read_bytes()
    except OSError:
        raise DamagedCheckpointError(f"{MANIFEST} is missing, writing it did not finish") from None
    document = parse(data, step)
    files: dict[str, Any] = document["files"]
    present = {entry.name for entry in folder.iterdir()} - {MANIFEST}
    for name in sorted(present ^ set(files)):
        raise DamagedCheckpointError(f"{name} is {'missing' if name in files else 'not listed in its manifest'}")
    for name, expected in files.items():
        size = (folder / name).stat().st_size
        if size != expected["sizeBytes"]:
            raise DamagedCheckpointError(f"{name} has {size} bytes instead of {expected['sizeBytes']}")
        if file_sha256(folder / name) != expected["sha256"]:
            raise DamagedCheckpointError(f"the content of {name} changed")
    if document["binding"] != binding:
        raise OtherJobError


def parse(data: bytes, step: int) -> dict[str, Any]:
    """Return the content of `checkpoint.json`.

    Raises:
        DamagedCheckpointError: the content is invalid.
    """
    try:
        document = json.loads(data)
        digest = document.pop("sha256")
        complete = (
            digest == _digest(document)
            and document["schemaVersion"] == _SCHEMA_VERSION
            and all(_FILE_NAME.match(name) for name in document["files"])
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise DamagedCheckpointError(f"the content of {MANIFEST} changed")
    if document["step"] != step:
        raise DamagedCheckpointError(f"{MANIFEST} is that of step {document['step']}")
    parsed: dict[str, Any] = document
    return parsed


class Checkpoints:
    """Checkpoints of one job.

    They are written in place to a local folder; to a store they are uploaded by a thread, for which training does not
    wait.

    Args:
        folder: folder that they are kept in.
        scratch: local folder for writing and downloading.
        binding: digest of everything that determines the run; a checkpoint with another one is refused.
        keep: number of the newest checkpoints to keep.
        write_line: reports events to a person.
        retry: pauses between attempts to upload.
    """

    def __init__(
        self,
        folder: Folder,
        scratch: Path,
        *,
        binding: str,
        keep: int,
        write_line: Callable[[str], None],
        retry: Retry = UPLOAD_RETRY,
    ) -> None:
        self.uri = folder.uri
        self._folder = folder
        self._scratch = scratch
        self._binding = binding
        self._keep = keep
        self._write_line = write_line
        self._retry = retry
        self._last: int | None = None
        self._changed = threading.Condition()
        self._waiting: LocalCheckpoint | None = None
        self._uploading = False
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def last(self) -> int | None:
        """Step of the newest checkpoint that is complete in its store."""
        return self._last

    @property
    def pending(self) -> bool:
        """True if a checkpoint still has to reach the store; read without a lock, for signal handlers."""
        return self._waiting is not None or self._uploading

    def newest(self) -> LocalCheckpoint | None:
        """Return the newest checkpoint that verifies, on local disk; those that do not are reported and removed.

        Raises:
            InvalidSpecError: the folder holds checkpoints of another spec or other data.
            StorageUnavailableError: the store did not answer.
        """
        damaged = 0
        for step in steps_of(self._folder.folders()):
            try:
                path = self._fetch(step)
                verify(path, step, self._binding)
            except DamagedCheckpointError as error:
                self._write_line(f"  the checkpoint of step {step} is damaged and will not be used: {error}")
                self._remove(step)
                damaged += 1
            except OtherJobError:
                raise InvalidSpecError(
                    f"{self.uri} holds checkpoints of another spec, base model or data set: choose another --output,"
                    " or remove that folder to start from the beginning"
                ) from None
            else:
                self._last = step
                return LocalCheckpoint(step, path)
        if damaged:
            self._write_line("  no checkpoint is usable: training starts at step 0")
        return None

    def at(self, step: int) -> LocalCheckpoint:
        """Return the checkpoint that another process of the run found complete, on local disk.

        Raises:
            StorageUnavailableError: it is incomplete on this machine, or the store did not answer.
        """
        try:
            path = self._fetch(step)
            verify(path, step, self._binding)
        except (DamagedCheckpointError, OtherJobError) as error:
            message = f"the checkpoint of step {step} in {self.uri} cannot be read: {error}"
            raise StorageUnavailableError(message) from error
        return LocalCheckpoint(step, path)

    def save(self, step: int, fill: Callable[[Path], None]) -> bool:
        """Write a checkpoint and, for a store, start its upload; if it cannot be written, report why and return False.

        Earlier checkpoints are kept until the new one is complete.
        """
        try:
            path = write(self._local or self._scratch, step, self._binding, fill)
        except CheckpointWriteError as error:
            kept = f"that of step {self._last} is kept" if self._last is not None else "no earlier one exists"
            self._write_line(
                f"  the checkpoint of step {step} could not be written: {error}; {kept}, training continues"
            )
            return False
        if self._local is not None:
            self._last = step
            self._prune(self._local)
        else:
            self._enqueue(LocalCheckpoint(step, path))
        return True

    def flush(self, seconds: float) -> bool:
        """Wait until everything is in the store, at most `seconds`; return True if it is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self.pending, timeout=seconds)

    def clear(self) -> None:
        """Remove all checkpoints once the artifact is published; best effort."""
        with self._changed:
            self._waiting = None
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._uploading, timeout=_LAST_UPLOAD_SECONDS)
        try:
            self._folder.remove()
        except TrainerError as error:
            self._write_line(f"  the checkpoints in {self.uri} could not be removed ({error}): remove that folder")

    @property
    def _local(self) -> Path | None:
        return self._folder.local

    def _fetch(self, step: int) -> Path:
        name = name_of(step)
        if self._local is not None:
            return self._local / name
        remote, target = self._folder.child(name), self._scratch / name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        present = remote.names()
        if MANIFEST not in present:
            raise DamagedCheckpointError(f"{MANIFEST} is missing, its upload did not finish")
        remote.download(MANIFEST, target / MANIFEST)
        for file in parse((target / MANIFEST).read_bytes(), step)["files"]:
            if file not in present:
                raise DamagedCheckpointError(f"{file} is missing")
            remote.download(file, target / file)
        return target

    def _remove(self, step: int) -> None:
        try:
            self._folder.child(name_of(step)).remove()
        except TrainerError as error:
            log.warning("the checkpoint of step %d cannot be removed: %s", step, error)

    def _prune(self, folder: Path) -> None:
        for step in steps_of([entry.name for entry in folder.iterdir()])[self._keep :]:
            shutil.rmtree(folder / name_of(step), ignore_errors=True)

    def _enqueue(self, saved: LocalCheckpoint) -> None:
        with self._changed:
            if self._waiting is not None:
                shutil.rmtree(self._waiting.path, ignore_errors=True)
            self._waiting = saved
            if self._thread is None:
                self._thread = threading.Thread(target=self._upload_all, name="checkpoints", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def _upload_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None)
                saved, self._uploading, self._waiting = self._waiting, True, None
            try:
                if saved is not None:
                    self._upload_with_retries(saved)
            except Exception:
                log.exception("the checkpoint could not be uploaded")
                self._write_line("  a checkpoint could not be uploaded; the log has the traceback, training continues")
            finally:
                with self._changed:
                    self._uploading = False
                    self._changed.notify_all()

    def _upload_with_retries(self, saved: LocalCheckpoint) -> None:
        """Upload until it succeeds, a newer checkpoint is waiting, or none is needed any more."""
        reported = False
        for pause in self._retry.pauses():
            try:
                self._upload(saved)
            except TrainerError as error:
                if not reported:
                    self._write_line(
                        f"  the checkpoint of step {saved.step} cannot be uploaded: {error}; training continues, and"
                        " the upload will be retried"
                    )
                    reported = True
                with self._changed:
                    if self._changed.wait_for(lambda: self._waiting is not None or self._closed, timeout=pause):
                        break
            else:
                self._last = saved.step
                if reported:
                    self._write_line(f"  the checkpoint of step {saved.step} is now in the store")
                break
        shutil.rmtree(saved.path, ignore_errors=True)

    def _upload(self, saved: LocalCheckpoint) -> None:
        single_attempt = Retry(attempts=1)

        def remote_at(step: int) -> Folder:
            return self._folder.child(name_of(step), retry=single_attempt)

        remote = remote_at(saved.step)
        for file in sorted(saved.path.iterdir(), key=lambda file: (file.name == MANIFEST, file.name)):
            remote.upload(file.name, file)
        # Remains of an upload that was given up or killed do not count towards the checkpoints to keep.
        stored = {step: remote_at(step) for step in steps_of(self._folder.child(retry=single_attempt).folders())}
        complete = [step for step, folder in stored.items() if folder.exists(MANIFEST)]
        for step in stored.keys() - set(complete[: self._keep]):
            stored[step].remove()


def _manifest(step: int, binding: str, files: list[Path]) -> bytes:
    document = {
        "schemaVersion": _SCHEMA_VERSION,
        "step": step,
        "binding": binding,
        "files": {file.name: {"sha256": file_sha256(file), "sizeBytes": file.stat().st_size} for file in sorted(files)},
    }
    return json.dumps({**document, "sha256": _digest(document)}, indent=1, sort_keys=True).encode()


def _digest(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_unfinished(parent: Path) -> None:
    if parent.is_dir():
        for remnant in parent.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(remnant, ignore_errors=True)


def describe_disk_problem(error: Exception, parent: Path) -> str | None:
    """Describe the problem with the disk; None if the error has another cause."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            if cause.errno in {errno.ENOSPC, errno.EDQUOT}:
                return f"the disk of {parent} is full"
            return f"{parent}: {cause.strerror}"
        cause = cause.__cause__ or cause.__context__
    with contextlib.suppress(OSError):
        if shutil.disk_usage(parent if parent.exists() else parent.parent).free < 2**20:
            return f"the disk of {parent} is full"
    return None
