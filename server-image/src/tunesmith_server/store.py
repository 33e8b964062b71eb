"""Reading object stores through fsspec: s3://, gs:// and az://."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import fsspec

from tunesmith.contracts.connections import refusal
from tunesmith.storage.credentials import Scrubber, malformed
from tunesmith.storage.schemes import GOOGLE_KEY, parse_service_account

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

CHUNK_BYTES = 8 * 1024 * 1024
"""Bytes per request to the store."""
CONNECT_SECONDS = 5
READ_SECONDS = 30
_KEYS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "az": "AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
_BAD_CREDENTIALS = ("forbidden:", "credential", "access key")
_VERSION_LINK = "..data"
"""Link that the kubelet points to a new folder, named by the time, whenever it writes a changed Secret."""
_VERSION_FORMAT = "..%Y_%m_%d_%H_%M_%S"
_PROXIES = frozenset({"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"})
_MAX_VALUE_BYTES = 1024 * 1024


class StoreError(Exception):
    """The store does not give what was asked for.

    `permanent`: trying again cannot help. Missing objects and refused credentials are not permanent: somebody may
    upload the one and change the other.
    """

    def __init__(self, message: str, *, permanent: bool) -> None:
        super().__init__(message)
        self.permanent = permanent


@dataclass(frozen=True)
class StoredFile:
    """A file of a folder: its name without the folder, and its size in bytes."""

    name: str
    size: int


@dataclass(frozen=True)
class StoreCredentials:
    """Values of a Secret.

    Attributes:
        values: by the names of its keys.
        origin: the Secret's name and version, for messages, such as "the Secret tunesmith-store, written at …".
    """

    values: Mapping[str, str]
    origin: str

    def set_proxies(self) -> None:
        """Let this process use the proxies of the Secret, as libraries expect them: in the environment."""
        os.environ.update({name: value for name, value in self.values.items() if name.upper() in _PROXIES})


def read_credentials(folder: Path) -> StoreCredentials:
    """Read a mounted Secret: each key is a file, and the folder has the Secret's name.

    The version is the time at which the kubelet wrote the files: an older one than that of the Secret's last change
    (`kubectl get secret NAME --show-managed-fields`) is the Secret as it was before. The kubelet writes changes within
    about two minutes.

    Raises:
        StoreError: the folder cannot be read.
    """
    try:
        version = folder / _VERSION_LINK
        current = version.resolve(strict=True) if version.is_symlink() else folder
        values = {
            entry.name: entry.read_bytes()[:_MAX_VALUE_BYTES].decode(errors="replace").strip()
            for entry in current.iterdir()
            if entry.is_file()
        }
        written = _written(current)
    except OSError as error:
        message = f"The Secret mounted at {folder} cannot be read: {error.strerror}."
        raise StoreError(message, permanent=False) from None
    if not values:
        return StoreCredentials({}, f"the Secret {folder.name}, which does not exist or is empty")
    return StoreCredentials(
        values, f"the Secret {folder.name} as written to the pod at {written:%Y-%m-%d %H:%M:%S} UTC"
    )


def scrubber_of(credentials: StoreCredentials) -> Scrubber:
    """Return what removes the credentials from what libraries say.

    Raises:
        StoreError: a value is malformed: libraries would put it into their errors in forms of their own.
    """
    for key, value in credentials.values.items():
        sentence = malformed(key, value, credentials.origin)
        if sentence is not None:
            raise StoreError(f"{sentence}.", permanent=False)
    return Scrubber(credentials.values)


def _written(folder: Path) -> datetime:
    try:
        return datetime.strptime(folder.name.rpartition(".")[0], _VERSION_FORMAT).replace(tzinfo=UTC)
    except ValueError:  # not the kubelet's
        return datetime.fromtimestamp(max(entry.stat().st_mtime for entry in [folder, *folder.iterdir()]), UTC)


def _endpoint(secret: Mapping[str, str]) -> str | None:
    return secret.get("AWS_ENDPOINT_URL") or secret.get("AWS_ENDPOINT_URL_S3")


def _options(scheme: str, secret: Mapping[str, str]) -> dict[str, Any]:
    if scheme == "s3":
        return {
            "key": secret.get("AWS_ACCESS_KEY_ID"),
            "secret": secret.get("AWS_SECRET_ACCESS_KEY"),
            "token": secret.get("AWS_SESSION_TOKEN"),
            "endpoint_url": _endpoint(secret),
            "client_kwargs": {"region_name": secret.get("AWS_REGION") or "us-east-1"},
            "config_kwargs": {
                "connect_timeout": CONNECT_SECONDS,
                "read_timeout": READ_SECONDS,
                "retries": {"max_attempts": 2},
                # The environment's, which is another store's where there is a Secret; else it is given above.
                "ignore_configured_endpoint_urls": True,
            },
        }
    if scheme == "gs":
        return {"token": _service_account(secret), "access": "read_only"}
    if scheme == "az":
        return _azure_options(secret)
    raise StoreError(f"Locations of the kind {scheme}:// are not read: use s3://, gs:// or az://.", permanent=True)


def _azure_options(secret: Mapping[str, str]) -> dict[str, str | None]:
    """The account as a connection string, over which the library puts nothing out of the environment."""
    connection = secret.get("AZURE_STORAGE_CONNECTION_STRING")
    name, key = secret.get("AZURE_STORAGE_ACCOUNT_NAME"), secret.get("AZURE_STORAGE_ACCOUNT_KEY")
    if not connection and name and key:
        connection = (
            f"DefaultEndpointsProtocol=https;AccountName={name};AccountKey={key};EndpointSuffix=core.windows.net"
        )
    return {"account_name": name, "account_key": key, "connection_string": connection}


def _service_account(secret: Mapping[str, str]) -> dict[str, Any] | None:
    """The key of a service account, from the JSON file that Google gives; None: what Google's libraries find."""
    text = secret.get(GOOGLE_KEY)
    if not text:
        return None
    try:
        return parse_service_account(text)
    except ValueError:
        message = f"{GOOGLE_KEY} is no key of a service account: put the JSON file there, whole and as Google gives it."
        raise StoreError(message, permanent=False) from None


