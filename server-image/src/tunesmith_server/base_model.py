"""Arrival of the base model on a pod: from the cache or its source, checked by hash, and its fingerprint."""

from __future__ import annotations

import errno
import hashlib
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from tunesmith.api.pool_base_model import BaseModelArrival, BaseModelOrigin
from tunesmith.contracts.fingerprint import LocalModelFolder, base_fingerprint
from tunesmith.storage.schemes import BY_NAME, split
from tunesmith_server.base_artifact import PublishedModel
from tunesmith_server.base_download import PARALLEL_FILES, Download, FileRecord, Progress, hash_file
from tunesmith_server.base_source import BaseFile, BaseSource, open_source
from tunesmith_server.model_cache import CacheFullError, Manifest, access_key, version_key
from tunesmith_server.parallel_sizes import config_problem
from tunesmith_server.safe_folder import SafeFolder
from tunesmith_server.store import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from tunesmith.storage.credentials import Credentials
    from tunesmith_server.model_cache import CachedModel, ModelCache

SUFFIXES = frozenset({".json", ".safetensors", ".jinja", ".txt", ".model"})
"""Suffixes of the model files that are used: never code, never pickle."""
LOCK = "lock"
"""Link to the file that users of the model lock, with the suffix of the fingerprint's file."""
_COPIED = 64 * 2**20
"""Largest file that is copied to the pod, so that it cannot change on a shared volume. Weights are linked."""
_MAX_CONFIG = 4 * 2**20
_ROUNDS = 3
"""Highest number of attempts to get files that have their hashes: files on a shared volume may change."""

log = logging.getLogger(__name__)


class BaseModelError(Exception):
    """The folder is not a usable base model, or does not fit on the disk."""


@dataclass(frozen=True)
class BaseModel:
    """Base model to fetch.

    Attributes:
        uri: URI such as s3://bucket/folder or hf://org/name.
        revision: commit, tag or branch of an hf:// model.
        target: folder for the engine; created if missing, and emptied.
        gpus: number of GPUs that share each layer.
        artifact_digest: digest of the artifact whose whole model is at the uri; None: any model.
    """

    uri: str
    revision: str | None
    target: Path
    gpus: int = 1
    artifact_digest: str | None = None


def fetch_base(
    model: BaseModel, credentials: Credentials, cache: ModelCache, clock: Callable[[], float] = time.monotonic
) -> tuple[str, BaseModelArrival]:
    """Fill the target with the base model's files and return its fingerprint; see `ModelCache` for interruptions.

    The source is asked for the files' versions. If it cannot be reached, the version that these credentials could read
    last is used.

    Raises:
        StoreError: the source does not provide the model.
        BaseModelError: the files are not a base model, or the volume is too small.
    """
    begin = clock()
    source = open_source(model.uri, model.revision, credentials)
    if model.artifact_digest is not None:
        source = PublishedModel(source, model.uri, model.artifact_digest, credentials)
    access = access_key(model.uri, model.artifact_digest or model.revision, _used(model.uri, credentials))
    files: list[BaseFile] | None
    try:
        files = _selected(source.files(), model.uri)
    except StoreError as error:
        key = cache.recall(access) if error.outage else None
        if key is None:
            raise
        log.warning("base model: the version in the cache is used, because its source does not answer: %s", error)
        files = None
    else:
        key = version_key(model.uri, files)
    try:
        with cache.use(key) as cached:
            arrival = _arrive(_Arriving(model, source, cache, cached, key), files)
            if files is not None:
                cache.remember(access, key)
            _link(model.target.with_name(f"{model.target.name}.{LOCK}"), cached.lock_path)
            fingerprint = base_fingerprint(LocalModelFolder(model.target))
    except OSError as error:
        raise _disk_error(error) from None
    except ValueError as error:
        raise BaseModelError(f"{model.uri} is not a base model: {error}.") from None
    return fingerprint, arrival.model_copy(update={"seconds": round(clock() - begin, 3)})


def _used(uri: str, credentials: Credentials) -> dict[str, str]:
    scheme = BY_NAME[split(uri)[0]]
    return {key: credentials.values[key] for key in scheme.keys if credentials.values.get(key)}


@dataclass(frozen=True)
class _Arriving:
    """Arrival of one version of a model."""

    model: BaseModel
    source: BaseSource
    cache: ModelCache
    cached: CachedModel
    key: str


def _arrive(arriving: _Arriving, files: list[BaseFile] | None) -> BaseModelArrival:
    """Fill the target from complete files with the right hashes, after downloading what is missing."""
    cached, received, is_checked = arriving.cached, 0, False
    for _ in range(_ROUNDS):
        manifest = _complete_manifest(cached, files)
        if manifest is not None:
            listed = files if files is not None else _listed(manifest)
            wrong = _install(arriving, manifest, listed, is_checked=is_checked, asks=files is not None)
            if not wrong:
                size = sum(file.size for file in manifest.files.values())
                origin = BaseModelOrigin.DOWNLOAD if received else BaseModelOrigin.CACHE
                return BaseModelArrival(origin=origin, seconds=0, size_bytes=size, downloaded_bytes=received)
            log.warning("base model: %s on the volume changed after they were written", ", ".join(wrong))
            cached.discard(wrong)
        if files is None:
            break
        with cached.filling(lambda: _complete_manifest(cached, files) is not None) as is_missing:
            if is_missing:
                received += _fill(arriving, files)
            is_checked = is_missing
    uri = arriving.model.uri
    if files is None:
        raise StoreError(f"{uri} cannot be reached, and its copy in the cache is damaged.", permanent=False)
    raise BaseModelError(
        f"The files of {uri} at {cached.files.path} change after they are written: let no other pods write to the "
        "volume."
    )


