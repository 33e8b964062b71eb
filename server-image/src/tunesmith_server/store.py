"""Access to stores for the agent: with one mounted Secret, without retries, and with messages for conditions."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tunesmith.api.credentials import STORE_SECRET
from tunesmith.contracts.connections import refused_connection
from tunesmith.storage.credentials import Credentials, Origin, Scrubber, read_secret
from tunesmith.storage.errors import InvalidUriError, StorageError, UnavailableError
from tunesmith.storage.folder import ONE_TRY, Access, Retry, open_folder
from tunesmith.storage.schemes import Client

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tunesmith.storage.folder import StoredFile

_CLIENT = Client(connect_seconds=5, read_seconds=30, read_only=True)
_PROXIES = frozenset({"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"})


class StoreError(Exception):
    """The store does not provide the requested object.

    `permanent`: retrying does not help. Missing objects and refused credentials are not permanent: somebody may upload
    the object or change the credentials. `outage`: the store could not be reached, or failed.
    """

    def __init__(self, message: str, *, permanent: bool, outage: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent
        self.outage = outage


def read_credentials(folder: Path) -> Credentials:
    """Read a mounted Secret: each key is a file, and the folder is named after the Secret.

    Raises:
        StoreError: the folder cannot be read.
    """
    try:
        values, written = read_secret(folder)
    except OSError as error:
        message = f"The Secret mounted at {folder} cannot be read: {error.strerror}."
        raise StoreError(message, permanent=False) from None
    version = (
        "which does not exist or is empty"
        if written is None
        else f"as written to the pod at {written:%Y-%m-%d %H:%M:%S} UTC"
    )
    origin = Origin.STORE_SECRET if folder.name == STORE_SECRET else Origin.SECRET
    return Credentials(values, f"the Secret {folder.name}{',' if written is None else ''} {version}", origin)


def set_proxies(credentials: Credentials) -> None:
    """Set the proxies of a Secret in this process's environment, where libraries expect them."""
    os.environ.update({name: value for name, value in credentials.values.items() if name.upper() in _PROXIES})


def store_error(error: StorageError, credentials: Credentials) -> StoreError:
    """Return the agent's error for a storage error, without credentials in its message."""
    text = Scrubber(credentials.values).clean(f"{error}.")
    outage = isinstance(error, UnavailableError)
    return StoreError(text, permanent=isinstance(error, InvalidUriError), outage=outage)


class StoreFolder:
    """A folder of an object store, read with one set of credentials.

    Args:
        uri: URI such as s3://bucket/folder.
        credentials: credentials of the store.
        retry: retry policy for outages.
        s3_session: session of the S3 library; None: a new one.

    Raises:
        StoreError: the URI is not supported, or the credentials cannot be used.
    """

    def __init__(
        self,
        uri: str,
        credentials: Credentials,
        retry: Retry = ONE_TRY,
        s3_session: Any = None,  # noqa: ANN401 - aiobotocore has no types
    ) -> None:
        self.uri = uri.rstrip("/")
        client = replace(_CLIENT, s3_session=s3_session)
        access = Access(
            retry, refusal=refused_connection, client=client, failure=lambda error: store_error(error, credentials)
        )
        self._folder = open_folder(self.uri, credentials, access)

    def list(self) -> list[StoredFile]:
        """Return the files directly in the folder, sorted by name.

        Raises:
            StoreError: the folder is missing or empty, or may not be read, or the store cannot be reached.
        """
        files = self._folder.files()
        if not files:
            message = f"{self.uri} does not exist or contains no files: check the uri and the bucket."
            raise StoreError(message, permanent=False)
        return files

    def size(self, name: str) -> int:
        """Return the size of a file in bytes.

        Raises:
            StoreError: the file is missing or may not be read, or the store cannot be reached.
        """
        return self._folder.size(name)

    def checksum(self, name: str) -> str:
        """Return the checksum of a file by the store, `<algorithm>:<hex>`; empty if it has none.

        Raises:
            StoreError: the file is missing or may not be read, or the store cannot be reached.
        """
        return self._folder.checksum(name)

    def read(self, name: str, start: int, end: int) -> bytes:
        """Return the bytes of a file from `start` to `end`, or up to the end of the file.

        Raises:
            StoreError: the file is missing or may not be read, or the store cannot be reached.
        """
        return self._folder.read(name, start, end - start)

    def download(self, name: str, target: Path, size: int, progress: Callable[[int], None] = lambda _: None) -> str:
        """Write a file of `size` bytes to `target` and return its SHA-256 in hex.

        `progress` is called with the size of every piece, in bytes.

        Raises:
            StoreError: the file is missing, has another size or may not be read, or the store cannot be reached.
        """
        digest = hashlib.sha256()
        actual = self.size(name)
        if actual != size:
            raise StoreError(f"{self.uri}/{name} has {actual} bytes instead of {size}.", permanent=True)
        with target.open("xb") as file:
            for piece in self._folder.pieces(name, size):
                digest.update(piece)
                file.write(piece)
                progress(len(piece))
            file.flush()
            os.fsync(file.fileno())
        return digest.hexdigest()