def _filesystem(scheme: str, secret: Mapping[str, str]) -> Any:  # noqa: ANN401 - fsspec has no types
    options = _options(scheme, secret) | {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme != "gs":
        try:
            return fsspec.filesystem(scheme, **options)
        except (ValueError, TypeError):  # nothing of what they say, it may hold parts of a key
            message = (
                f"The credentials for {scheme}:// are in a form that cannot be used: check {_KEYS[scheme]}, each whole"
                " and as the store gives it."
            )
            raise StoreError(message, permanent=False) from None
    # Not the class that fsspec knows: it asks over gRPC for features that nothing here uses.
    from gcsfs.core import GCSFileSystem  # noqa: PLC0415

    try:
        return GCSFileSystem(**options)
    except (ValueError, KeyError):  # nothing of what they say, it may hold parts of the key
        message = f"{GOOGLE_KEY} is no key that can be used: put the JSON file there, whole and as Google gives it."
        raise StoreError(message, permanent=False) from None


class StoreFolder:
    """A folder of an object store, read with one set of credentials.

    Args:
        uri: s3://bucket/folder, gs://… or az://….
        credentials: of the store.

    Raises:
        StoreError: the scheme is not one of these, or the credentials cannot be used.
    """

    def __init__(self, uri: str, credentials: StoreCredentials) -> None:
        self.uri = uri.rstrip("/")
        self._origin = credentials.origin
        self._scrubber = scrubber_of(credentials)
        scheme, _, self._path = self.uri.partition("://")
        self._files = _filesystem(scheme, credentials.values)
        endpoint = scheme == "s3" and _endpoint(credentials.values)
        self._named_by = f"AWS_ENDPOINT_URL of {credentials.origin}, for " if endpoint else ""

    def list(self) -> list[StoredFile]:
        """The files right in the folder, sorted by name.

        Raises:
            StoreError: the folder is missing or empty, or may not be read, or the store cannot be reached.
        """
        # Not `find`, which takes a folder that it may not read for an empty one.
        found = self._ask("", lambda: self._files.ls(self._path, detail=True))
        files = [
            StoredFile(PurePosixPath(entry["name"]).name, int(entry["size"]))
            for entry in found
            if entry["type"] == "file" and not entry["name"].endswith("/")
        ]
        if not files:
            message = f"{self.uri} is missing or holds no files. Check the location's spelling and the bucket."
            raise StoreError(message, permanent=False)
        return sorted(files, key=lambda file: file.name)

    def size(self, name: str) -> int:
        """Size of a file in bytes.

        Raises:
            StoreError: it is missing, may not be read, or the store cannot be reached.
        """
        return int(self._ask(name, lambda: self._files.size(f"{self._path}/{name}")))

    def read(self, name: str, start: int, end: int) -> bytes:
        """Bytes of a file from `start` to `end`, or as many as there are.

        Raises:
            StoreError: it is missing, may not be read, or the store cannot be reached.
        """
        data: bytes = self._ask(name, lambda: self._files.cat_file(f"{self._path}/{name}", start=start, end=end))
        if len(data) > end - start:
            raise StoreError(f"{self.uri}/{name}: the store sent more than it was asked for.", permanent=False)
        return data

    def download(self, name: str, target: Path, size: int, progress: Callable[[int], None] = lambda _: None) -> str:
        """Write a file of `size` bytes to `target`; `progress` gets the bytes of every piece. Returns its SHA-256, hex.

        Raises:
            StoreError: it is missing, has another size, may not be read, or the store cannot be reached.
        """
        digest = hashlib.sha256()
        actual = self.size(name)
        if actual != size:
            raise StoreError(f"{self.uri}/{name} has {actual} bytes instead of {size}.", permanent=True)
        with target.open("xb") as file:
            for start in range(0, size, CHUNK_BYTES):
                piece = self.read(name, start, min(size, start + CHUNK_BYTES))
                if len(piece) != min(size, start + CHUNK_BYTES) - start:
                    raise StoreError(f"{self.uri}/{name} became shorter while it was read.", permanent=False)
                digest.update(piece)
                file.write(piece)
                progress(len(piece))
            file.flush()
            os.fsync(file.fileno())
        return digest.hexdigest()

    def _ask(self, name: str, request: Callable[[], Any]) -> Any:  # noqa: ANN401 - what fsspec returns
        location = f"{self.uri}/{name}".rstrip("/")
        try:
            return request()
        except FileNotFoundError:
            message = f"{location} does not exist. Check the location's spelling and the bucket."
            raise StoreError(message, permanent=False) from None
        except Exception as error:  # noqa: BLE001
            # Every SDK has exceptions of its own, without a common base; each means: not answered.
            refused = refusal(error)
            if refused is not None:
                message = f"{self._named_by}{location} leads to {refused.explanation}."
            elif isinstance(error, PermissionError) or any(words in str(error).lower() for words in _BAD_CREDENTIALS):
                message = (
                    f"Access to {location} was denied ({error}) with {self._origin}. Check the keys of the Secret."
                )
            else:
                message = f"{location} could not be read: {type(error).__name__}: {error}."
            raise StoreError(self._scrubber.clean(message), permanent=False) from None
