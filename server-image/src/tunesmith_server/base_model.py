"""Download of the base model to the pod's disk, and its fingerprint."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from tunesmith.contracts.connections import refused_connection
from tunesmith.contracts.fingerprint import LocalModelFolder, base_fingerprint
from tunesmith.storage.credentials import Credentials, Scrubber
from tunesmith.storage.errors import StorageError
from tunesmith.storage.folder import StoredFile
from tunesmith.storage.hub import hub_client
from tunesmith_server.store import StoreError, StoreFolder, store_error

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PARALLEL_FILES = 4
PROGRESS_SECONDS = 2.0
MARKER = ".tunesmith-base.json"
"""File written into the folder once it is complete: the model's source, and the size of every file."""
SUFFIXES = frozenset({".json", ".safetensors", ".jinja", ".txt", ".model"})
"""Patterns of the model files that are used: never code, never pickle."""

log = logging.getLogger(__name__)


class BaseModelError(Exception):
    """The folder is not a usable base model, or does not fit on the disk."""


@dataclass(frozen=True)
class Marker:
    """Source of a complete folder."""

    uri: str
    revision: str | None
    files: dict[str, int]


class Progress:
    """Progress log with a line about every two seconds."""

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._clock = total, clock
        self._done = 0
        self._start = self._last = clock()
        self._lock = threading.Lock()

    def add(self, size: int) -> None:
        """Count downloaded bytes."""
        with self._lock:
            self._done += size
            now = self._clock()
            if now - self._last < PROGRESS_SECONDS and self._done < self._total:
                return
            self._last = now
            speed = self._done / max(now - self._start, 1e-3)
            log.info(
                "base model: %.1f of %.1f MiB (%d %%), %.1f MiB/s",
                self._done / 2**20,
                self._total / 2**20,
                100 * self._done // max(self._total, 1),
                speed / 2**20,
            )


def fetch_base(uri: str, revision: str | None, target: Path, credentials: Credentials, storage: int) -> str:
    """Download a base model into `target` unless it is already there; return its fingerprint.

    Files that an interrupted download completed are kept.

    Args:
        uri: URI such as s3://bucket/folder or hf://org/name.
        revision: commit, tag or branch of an hf:// model.
        target: folder; created if missing.
        credentials: credentials for the URI; HF_TOKEN for hf://.
        storage: highest number of bytes of the model.

    Raises:
        StoreError: the store does not provide the model.
        BaseModelError: the files are not a base model, or the disk is too small.
    """
    target.mkdir(parents=True, exist_ok=True)
    if _is_complete(target, uri, revision):
        log.info("base model: %s is already downloaded", uri)
    else:
        download = _Download(uri, target, storage)
        files = (
            _fetch_hub(download, revision, credentials) if uri.startswith("hf://") else _fetch(download, credentials)
        )
        marker = Marker(uri, revision, {file.name: file.size for file in files})
        (target / MARKER).write_text(json.dumps(asdict(marker)))
    try:
        return base_fingerprint(LocalModelFolder(target))
    except ValueError as error:
        raise BaseModelError(f"{uri} is not a base model: {error}.") from None


def _is_complete(target: Path, uri: str, revision: str | None) -> bool:
    try:
        marker = Marker(**json.loads((target / MARKER).read_text()))
    except (OSError, ValueError, TypeError):
        return False
    if (marker.uri, marker.revision) != (uri, revision):
        for name in marker.files:  # of another model: none of its files may stay
            (target / name).unlink(missing_ok=True)
        (target / MARKER).unlink()
        return False
    return all(
        (target / name).is_file() and (target / name).stat().st_size == size for name, size in marker.files.items()
    )


@dataclass(frozen=True)
class _Download:
    """Source and target of a download."""

    uri: str
    target: Path
    storage: int


def _selected(files: list[StoredFile], download: _Download) -> list[StoredFile]:
    """Return the files of a model that are used, after checking that they are a model and fit on the disk."""
    uri, target = download.uri, download.target
    chosen = [file for file in files if PurePosixPath(file.name).suffix in SUFFIXES and not file.name.startswith(".")]
    names = {file.name for file in chosen}
    if "config.json" not in names:
        raise BaseModelError(f"{uri} contains no config.json: it is not a base model in the Hugging Face layout.")
    if not any(name.endswith(".safetensors") for name in names):
        raise BaseModelError(
            f"{uri} contains no .safetensors files; weights are read from safetensors only. Convert it."
        )
    needed = sum(file.size for file in chosen)
    if needed > download.storage:
        raise BaseModelError(
            f"{uri} has {needed} bytes and the pod's volume for it is limited to {download.storage} bytes: ask the "
            "platform's administrators to raise the chart's value serving.baseModelStorage."
        )
    free = shutil.disk_usage(target).free
    if needed > free:
        raise BaseModelError(f"{uri} has {needed} bytes and the volume at {target} has {free} free: make it larger.")
    return chosen


def _fetch(download: _Download, credentials: Credentials) -> list[StoredFile]:
    target = download.target
    folder = StoreFolder(download.uri, credentials)
    chosen = _selected(folder.list(), download)
    progress = Progress(sum(file.size for file in chosen))

    def fetch(file: StoredFile) -> None:
        path = target / file.name
        if path.is_file() and path.stat().st_size == file.size:
            progress.add(file.size)
            return
        part = target / f".{file.name}.part"
        part.unlink(missing_ok=True)
        folder.download(file.name, part, file.size, progress.add)
        part.replace(path)

    with ThreadPoolExecutor(PARALLEL_FILES) as pool:
        for done in as_completed([pool.submit(fetch, file) for file in chosen]):
            done.result()
    return chosen


def _fetch_hub(download: _Download, revision: str | None, credentials: Credentials) -> list[StoredFile]:
    uri, target = download.uri, download.target
    repository = uri.removeprefix("hf://").strip("/")
    try:
        hub = hub_client(credentials)
    except StorageError as error:
        raise store_error(error, credentials) from None
    try:
        found = hub.model_info(repository, revision=revision, files_metadata=True)
        files = [StoredFile(entry.rfilename, entry.size or 0) for entry in found.siblings or []]
        chosen = _selected([file for file in files if "/" not in file.name], download)
        progress = Progress(sum(file.size for file in chosen))
        for file in chosen:
            hub.hf_hub_download(repository, file.name, revision=found.sha, local_dir=target)
            progress.add(file.size)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        what = f"{uri}, revision {revision or 'main'}"
        hint = "Check its name, and HF_TOKEN of the Secret if it is private or gated"
        if isinstance(error, GatedRepoError):
            hint = "It is gated: accept its terms and put HF_TOKEN into the Secret"
        message = f"{what} does not exist on the Hub, or this token has no access to it ({credentials.source}). {hint}."
        raise StoreError(message, permanent=False) from None
    except Exception as error:
        refused = refused_connection(error)
        if refused is not None:
            raise StoreError(f"{uri} resolves to {refused.explanation}.", permanent=False) from None
        if not isinstance(error, (HfHubHTTPError, OSError)):
            raise
        text = Scrubber(credentials.values).clean(f"{uri} could not be read from the Hub: {error}.")
        raise StoreError(text, permanent=False) from None
    shutil.rmtree(target / ".cache", ignore_errors=True)
    return chosen
