"""Download of an artifact from the store to the engine's folder, which only ever contains checked files.

Small parts come first: the manifest, the configuration and the weights' header are read by range and checked. This
bounds the later download by the size of the base model's modules. The engine gets only the files that it reads.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tunesmith.contracts.artifact import (
    MAX_MANIFEST_BYTES,
    ArtifactFile,
    ArtifactManifest,
    check_files,
    digest_of,
    parse_manifest,
)
from tunesmith.contracts.location import ARTIFACT_MANIFEST, engine_name, namespace_of_artifact
from tunesmith.contracts.parity import MAX_PARITY_BYTES, PARITY_FILE, PARITY_ROWS_FILE, parse_parity
from tunesmith.contracts.safetensors import LENGTH_BYTES
from tunesmith.contracts.servability import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MAX_CONFIG_BYTES, LoraConfig
from tunesmith_server.lora import (
    Modules,
    UnfitAdapterError,
    WeightBounds,
    check_config,
    check_header,
    check_length,
    check_values,
    weight_bounds,
)
from tunesmith_server.store import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    from tunesmith.contracts.agent import DesiredAdapter
    from tunesmith_server.base_weights import BaseWeights

TEMPORARY = ".incoming-"
"""Prefix of folders that are being written or removed."""


@dataclass(frozen=True)
class PodLimits:
    """Limits of a pod that an adapter must not exceed.

    Attributes:
        store: URI of the store; artifacts outside it are refused.
        fingerprint: fingerprint of the pod's base model.
        base: tensors of the base model.
        max_rank: highest LoRA rank that the engine accepts.
        max_ratio: highest ratio of the norm of an adapter's change to a module to the norm of the base model's weights.
        equivalent_to: fingerprint of the base model that the pod's one stands for; None: none.
    """

    store: str
    fingerprint: str
    base: BaseWeights
    max_rank: int
    max_ratio: float
    equivalent_to: str | None = None


class ArtifactSource(Protocol):
    """Files of an artifact that is not yet trusted, such as a StoreFolder."""

    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""

    def read(self, name: str, start: int, end: int) -> bytes:
        """Return the bytes of a file from `start` to `end`, or up to the end of the file."""

    def download(self, name: str, target: Path, size: int, progress: Callable[[int], None]) -> str:
        """Write a file of `size` bytes to `target` and return its SHA-256 in hex."""


class Steps:
    """Steps of fetching an artifact, overridden by a supervisor. This class does not supervise."""

    def checking(self) -> AbstractContextManager[None]:
        """Return a context for a block that checks untrusted content; the block does not wait for the network."""
        return nullcontext()

    def reserve(self, size: int) -> None:
        """Reserve space for `size` bytes before they are written.

        Raises:
            StoreError: the volume has too little space.
        """

    def progress(self, size: int) -> None:
        """Record that `size` more bytes were written."""


def adapter_folder(adapters: Path, digest: str) -> Path:
    """Return the folder of a revision's files, which is named after its digest."""
    return adapters / digest.removeprefix("sha256:")


def adapter_path(adapters: Path, digest: str) -> str:
    """Return the path of `adapter_folder` as a text, without the cost of a Path, for hundreds of adapters in a pass."""
    return f"{adapters}/{digest.removeprefix('sha256:')}"


def incoming_folder(adapters: Path, digest: str) -> Path:
    """Return the folder of a revision's files until all of them are checked."""
    return adapters / f"{TEMPORARY}{digest.removeprefix('sha256:')}"


def check_location(adapter: DesiredAdapter, store: str) -> None:
    """Check that a revision's name matches its digest, and that it is in its namespace's part of the store.

    Raises:
        UnfitAdapterError: one of these checks fails.
    """
    namespace, _, rest = adapter.engine_name.partition("/")
    model_name = rest.rpartition("@")[0]
    try:
        expected = engine_name(namespace, model_name, adapter.digest)
    except ValueError as error:
        raise UnfitAdapterError(str(error)) from None
    if not namespace or not model_name or expected != adapter.engine_name:
        raise UnfitAdapterError(f"{adapter.engine_name} is not the engine name of a revision with {adapter.digest}")
    if namespace_of_artifact(store, adapter.uri) != namespace:
        raise UnfitAdapterError(f"{adapter.uri} is not in the part of the store that belongs to {namespace}")


