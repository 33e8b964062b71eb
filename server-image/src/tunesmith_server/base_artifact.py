"""Base model that a FineTuneJob has published, with the hashes that its artifact's manifest lists."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from tunesmith.contracts.artifact import MAX_MANIFEST_BYTES, digest_of, merged_files, parse_manifest
from tunesmith.contracts.location import ARTIFACT_FOLDER, ARTIFACT_MANIFEST, MERGED_FOLDER, MERGED_MANIFEST
from tunesmith_server.store import StoreError, StoreFolder

if TYPE_CHECKING:
    from tunesmith.storage.credentials import Credentials
    from tunesmith_server.base_source import BaseFile, BaseSource


class PublishedModel:
    """Folder with the whole model of an artifact: a source that has only the files with the published hashes.

    The digest covers the artifact's manifest, which lists the files of a fully trained model, or has the hash of
    `merged.json`, which lists those of a merged one.

    Args:
        source: the folder of the model.
        uri: its uri, as the operator computes it: the folder `artifact` or `merged` of a job.
        digest: digest of the artifact, from the FineTuneJob's status.
        credentials: credentials of the store.
    """

    def __init__(self, source: BaseSource, uri: str, digest: str, credentials: Credentials) -> None:
        self._source = source
        self._uri = uri.rstrip("/")
        self._digest = digest
        self._credentials = credentials

    def files(self) -> list[BaseFile]:
        """Return the published files."""
        found = [
            replace(file, checksum=self.checksum(file)) for file in self._source.files() if file.name in self._hashes
        ]
        missing = self._hashes.keys() - {file.name for file in found}
        if missing:
            raise StoreError(f"{self._uri} lacks {min(missing)}, which was published with it.", permanent=False)
        return found

    def checksum(self, file: BaseFile) -> str:
        """Return the published SHA-256 of a file."""
        return f"sha256:{self._hashes[file.name]}"

    def read(self, file: BaseFile, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes of a file."""
        return self._source.read(file, offset, length)

    @cached_property
    def _hashes(self) -> dict[str, str]:
        """Published SHA-256 of each file, in hex."""
        folder, _, name = self._uri.rpartition("/")
        artifact = f"{folder}/{ARTIFACT_FOLDER}"
        data = self._read(artifact, ARTIFACT_MANIFEST)
        if digest_of(data) != self._digest:
            raise StoreError(
                f"{artifact}/{ARTIFACT_MANIFEST} has the digest {digest_of(data)}, and the FineTuneJob published "
                f"{self._digest}: the artifact was changed. Train it again.",
                permanent=False,
            )
        try:
            manifest = parse_manifest(data)
            if name != MERGED_FOLDER:
                return {name: file.sha256 for name, file in manifest.files.items()}
            if manifest.merged_sha256 is None:
                raise StoreError(
                    f"{artifact} was published by a release that did not record the hash of its merged model. Train it "
                    "again.",
                    permanent=True,
                )
            merged = self._read(self._uri, MERGED_MANIFEST)
            if hashlib.sha256(merged).hexdigest() != manifest.merged_sha256:
                raise StoreError(f"{self._uri}/{MERGED_MANIFEST} was changed. Train the model again.", permanent=False)
            return merged_files(merged)
        except ValueError as error:
            raise StoreError(f"{artifact}: {error}.", permanent=True) from None

    def _read(self, folder: str, name: str) -> bytes:
        return StoreFolder(folder, self._credentials).read(name, 0, MAX_MANIFEST_BYTES + 1)
