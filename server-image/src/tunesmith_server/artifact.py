"""Bringing an artifact from the store to the engine's folder: nothing lies there that was not checked."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from pydantic import ValidationError

from tunesmith.contracts.artifact import ArtifactManifest, digest_of
from tunesmith.contracts.location import ARTIFACT_MANIFEST, engine_name, namespace_of_artifact
from tunesmith_server.lora import CONFIG, WEIGHTS, UnfitAdapterError, check_config, check_weights
from tunesmith_server.store import StoreFolder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tunesmith.contracts.agent import DesiredAdapter

MAX_MANIFEST_BYTES = 1024 * 1024
MAX_FILES = 64
ALLOWED_SUFFIXES = frozenset({".json", ".jsonl", ".jinja", ".txt", ".model", ".md", ".csv", ".png"})
"""What may lie in an artifact beside its weights: nothing that is code when it is loaded."""
TEMPORARY = ".incoming-"
"""Prefix of folders that are still being filled."""


@dataclass(frozen=True)
class PodLimits:
    """What an adapter must fit.

    Attributes:
        store: the store's uri; artifacts elsewhere are refused.
        fingerprint: of the pod's base model.
        base: shapes of the base model's tensors by name.
        max_rank: highest LoRA rank that the engine takes.
    """

    store: str
    fingerprint: str
    base: dict[str, tuple[int, ...]]
    max_rank: int


def adapter_folder(adapters: Path, digest: str) -> Path:
    """Where the files of a revision lie: the folder of its digest."""
    return adapters / digest.removeprefix("sha256:")


def check_location(adapter: DesiredAdapter, store: str) -> None:
    """Check that a revision's name belongs to its digest, and its location to its namespace's part of the store.

    Raises:
        UnfitAdapterError: one of them does not hold.
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
    secret: Mapping[str, str],
    progress: Callable[[int], None] = lambda _: None,
) -> Path:
    """Download, check and place the artifact of a revision; its folder.

    Raises:
        UnfitAdapterError: the artifact is damaged, unsafe, or does not fit this pod.
        StoreError: the store does not give it.
        OSError: it cannot be written here.
    """
    target = adapter_folder(adapters, adapter.digest)
    if target.exists():
        return target
    check_location(adapter, limits.store)
    folder = StoreFolder(adapter.uri, secret)
    manifest_bytes = folder.read(ARTIFACT_MANIFEST, MAX_MANIFEST_BYTES)
    manifest = check_manifest(manifest_bytes, adapter.digest, limits)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=adapters) as name:
        incoming = Path(name) / "artifact"
        incoming.mkdir()
        for file, entry in manifest.files.items():
            if folder.download(file, incoming / file, entry.size_bytes, progress) != entry.sha256:
                raise UnfitAdapterError(
                    f"{file} was changed after the artifact was published: its SHA-256 is not the manifest's"
                )
        (incoming / ARTIFACT_MANIFEST).write_bytes(manifest_bytes)
        config = check_config((incoming / CONFIG).read_bytes(), max_rank=limits.max_rank)
        if config.rank != manifest.adapter.rank:
            raise UnfitAdapterError(f"{CONFIG} has rank {config.rank} and {ARTIFACT_MANIFEST} {manifest.adapter.rank}")
        check_weights(incoming / WEIGHTS, config, limits.base)
        incoming.rename(target)
    return target


def check_manifest(document: bytes, digest: str, limits: PodLimits) -> ArtifactManifest:
    """The checked `tunesmith.json`.

    Raises:
        UnfitAdapterError: its digest is not the wanted one; it is malformed; it lists files that an artifact must not
            have, or lacks those that it must have; it is of another base model.
    """
    actual = digest_of(document)
    if actual != digest:
        raise UnfitAdapterError(
            f"{ARTIFACT_MANIFEST} was changed after the artifact was published: its digest is {actual}"
        )
    try:
        manifest = ArtifactManifest.model_validate_json(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise UnfitAdapterError(f"{ARTIFACT_MANIFEST} is malformed: {place}: {first['msg']}") from None
    if len(manifest.files) > MAX_FILES:
        raise UnfitAdapterError(f"{ARTIFACT_MANIFEST} lists {len(manifest.files)} files, more than {MAX_FILES}")
    for name in manifest.files:
        if name != PurePosixPath(name).name or name.startswith(".") or name == ARTIFACT_MANIFEST:
            raise UnfitAdapterError(f"{ARTIFACT_MANIFEST} lists {name!r}, which is no plain file name")
        if name != WEIGHTS and PurePosixPath(name).suffix not in ALLOWED_SUFFIXES:
            raise UnfitAdapterError(
                f"{ARTIFACT_MANIFEST} lists {name!r}; weights travel as {WEIGHTS} only, never as code or pickle"
            )
    if missing := {CONFIG, WEIGHTS} - set(manifest.files):
        raise UnfitAdapterError(f"the artifact has no {' and no '.join(sorted(missing))}")
    if manifest.base.fingerprint != limits.fingerprint:
        raise UnfitAdapterError(
            f"the adapter was trained on another base model ({manifest.base.uri}, {manifest.base.fingerprint}) "
            f"than the pool's ({limits.fingerprint})"
        )
    return manifest


def remove_leftovers(adapters: Path) -> None:
    """Remove folders that a killed process was still filling."""
    for path in adapters.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def stored_digests(adapters: Path) -> set[str]:
    """Digests of the revisions whose checked files are here."""
    return {f"sha256:{path.name}" for path in adapters.iterdir() if path.is_dir() and not path.name.startswith(".")}