def fetch_artifact(
    adapter: DesiredAdapter,
    limits: PodLimits,
    adapters: Path,
    open_source: Callable[[str], ArtifactSource],
    steps: Steps | None = None,
) -> Path:
    """Download and check the artifact of a revision, move it to its folder, and return the folder.

    Args:
        adapter: revision.
        limits: limits that it must not exceed.
        adapters: folder of the pod's adapters.
        open_source: return the files at a URI.
        steps: supervisor of the work; None: unsupervised.

    Raises:
        UnfitAdapterError: the artifact is damaged, unsafe, or does not fit this pod.
        StoreError: the store does not provide the artifact.
        OSError: the artifact cannot be written.
    """
    target = adapter_folder(adapters, adapter.digest)
    if target.exists():
        return target
    steps = steps or Steps()
    check_location(adapter, limits.store)
    source = open_source(adapter.uri)
    bounds = weight_bounds(limits.base, limits.max_rank)
    manifest_bytes = source.read(ARTIFACT_MANIFEST, 0, MAX_MANIFEST_BYTES + 1)
    with steps.checking():
        manifest = check_manifest(manifest_bytes, adapter.digest, limits, bounds)
    config_bytes = _small_file(source, ADAPTER_CONFIG, manifest.files[ADAPTER_CONFIG])
    parities = _parity_files(source, manifest)
    with steps.checking():
        for name, document in parities.items():
            _check_parity(document, name)
    weights = manifest.files[ADAPTER_WEIGHTS]
    start = source.read(ADAPTER_WEIGHTS, 0, LENGTH_BYTES)
    length = check_length(start, weights.size_bytes, bounds)
    header = source.read(ADAPTER_WEIGHTS, LENGTH_BYTES, LENGTH_BYTES + length)
    with steps.checking():
        config = check_config(config_bytes, max_rank=limits.max_rank)
        if config.rank != manifest.adapter.rank:
            raise UnfitAdapterError(
                f"{ADAPTER_CONFIG} has rank {config.rank} and {ARTIFACT_MANIFEST} {manifest.adapter.rank}"
            )
        check_header(header, weights.size_bytes, config, limits.base, bounds)
    steps.reserve(weights.size_bytes)
    incoming = incoming_folder(adapters, adapter.digest)
    shutil.rmtree(incoming, ignore_errors=True)
    incoming.mkdir()
    try:
        received = source.download(ADAPTER_WEIGHTS, incoming / ADAPTER_WEIGHTS, weights.size_bytes, steps.progress)
        if received != weights.sha256:
            raise _changed(ADAPTER_WEIGHTS)
        (incoming / ADAPTER_CONFIG).write_bytes(config_bytes)
        (incoming / ARTIFACT_MANIFEST).write_bytes(manifest_bytes)
        for name, document in parities.items():
            (incoming / name).write_bytes(document)
        with steps.checking():
            modules = _modules_of(incoming / ADAPTER_WEIGHTS, config, limits.base, bounds)
            check_values(incoming / ADAPTER_WEIGHTS, modules, config, limits.base, limits.max_ratio)
        incoming.rename(target)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
    return target


def _small_file(source: ArtifactSource, name: str, entry: ArtifactFile) -> bytes:
    data = source.read(name, 0, entry.size_bytes + 1)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise _changed(name)
    return data


def _parity_files(source: ArtifactSource, manifest: ArtifactManifest) -> dict[str, bytes]:
    """Return the artifact's files with expected answers; a copy of an artifact lacks the one with rows."""
    found = {}
    for name in (PARITY_FILE, PARITY_ROWS_FILE):
        entry = manifest.files.get(name)
        if entry is None:
            continue
        if entry.size_bytes > MAX_PARITY_BYTES:
            raise UnfitAdapterError(f"{name} has {entry.size_bytes} bytes; at most {MAX_PARITY_BYTES} are read")
        try:
            found[name] = _small_file(source, name, entry)
        except StoreError as error:
            if error.outage or name != PARITY_ROWS_FILE:
                raise
    return found


