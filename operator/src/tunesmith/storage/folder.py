"""Folders of stores: list, read, write, and create once. All input and output of stores, through fsspec."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import re
import secrets
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from fsspec.implementations.local import LocalFileSystem

from tunesmith.storage.credentials import unusable
from tunesmith.storage.diagnosis import Target, diagnose
from tunesmith.storage.errors import (
    AccessDeniedError,
    FullError,
    InvalidUriError,
    StorageError,
    UnavailableError,
)
from tunesmith.storage.schemes import (
    BY_NAME,
    SCHEMES,
    Client,
    Use,
    precondition_failed,
    split,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tunesmith.storage.credentials import Credentials
    from tunesmith.storage.schemes import Scheme

T = TypeVar("T")

CHUNK_BYTES = 8 * 2**20
"""Bytes per request of a download."""
_WRITE_CHECK = "tunesmith-write-check"


class RefusedConnection(Protocol):
    """Refused connection, with the reason."""

    explanation: str


@dataclass(frozen=True)
class Retry:
    """Retry policy for outages of a store: pauses of 1, 2, 4 … seconds, at most `longest` each."""

    attempts: int = 8
    first: float = 1.0
    longest: float = 30.0

    def pauses(self) -> Iterator[float]:
        """Return the seconds before each retry."""
        return (min(self.first * 2**number, self.longest) for number in range(self.attempts - 1))


ONE_TRY = Retry(attempts=1)


def _no_refusal(_: BaseException) -> RefusedConnection | None:
    return None


def _no_report(_: str | None) -> None:
    return None


def _unchanged(error: StorageError) -> Exception:
    return error


@dataclass(frozen=True)
class Access:
    """Settings of all calls to a store.

    Attributes:
        retry: retry policy for outages.
        refusal: returns the refused connection among the causes of an error, if a guard refuses some.
        waiting: called with the message about an outage before each pause, and with None once the store responds again.
        client: settings of the libraries' clients.
        native: True if obstore makes the requests, bypassing any guard; only for users' own machines.
        failure: returns the exception that the caller gets for a StorageError.
    """

    retry: Retry = field(default_factory=Retry)
    refusal: Callable[[BaseException], RefusedConnection | None] = _no_refusal
    waiting: Callable[[str | None], None] = _no_report
    client: Client = field(default_factory=Client)
    native: bool = False
    failure: Callable[[StorageError], Exception] = _unchanged


def attempt(
    operation: Callable[[], T], diagnosis: Callable[[Exception, int], StorageError], access: Access, server: str
) -> T:
    """Return the operation's result; retry it after temporary failures of the store.

    Args:
        operation: raises exceptions of the store's library, or StorageErrors.
        diagnosis: translates an exception of the library, given the number of tries so far.
        access: settings of the calls.
        server: description of the server, for a refused address.

    Raises:
        Exception: the result of `access.failure` for the last StorageError.
    """
    pauses = access.retry.pauses()
    tries = 0
    while True:
        tries += 1
        try:
            result = operation()
        except Exception as error:  # every library has its own exceptions; they are translated here
            refused = access.refusal(error)
            if refused is not None:
                failure: StorageError = AccessDeniedError(f"{server} resolves to {refused.explanation}")
            else:
                failure = error if isinstance(error, StorageError) else diagnosis(error, tries)
            pause = next(pauses, None) if isinstance(failure, UnavailableError | FullError) else None
            if pause is None:
                raise access.failure(failure) from error
            access.waiting(f"{failure}; retrying in {pause:.0f} s")
            time.sleep(pause)
        else:
            if tries > 1:
                access.waiting(None)
            return result


@dataclass(frozen=True)
class StoredFile:
    """File of a folder.

    Attributes:
        name: path in the folder.
        size: size in bytes.
        modified: time of its last change; None if the store does not report it.
        version: value that differs after every write, such as an ETag; empty if the store does not report one.
    """

    name: str
    size: int
    modified: datetime | None = None
    version: str = ""


def open_folder(
    uri: str,
    credentials: Credentials,
    access: Access,
    *,
    what: str = "",
    revision: str | None = None,
    claims: Path | None = None,
    allow_file: bool = False,
) -> Folder:
    """Return the folder at a uri, without reading anything.

    Args:
        uri: uri of the folder.
        credentials: credentials of its store.
        access: settings of the calls.
        what: "the base model", "the data set" or "the artifact", for messages.
        revision: commit, tag or branch of a repository of the Hub.
        claims: local folder with the mounted claims, each under its name; None if there are none.
        allow_file: True if file:// is allowed: in runs without a cluster only.

    Raises:
        Exception: the result of `access.failure` for an InvalidUriError, a CredentialsMissingError or an
            AccessDeniedError.
    """
    try:
        return _open(uri, credentials, access, what=what, revision=revision, claims=claims, allow_file=allow_file)
    except StorageError as error:
        raise access.failure(error) from None


def _open(
    uri: str,
    credentials: Credentials,
    access: Access,
    *,
    what: str,
    revision: str | None,
    claims: Path | None,
    allow_file: bool,
) -> Folder:
    scheme, path = _parse_uri(uri, what, claims is not None, allow_file=allow_file)
    root = None
    if scheme.mounted:
        assert claims is not None  # noqa: S101 - _parse_uri has checked it
        root, path = claims / path.partition("/")[0], str(claims / path)
    elif scheme.keeps_uri:
        path = uri
    elif revision:
        path = _with_revision(path, revision)
    credentials.check_values()
    credentials.check_keys(scheme)
    try:
        filesystem = _filesystem(scheme, credentials, access)
    except ImportError as error:
        raise InvalidUriError(
            f"{_named(what, uri)}: {scheme.name}:// cannot be read, because a library is missing ({error}): install"
            " tunesmith[storage]"
        ) from None
    except (ValueError, TypeError, KeyError):  # without their message, which may contain parts of a key
        if not scheme.credentials:
            raise
        raise AccessDeniedError(unusable(scheme, credentials, scheme.unreadable)) from None
    return Folder(uri, path, scheme, filesystem, credentials, access, what=what, root=root)


def _filesystem(scheme: Scheme, credentials: Credentials, access: Access) -> Any:  # noqa: ANN401 - fsspec has no types
    if access.native and scheme.native is not None:
        from tunesmith.storage.native import NativeFileSystem  # noqa: PLC0415 - not installed in pods

        return NativeFileSystem(scheme.name, scheme.native(credentials.values), access.client)
    kind = getattr(importlib.import_module(scheme.module), scheme.filesystem.rpartition(".")[2])
    options = scheme.options(credentials.values, access.client, ambient=credentials.ambient(scheme))
    return kind(**options, use_listings_cache=False, skip_instance_cache=True)


def _parse_uri(uri: str, what: str, claims: bool, *, allow_file: bool) -> tuple[Scheme, str]:  # noqa: FBT001 - private
    name, path = split(uri)
    scheme = BY_NAME.get(name)
    known = [scheme for scheme in SCHEMES if (claims or not scheme.mounted) and (allow_file or not scheme.local_only)]
    if (
        scheme is None
        or not path.strip("/")
        or scheme.local_only != path.startswith("/")
        or (scheme.mounted and not claims)
    ):
        prefixes = ", ".join(f"{scheme.name}://" for scheme in known)
        raise InvalidUriError(f"the uri {_named(what, uri, of=True)} must begin with {prefixes}, followed by a path")
    if scheme.local_only and not allow_file:
        raise InvalidUriError(
            f"{_named(what, uri)} is a local folder, and file:// is allowed only in runs without a cluster"
            " (tunesmith run): use s3:// or another store"
        )
    if scheme.reserved is not None and re.search(scheme.reserved[0], path):
        raise InvalidUriError(f"the uri {_named(what, uri, of=True)} {scheme.reserved[1]}")
    return scheme, path


def _named(what: str, uri: str, *, of: bool = False) -> str:
    if not what:
        return uri
    return f"{uri} of {what}" if of else f"{what} {uri}"


def _with_revision(path: str, revision: str) -> str:
    parts = path.strip("/").split("/")
    return "/".join([*parts[:1], f"{parts[1]}@{revision}", *parts[2:]]) if len(parts) > 1 else path


class Folder:
    """Folder of a store, or a single file, named by its last part. Every call retries according to `access`.

    Args:
        uri: uri of the folder, for messages.
        path: path of the folder in the file system.
        scheme: scheme of the uri.
        filesystem: the fsspec file system.
        credentials: credentials of the store.
        access: settings of the calls.
        what: "the base model", "the data set" or "the artifact", for messages.
        root: local folder that no link may leave; None if there are no links, or links are unrestricted.
    """

    def __init__(
        self,
        uri: str,
        path: str,
        scheme: Scheme,
        filesystem: Any,  # noqa: ANN401 - fsspec has no types
        credentials: Credentials,
        access: Access,
        *,
        what: str = "",
        root: Path | None = None,
    ) -> None:
        self.uri = uri
        self._path = path.rstrip("/")
        self._scheme = scheme
        self._filesystem = filesystem
        self._credentials = credentials
        self._access = access
        self._what = what
        self._root = root
        self._check_inside(self._path)

    @property
    def local(self) -> Path | None:
        """Path of the folder if it is on the local disk, so that nothing needs to be copied; otherwise None."""
        return Path(self._path) if self._is_local else None

    def files(self) -> list[StoredFile]:
        """Return the files directly in the folder, sorted by name.

        Raises:
            Exception: the folder does not exist, access is denied, or the store is unavailable.
        """
        # Not `find`, which treats an unreadable folder as empty.
        entries = self._attempt(lambda: self._listing("file"))
        return sorted(
            (self._stored(entry, _last(entry)) for entry in entries if entry["name"].rstrip("/") != self._path),
            key=lambda file: file.name,
        )

    def names(self) -> list[str]:
        """Return the names of the files directly in the folder, sorted.

        Raises:
            Exception: as for `files`.
        """
        return [file.name for file in self.files()]

    def folders(self) -> list[str]:
        """Return the names of the folders directly in the folder, sorted; none if it does not exist."""

        def operation() -> list[str]:
            try:
                return self._check_names(_last(entry) for entry in self._listing("directory"))
            except FileNotFoundError:
                return []

        return self._attempt(operation)

    def below(self, pattern: str | None = None) -> list[str]:
        """Return the sorted relative paths of all files in and below the folder, or of those that match a glob."""
        return [file.name for file in self.tree(pattern)]

    def tree(self, pattern: str | None = None) -> list[StoredFile]:
        """Return all files in and below the folder, or those that match a glob, sorted by path.

        The list is empty if the folder does not exist.
        """

        def operation() -> list[StoredFile]:
            self._check_lists()
            self._filesystem.invalidate_cache()
            if pattern is None:
                entries = self._filesystem.find(self._path, detail=True)
            else:
                entries = self._filesystem.glob(f"{self._path}/{pattern}", detail=True)
            prefix = f"{self._path.strip('/')}/"
            files = [
                self._stored(entry, path.lstrip("/").removeprefix(prefix))
                for path, entry in ((path, self._followed(entry)) for path, entry in entries.items())
                if entry["type"] == "file" and path.lstrip("/").startswith(prefix)
            ]
            self._check_names(file.name for file in files)
            return sorted(files, key=lambda file: file.name)

        return self._attempt(operation)

    def check_links(self) -> None:
        """Check every link in and below the folder, before a library opens files in it directly.

        Raises:
            Exception: a link leaves the claim that contains the folder.
        """
        if self._root is not None:
            for path in Path(self._path).rglob("*"):
                if path.is_symlink():
                    self._check_inside(str(path))

    def exists(self, name: str) -> bool:
        """Return True if the file exists."""
        path = self._at(name)
        return self._attempt(lambda: self._path_exists(path), name)

    def is_folder(self, name: str) -> bool:
        """Return True if the name is a folder's.

        Raises:
            Exception: the name does not exist, or is a device or a pipe, access is denied, or the store is unavailable.
        """
        path = self._at(name)

        def operation() -> bool:
            kind = self._info(path)["type"]
            if kind == "other":  # reading it may never end
                raise InvalidUriError(f"{self._where(name)} is neither a file nor a folder: use a file")
            return bool(kind == "directory")

        return self._attempt(operation, name)

    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""
        path = self._at(name)
        return self._attempt(lambda: int(self._filesystem.size(path) or 0), name)

    def checksum(self, name: str) -> str:
        """Return the checksum of a file that the store has computed, `<algorithm>:<hex>`; empty if it has none."""
        path = self._at(name)
        return self._attempt(lambda: self._scheme.checksum(self._filesystem, path), name)

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Return bytes of one file, by a ranged read."""
        path = self._at(name)

        def operation() -> bytes:
            data: bytes = self._filesystem.cat_file(
                path, start=offset or None, end=None if length is None else offset + length
            )
            if length is not None and len(data) > length:
                raise UnavailableError(f"{self._where(name)}: the store sent more bytes than requested")
            return data

        return b"" if length == 0 else self._attempt(operation, name)

    def pieces(self, name: str, size: int, offset: int = 0) -> Iterator[bytes]:
        """Yield the pieces of a file of `size` bytes, with retries between pieces.

        Raises:
            Exception: the file became shorter, or `read` failed.
        """
        while offset < size:
            wanted = min(CHUNK_BYTES, size - offset)
            data = self.read(name, offset, wanted)
            if len(data) != wanted:
                raise self._access.failure(
                    UnavailableError(
                        f"{self._where(name)} has only {offset + len(data)} of {size} bytes: it changed while it"
                        " was read"
                    )
                )
            offset += wanted
            yield data

    def download(self, name: str, target: Path) -> None:
        """Copy one file to the local disk. The target appears once it is complete."""
        partial = target.with_name(f".{target.name}.partial")
        size = self.size(name)
        try:
            with partial.open("wb") as file:
                for data in self.pieces(name, size):
                    file.write(data)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise self._access.failure(
                    FullError(f"the work folder {target.parent} is full: {self._where(name)} needs {size} bytes there")
                ) from None
            raise
        partial.rename(target)

    def upload(self, name: str, source: Path) -> None:
        """Write one file, replacing an existing one."""
        path = self._at(name)

        def operation() -> None:
            self._prepare_writing()
            self._filesystem.put_file(str(source), path)

        self._attempt(operation, name)

    def create(self, name: str, data: bytes) -> bool:
        """Write one small file if it does not exist; return False if it does.

        Stores with conditional writes use them, so that only one of two concurrent writers succeeds.
        """
        path = self._at(name)

        def operation() -> bool:
            if self._path_exists(path):
                return False
            self._prepare_writing()
            try:
                if self._is_local:
                    _write_exclusively(Path(path), data)
                else:
                    self._filesystem.pipe_file(path, data, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                if precondition_failed(error):
                    return False
                raise
            return True

        return self._attempt(operation, name)

    def check_writable(self) -> None:
        """Write an empty file, and remove it if the credentials allow that.

        Raises:
            Exception: the folder is not writable.
        """
        path = self._at(_WRITE_CHECK)

        def operation() -> None:
            self._prepare_writing()
            self._filesystem.pipe_file(path, b"")

        self._attempt(operation)
        with contextlib.suppress(Exception):
            self._filesystem.rm_file(path)

    def remove(self) -> None:
        """Remove the folder and everything in it, if it exists."""

        def operation() -> None:
            self._check_written()
            with contextlib.suppress(FileNotFoundError):
                if self._is_local or not has_magic(self._path):
                    self._filesystem.rm(self._path, recursive=True)
                    return
                for path in self._filesystem.find(self._path):  # `rm` would interpret the name as a pattern
                    self._filesystem.rm_file(path)

        self._attempt(operation)

    def remove_file(self, name: str) -> None:
        """Remove one file in or below the folder, if it exists."""

        def operation() -> None:
            self._check_written()
            with contextlib.suppress(FileNotFoundError):
                self._filesystem.rm_file(f"{self._path}/{name}")

        self._check_names([name])
        self._attempt(operation, name)

    def child(self, name: str = "", *, retry: Retry | None = None) -> Folder:
        """Return a folder in this one, or this one if `name` is empty; `retry` replaces the retry policy."""
        access = self._access if retry is None else replace(self._access, retry=retry)
        return Folder(
            f"{self.uri}/{name}" if name else self.uri,
            self._at(name) if name else self._path,
            self._scheme,
            self._filesystem,
            self._credentials,
            access,
            what=self._what,
            root=self._root,
        )

    @property
    def _is_local(self) -> bool:
        return isinstance(self._filesystem, LocalFileSystem)

    def _listing(self, kind: str) -> list[dict[str, Any]]:
        self._check_lists()
        listed = self._filesystem.ls(self._path, detail=True, **self._scheme.list_options)
        entries = map(self._followed, listed)
        return [entry for entry in entries if entry["type"] == kind and (kind != "file" or entry["name"][-1] != "/")]

    def _followed(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Return the entry of the file or folder that a symbolic link leads to; other entries as they are.

        Raises:
            AccessDeniedError: the link leaves the claim that contains the folder.
        """
        if not entry.get("islink"):
            return entry
        self._require_inside(entry["name"])
        try:
            return self._info(entry["name"])
        except OSError:  # it leads nowhere, or in a circle
            return entry

    def _info(self, path: str) -> dict[str, Any]:
        info: dict[str, Any] = self._filesystem.info(path, **self._scheme.list_options)
        return info

    def _path_exists(self, path: str) -> bool:
        try:
            self._info(path)
        except FileNotFoundError:
            return False
        return True

    def _stored(self, entry: dict[str, Any], name: str) -> StoredFile:
        modified = entry.get("last_modified" if self._access.native else self._scheme.modified)
        if isinstance(modified, int | float):
            modified = datetime.fromtimestamp(modified, UTC)
        return StoredFile(
            name,
            int(entry.get("size") or 0),
            modified if isinstance(modified, datetime) else None,
            str(entry.get(self._scheme.version) or ""),
        )

    def _check_lists(self) -> None:
        if not self._scheme.lists:
            raise InvalidUriError(
                f"{self._where()}: {self._scheme.name}:// names one file, and its folders cannot be listed"
            )

    def _check_written(self) -> None:
        if not (self._is_local or Use.EXPORT in self._scheme.uses):
            raise InvalidUriError(f"{self._where()}: {self._scheme.name}:// cannot be written to")

    def _prepare_writing(self) -> None:
        self._check_written()
        if self._is_local:
            Path(self._path).mkdir(parents=True, exist_ok=True)

    def _at(self, name: str) -> str:
        if "/" in name or name in {"", ".", ".."}:
            raise ValueError(f"{name!r} is not the name of a file in a folder")
        path = f"{self._path}/{name}"
        self._check_inside(path)
        return path

    def _check_inside(self, path: str) -> None:
        try:
            self._require_inside(path)
        except StorageError as error:
            raise self._access.failure(error) from None

    def _require_inside(self, path: str) -> None:
        if self._root is not None and not Path(path).resolve().is_relative_to(self._root.resolve()):
            raise AccessDeniedError(
                f"{self._where()}: {Path(path).name} is outside of the claim through a symbolic link: copy the"
                " linked files into the claim"
            )

    def _check_names(self, paths: Iterable[str]) -> list[str]:
        """Return the paths that a store listed, sorted, after checking that they are inside the folder."""
        found = sorted(paths)
        for path in found:
            if not {".", ".."}.isdisjoint(path.split("/")):
                raise AccessDeniedError(
                    f"{self._where()}: the store lists {path!r}, which is outside of the folder: remove it, or"
                    " use another folder"
                )
        return found

    def _where(self, name: str = "") -> str:
        # A folder that represents a single file has that file's uri.
        uri = self.uri if not name or self.uri.endswith(f"/{name}") else f"{self.uri}/{name}"
        return _named(self._what, uri)

    def _attempt(self, operation: Callable[[], T], name: str = "") -> T:
        where = self._where(name)
        endpoint = self._scheme.endpoint_of(self._credentials.values)
        server = f"{endpoint[0]} of {self._credentials.source_of(endpoint[0])}, for {where}," if endpoint else where
        target = Target(where, self._path.split("/", 1)[0], self._scheme, self._credentials)
        return attempt(operation, lambda error, tries: diagnose(error, target, tries), self._access, server)


def _last(entry: dict[str, Any]) -> str:
    return str(entry["name"]).rstrip("/").rsplit("/", 1)[-1]


def _write_exclusively(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        whole.write_bytes(data)
        os.link(whole, path)  # the name appears with its complete content, or not at all
    finally:
        whole.unlink(missing_ok=True)