def _fill(arriving: _Arriving, files: list[BaseFile]) -> int:
    """Download the missing files, record the hashes of all, and return the number of downloaded bytes."""
    uri, cached = arriving.model.uri, arriving.cached
    _check_sizes(arriving, files)
    size = sum(file.size for file in files)
    try:
        arriving.cache.make_room(arriving.key, size)
    except CacheFullError as error:
        raise BaseModelError(f"{uri} does not fit: {error}.") from None
    download = Download(arriving.source, cached.parts, cached.files, Progress("download", size))
    records = download.fetch(files)
    if version_key(uri, _selected(arriving.source.files(), uri)) != arriving.key:
        cached.discard([file.name for file in files])
        raise StoreError(f"{uri} was changed while it was read.", permanent=False)
    cached.complete(Manifest(uri, records))
    return download.received


def _check_sizes(arriving: _Arriving, files: list[BaseFile]) -> None:
    """Check, before anything is downloaded, that the engine can divide the model among its GPUs."""
    config = next(file for file in files if file.name == "config.json")
    document = arriving.source.read(config, 0, min(config.size, _MAX_CONFIG))
    problem = config_problem(document, arriving.model.gpus)
    if problem is not None:
        raise BaseModelError(problem)


def _complete_manifest(cached: CachedModel, files: list[BaseFile] | None) -> Manifest | None:
    """Return the manifest if it has exactly these files."""
    manifest = cached.manifest()
    if manifest is None or files is None:
        return manifest
    sizes = {name: file.size for name, file in manifest.files.items()}
    return manifest if sizes == {file.name: file.size for file in files} else None


def _listed(manifest: Manifest) -> list[BaseFile]:
    return _selected([BaseFile(name, file.size) for name, file in manifest.files.items()], manifest.uri)


def _install(
    arriving: _Arriving, manifest: Manifest, files: Sequence[BaseFile], *, is_checked: bool, asks: bool
) -> list[str]:
    """Fill the target; return the names of files that do not have the hash of the manifest and of the source.

    `is_checked`: True if this process has computed the hashes. `asks`: True if the source can be asked for checksums.
    """
    model, source, cached = arriving.model, arriving.source, arriving.cached
    model.target.mkdir(parents=True, exist_ok=True)
    with SafeFolder.open(model.target) as target, ThreadPoolExecutor(PARALLEL_FILES) as pool:
        for name in target.names():
            target.remove(name)
        progress = Progress("check", sum(file.size for file in files))

        def install(file: BaseFile) -> bool:
            expected = source.checksum(file) if asks and not is_checked else ""
            given, record = replace(file, checksum=expected), manifest.files[file.name]
            is_right = _install_file(cached, target, given, record, is_checked=is_checked)
            progress.add(file.size)
            return is_right

        installed = list(pool.map(install, files))
    return [file.name for file, is_right in zip(files, installed, strict=True) if not is_right]


def _install_file(
    cached: CachedModel, target: SafeFolder, file: BaseFile, record: FileRecord, *, is_checked: bool
) -> bool:
    """Put a file into the target; return False if it does not have its hash."""
    status = cached.files.status(file.name)
    if status is None or status.size != record.size:
        return False
    if file.name.endswith(".safetensors") or record.size > _COPIED:
        if not is_checked and hash_file(cached.files, file.name, file.checksum) != (record.sha256, file.checksum):
            return False
        _link(target.path / file.name, cached.files.path / file.name)
        return True
    content = cached.files.read(file.name, _COPIED)
    if hashlib.sha256(content).hexdigest() != record.sha256:
        return False
    target.write(file.name, content)
    return True


def _link(path: Path, to: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(to)


def _selected(files: list[BaseFile], uri: str) -> list[BaseFile]:
    """Return the files of a model that are used, after checking that they are a model."""
    chosen = [file for file in files if PurePosixPath(file.name).suffix in SUFFIXES and not file.name.startswith(".")]
    names = {file.name for file in chosen}
    if "config.json" not in names:
        raise BaseModelError(f"{uri} contains no config.json: it is not a base model in the Hugging Face layout.")
    if not any(name.endswith(".safetensors") for name in names):
        raise BaseModelError(
            f"{uri} contains no .safetensors files; weights are read from safetensors only. Convert it."
        )
    return chosen


def _disk_error(error: OSError) -> BaseModelError:
    reason = "is full" if error.errno == errno.ENOSPC else f"cannot be used ({error.strerror})"
    name = f" for {error.filename}" if error.filename else ""
    return BaseModelError(f"The volume of the base model{name} {reason}.")