def _check_parity(document: bytes, name: str) -> None:
    try:
        parse_parity(document, name)
    except ValueError as error:
        raise UnfitAdapterError(str(error)) from None


def _modules_of(path: Path, config: LoraConfig, base: BaseWeights, bounds: WeightBounds) -> Modules:
    """Check the header again, in the file with the manifest's hash: the store may have sent another header before."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = check_length(file.read(LENGTH_BYTES), size, bounds)
        return check_header(file.read(length), size, config, base, bounds)


def _changed(name: str) -> UnfitAdapterError:
    return UnfitAdapterError(f"{name} was changed after the artifact was published: its SHA-256 is not the manifest's")


def check_manifest(document: bytes, digest: str, limits: PodLimits, bounds: WeightBounds) -> ArtifactManifest:
    """Check `tunesmith.json`.

    Raises:
        UnfitAdapterError: the manifest has another digest or is malformed; it lists files that an artifact must not
            have or that are too large, or omits required files; vLLM cannot serve the artifact; or the artifact belongs
            to another base model.
    """
    if len(document) > MAX_MANIFEST_BYTES:
        raise UnfitAdapterError(f"{ARTIFACT_MANIFEST} has more than {MAX_MANIFEST_BYTES} bytes")
    actual = digest_of(document)
    if actual != digest:
        raise UnfitAdapterError(
            f"{ARTIFACT_MANIFEST} was changed after the artifact was published: its digest is {actual}"
        )
    try:
        manifest = parse_manifest(document)
    except ValueError as error:
        raise UnfitAdapterError(str(error)) from None
    if not manifest.servable.vllm:
        raise UnfitAdapterError(f"it was published as an adapter that vLLM cannot serve: {manifest.servable.reason}")
    try:
        check_files(manifest.files)
    except ValueError as error:
        raise UnfitAdapterError(str(error)) from None
    _check_sizes(manifest.files, limits, bounds)
    if manifest.base.fingerprint not in {limits.fingerprint, limits.equivalent_to}:
        raise UnfitAdapterError(
            f"the adapter was trained on another base model ({manifest.base.uri}, {manifest.base.fingerprint}) "
            f"than the pool's ({limits.fingerprint})"
        )
    return manifest


def _check_sizes(files: Mapping[str, ArtifactFile], limits: PodLimits, bounds: WeightBounds) -> None:
    for name, maximum in ((ADAPTER_CONFIG, MAX_CONFIG_BYTES), (ADAPTER_WEIGHTS, bounds.size)):
        if files[name].size_bytes > maximum:
            raise UnfitAdapterError(
                f"{name} has {files[name].size_bytes} bytes; an adapter of this base model with the pool's "
                f"engine.maxLoraRank of {limits.max_rank} has at most {maximum}"
            )


def remove_leftovers(adapters: Path) -> None:
    """Remove folders that a killed process was writing or removing."""
    for path in adapters.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder and its contents, if it exists."""
    shutil.rmtree(folder, ignore_errors=True)


def remove_revision(adapters: Path, digest: str) -> None:
    """Remove a revision's files, which no engine reads any more; rename the folder first, so it is never incomplete."""
    leaving = adapters / f"{TEMPORARY}removed-{digest.removeprefix('sha256:')}"
    try:
        adapter_folder(adapters, digest).rename(leaving)
    except FileNotFoundError:
        return
    shutil.rmtree(leaving, ignore_errors=True)


def stored_sizes(adapters: Path, known: Mapping[str, int] | None = None) -> dict[str, int]:
    """Return the bytes of each revision whose checked files are on this pod, by digest.

    Args:
        adapters: folder of the pod's adapters.
        known: result of an earlier call. The files of a revision never change.
    """
    known = known or {}
    with os.scandir(adapters) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    digests = [f"sha256:{name}" for name in names]
    return {digest: known[digest] if digest in known else stored_size(adapters, digest) for digest in digests}


def stored_size(adapters: Path, digest: str) -> int:
    """Return the bytes of a revision's files on this pod."""
    return sum(file.stat().st_size for file in adapter_folder(adapters, digest).iterdir())
