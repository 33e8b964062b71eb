"""Sources of base models: their files with versions and checksums, and ranges of their bytes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urljoin, urlsplit

import httpx
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from tunesmith.contracts.connections import refused_connection
from tunesmith.storage.credentials import Credentials, Scrubber
from tunesmith.storage.errors import StorageError
from tunesmith.storage.folder import Retry
from tunesmith.storage.hub import hub_client
from tunesmith_server.store import StoreError, StoreFolder, store_error

if TYPE_CHECKING:
    from huggingface_hub import HfApi

HUB = "hf://"
_RETRY = Retry(attempts=5, longest=15)
_HUB_TIMEOUT = httpx.Timeout(30, connect=5)
_MAX_HUB_FILES = 10_000
_PARTIAL = 206
_MAX_RENEWALS = 20
_EXPIRED = frozenset({400, 401, 403, 404, 410})
"""Statuses of a server of files for an address whose signature has expired."""
_REFUSED = frozenset(range(400, 500)) - {408, 429}


@dataclass(frozen=True)
class BaseFile:
    """File of a base model at its source.

    Attributes:
        name: its name.
        size: size in bytes.
        version: value that differs after every write; empty if the source does not report one.
        checksum: checksum by the source, `<algorithm>:<hex>`; empty: not known, or not asked for yet.
    """

    name: str
    size: int
    version: str = ""
    checksum: str = ""


class BaseSource(Protocol):
    """Folder with a base model. All methods block, and may be called from several threads."""

    def files(self) -> list[BaseFile]:
        """Return the files directly in the folder.

        Raises:
            StoreError: the folder is missing or empty, or may not be read, or the source cannot be reached.
        """

    def checksum(self, file: BaseFile) -> str:
        """Return the checksum of a file by the source, `<algorithm>:<hex>`; empty if it has none.

        Raises:
            StoreError: the source does not provide the file.
        """

    def read(self, file: BaseFile, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes of a file.

        Raises:
            StoreError: the source does not provide them.
        """


def open_source(uri: str, revision: str | None, credentials: Credentials) -> BaseSource:
    """Return the source of a uri such as s3://bucket/folder or hf://org/name.

    Raises:
        StoreError: the uri is not supported, or the credentials cannot be used.
    """
    if uri.startswith(HUB):
        return HubSource(uri, revision, credentials)
    return StoreSource(uri, credentials)


class StoreSource:
    """Folder of an object store."""

    def __init__(self, uri: str, credentials: Credentials) -> None:
        self._uri = uri.rstrip("/")
        self._listing = StoreFolder(uri, credentials)
        self._folder = StoreFolder(uri, credentials, _RETRY)

    def files(self) -> list[BaseFile]:
        """Return the files directly in the folder."""
        return [BaseFile(file.name, file.size, file.version) for file in self._listing.list()]

    def checksum(self, file: BaseFile) -> str:
        """Return the checksum of a file by the store."""
        return self._folder.checksum(file.name)

    def read(self, file: BaseFile, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes of a file."""
        data = self._folder.read(file.name, offset, offset + length)
        if len(data) != length:
            raise _changed(f"{self._uri}/{file.name}")
        return data


class HubSource:
    """Repository of the Hugging Face Hub at one commit, which the first listing resolves."""

    def __init__(self, uri: str, revision: str | None, credentials: Credentials) -> None:
        self._uri = uri
        self._repository = uri.removeprefix(HUB).strip("/")
        self._revision = revision
        self._credentials = credentials
        self._commit: str | None = revision
        self._locations: dict[str, str] = {}
        try:
            self._hub: HfApi = hub_client(credentials)
        except StorageError as error:
            raise store_error(error, credentials) from None

    def files(self) -> list[BaseFile]:
        """Return the files directly in the repository."""
        try:
            found = self._hub.model_info(self._repository, revision=self._revision, files_metadata=True)
        except Exception as error:  # noqa: BLE001 - unknown ones are raised again
            raise self._error(error) from None
        self._commit = found.sha
        files = [entry for entry in found.siblings or [] if "/" not in entry.rfilename][:_MAX_HUB_FILES]
        return [
            BaseFile(
                entry.rfilename,
                entry.size or 0,
                entry.blob_id or f"{found.sha}",
                f"sha256:{entry.lfs.sha256}" if entry.lfs is not None else "",
            )
            for entry in files
        ]

    def checksum(self, file: BaseFile) -> str:
        """Return the SHA-256 of a file in Git LFS."""
        return file.checksum

    def read(self, file: BaseFile, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes of a file."""
        pauses, renewals = _RETRY.pauses(), _MAX_RENEWALS
        while True:
            is_known = file.name in self._locations
            try:
                return self._range(file, offset, length)
            except Exception as error:  # noqa: BLE001 - unknown ones are raised again
                failure = self._error(error)
                self._locations.pop(file.name, None)
                if is_known and _status(error) in _EXPIRED and renewals:
                    renewals -= 1
                    continue
                pause = next(pauses, None) if failure.outage else None
                if pause is None:
                    raise failure from None
                time.sleep(pause)

    def _range(self, file: BaseFile, offset: int, length: int) -> bytes:
        """Read from where the Hub redirects to, so that it is asked once per file and not once per range."""
        address = self._hub_address(file.name)
        location = self._locations.get(file.name)
        if location is None:
            found = self._hub.get_hf_file_metadata(url=address, timeout=_HUB_TIMEOUT.connect)
            location = self._locations[file.name] = urljoin(address, found.location)
        headers = {"Range": f"bytes={offset}-{offset + length - 1}", "Accept-Encoding": "identity"}
        if urlsplit(location).netloc == urlsplit(address).netloc:
            headers = build_hf_headers(token=self._hub.token) | headers
        data = bytearray()
        with get_session().stream("GET", location, headers=headers, timeout=_HUB_TIMEOUT) as answer:
            hf_raise_for_status(answer)
            if answer.status_code != _PARTIAL:
                host = urlsplit(location).netloc
                raise StoreError(
                    f"{self._uri}: {host} does not support range requests. Use the Hub, or a mirror that does.",
                    permanent=True,
                )
            for piece in answer.iter_raw():
                data += piece
                if len(data) > length:
                    raise StoreError(f"{self._uri}/{file.name}: more bytes than requested were sent.", permanent=False)
        if len(data) != length:
            raise _changed(f"{self._uri}/{file.name}")
        return bytes(data)

    def _hub_address(self, name: str) -> str:
        from huggingface_hub import hf_hub_url  # noqa: PLC0415 - a lazy attribute of the package

        return str(hf_hub_url(self._repository, name, revision=self._commit, endpoint=self._hub.endpoint))

    def _error(self, error: Exception) -> StoreError:
        if isinstance(error, StoreError):
            return error
        if isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError)):
            what = f"{self._uri}, revision {self._revision or 'main'}"
            hint = "Check its name, and HF_TOKEN of the Secret if it is private or gated"
            if isinstance(error, GatedRepoError):
                hint = "It is gated: accept its terms and put HF_TOKEN into the Secret"
            source = self._credentials.source
            message = f"{what} does not exist on the Hub, or this token has no access to it ({source}). {hint}."
            return StoreError(message, permanent=False)
        refused = refused_connection(error)
        if refused is not None:
            return StoreError(f"{self._uri} resolves to {refused.explanation}.", permanent=False)
        if not isinstance(error, (HfHubHTTPError, httpx.HTTPError, OSError)):
            raise error
        text = Scrubber(self._credentials.values).clean(f"{self._uri} could not be read from the Hub: {error}.")
        return StoreError(text, permanent=False, outage=_status(error) not in _REFUSED)


def _status(error: Exception) -> int | None:
    """Return the status of the response that an exception of the Hub's client is about; None if there was none."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _changed(name: str) -> StoreError:
    return StoreError(f"{name} became shorter while it was read.", permanent=False)
