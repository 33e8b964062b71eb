"""All input and output on stores: S3, Hugging Face, Google Cloud, Azure, mounted claims and, in local runs, files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import time
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)
from fsspec.implementations.local import LocalFileSystem

from tunesmith.contracts.location import claim_path
from tunesmith_trainer import google_cloud
from tunesmith_trainer.connections import denied
from tunesmith_trainer.credentials import check_keys, check_values, filesystem, read_secrets
from tunesmith_trainer.errors import (
    AccessDeniedError,
    InvalidSpecError,
    SecretNotFoundError,
    StorageUnavailableError,
    TrainerError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

T = TypeVar("T")
log = logging.getLogger(__name__)

_CHUNK = 8 * 2**20
_WRITE_CHECK = "tunesmith-write-check"
_SCHEMES = ("hf", "s3", "gs", "az", "pvc", "file")
_NO_NAMES = {
    "s3": (
        re.compile(r"\?versionId="),
        "names a version, and only the newest can be read: remove ?versionId=… from it",
    ),
    "az": (re.compile(r"[?#]"), "has a '?' or '#', which cannot be read there: give what it names another name"),
}
"""By scheme, what its library takes for something else than a part of a name."""
# Codes that botocore hands through and s3fs does not translate to PermissionError.
_DENIED_CODES = frozenset(
    {
        "XAdminUserNotFound",
        "SignatureDoesNotMatch",
        "InvalidAccessKeyId",
        "AccessDenied",
        "ExpiredToken",
        "403",
        "401",
        "InvalidToken",
    }
)
_DENIED_STATUS = frozenset({401, 403})


@dataclass(frozen=True)
class Retry:
    """How long an outage of a store is waited out: pauses of 1, 2, 4 … seconds, at most `longest` each."""

    attempts: int = 8
    first: float = 1.0
    longest: float = 30.0

    def pauses(self) -> Iterator[float]:
        """Seconds before each further attempt."""
        return (min(self.first * 2**number, self.longest) for number in range(self.attempts - 1))


ONE_TRY = Retry(attempts=1)
TRAINING_RETRY = Retry(attempts=26, longest=60.0)
"""Twenty minutes, by each attempt of a job in a cluster: what the attempts before it have computed is in the store."""
PUBLISHING_RETRY = Retry(attempts=66, longest=60.0)
"""An hour: what was trained for hours is not given up for a store that is being repaired."""
EXPORTING_RETRY = Retry(attempts=16, longest=60.0)
"""Ten minutes: what was trained is safe in the store by then, and the pod may hold a GPU."""


def attempted(
    operation: Callable[[], T],
    understood: Callable[[Exception], TrainerError],
    retry: Retry,
    name: str,
    server: str | None = None,
) -> T:
    """The operation's result, tried again after failures that are worth it.

    Args:
        operation: what may fail.
        understood: makes the failure out of an exception of any store.
        retry: how long outages are waited out.
        name: of what is not available, for the log.
        server: the setting that names the server, for a refused address; absent: `name`.

    Raises:
        TrainerError: it failed for good, or too often.
    """
    pauses = retry.pauses()
    while True:
        try:
            return operation()
        except TrainerError:
            raise
        except Exception as error:  # every store has exceptions of its own; they end here
            failure = denied(error, server or name) or understood(error)
            pause = next(pauses, None) if failure.retryable else None
            if pause is None:
                raise failure from error
            log.warning("%s is not available: %s; next attempt in %.0f s", name, said(error), pause)
            time.sleep(pause)


class Folder:
    """A folder in a store (or one file of it, named by its last part). Every call waits out short outages.

    Args:
        uri: what the manifest says, for messages.
        filesystem: the fsspec file system.
        path: the folder inside it.
        what: "the base model", "the data set" or "the artifact", for messages.
        credentials: where the credentials come from, for messages.
        missing: raised where something is not there.
        retry: how long outages are waited out.
        root: folder of this machine that no link may lead out of; None where links lead nowhere or anywhere.
    """

    def __init__(
        self,
        *,
        uri: str,
        filesystem: Any,  # noqa: ANN401 - fsspec has no types
        path: str,
        what: str,
        credentials: str,
        missing: type[TrainerError],
        retry: Retry,
        root: Path | None = None,
    ) -> None:
        self.uri = uri
        self._filesystem = filesystem
        self._path = path.rstrip("/")
        self._what = what
        self._credentials = credentials
        self._missing = missing
        self._retry = retry
        self._root = root
        self._stay_inside(self._path)

    @property
    def local(self) -> Path | None:
        """The folder on this machine's disk, where it is one: nothing needs to be copied then."""
        return Path(self._path) if self._is_local else None

    def names(self) -> list[str]:
        """Names of the files directly in the folder, sorted.

        Raises:
            TrainerError: there is no such folder, access is denied, or the store is unavailable.
        """

        def listed() -> list[str]:
            entries = self._filesystem.ls(self._path, detail=True, **self._fresh)
            return self._plain(
                entry["name"].rsplit("/", 1)[-1]
                for entry in entries
                if entry["type"] == "file" and entry["name"].rstrip("/") != self._path
            )

        return self._attempted(listed)

    def check_links(self) -> None:
        """Looks at every link in and below the folder, for what opens files of it by itself.

        Raises:
            AccessDeniedError: one leads out of the claim that the folder is in.
        """
        if self._root is not None:
            for path in Path(self._path).rglob("*"):
                if path.is_symlink():
                    self._stay_inside(str(path))

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes of one file, by a ranged read."""
        place = self._at(name)

        def got() -> bytes:
            data: bytes = self._filesystem.cat_file(
                place, start=offset or None, end=None if length is None else offset + length
            )
            return data

        return b"" if length == 0 else self._attempted(got)

    def exists(self, name: str) -> bool:
        """Whether the file is there."""
        place = self._at(name)

        def looked() -> bool:
            try:
                self._filesystem.info(place, **self._fresh)
            except FileNotFoundError:
                return False
            return True

        return self._attempted(looked)

    def download(self, name: str, target: Path) -> None:
        """Copies one file to this machine, going on where an outage cut it off. The target appears when it is whole."""
        partial = target.with_name(f".{target.name}.partial")
        partial.unlink(missing_ok=True)

        place = self._at(name)

        def size_of() -> int:
            return int(self._filesystem.size(place) or 0)

        size = self._attempted(size_of)
        while (done := partial.stat().st_size if partial.exists() else 0) < size or not partial.exists():
            data = self.read(name, done, min(_CHUNK, size - done))
            try:
                with partial.open("ab") as file:
                    file.write(data)
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    raise StorageUnavailableError(
                        f"the work folder {target.parent} is full: {self._what} needs {size} bytes there"
                    ) from None
                raise
            if not data and size:
                raise StorageUnavailableError(
                    f"{name} of {self._what} ({self.uri}) ended after {done} of {size} bytes:"
                    " it changed while it was read"
                )
        partial.rename(target)

    def upload(self, name: str, source: Path) -> None:
        """Writes one file, over an older one of that name."""
        place = self._at(name)

        def put() -> None:
            if self._is_local:
                Path(self._path).mkdir(parents=True, exist_ok=True)
            self._filesystem.put_file(str(source), place)

        self._attempted(put)

    def check_writable(self) -> None:
        """Writes an empty file and removes it again, where the credentials may remove.

        Raises:
            TrainerError: the folder cannot be written to.
        """
        place = self._at(_WRITE_CHECK)

        def put() -> None:
            if self._is_local:
                Path(self._path).mkdir(parents=True, exist_ok=True)
            self._filesystem.pipe_file(place, b"")

        self._attempted(put)
        with contextlib.suppress(Exception):
            self._filesystem.rm_file(place)

    def child(self, name: str = "", *, retry: Retry | None = None) -> Folder:
        """A folder in this one (this one itself without a name), with other patience where `retry` is given."""
        return Folder(
            uri=f"{self.uri}/{name}" if name else self.uri,
            filesystem=self._filesystem,
            path=self._at(name) if name else self._path,
            what=self._what,
            credentials=self._credentials,
            missing=self._missing,
            retry=retry or self._retry,
            root=self._root,
        )

    def folders(self) -> list[str]:
        """Names of the folders directly in the folder, sorted; none where it does not exist."""

        def listed() -> list[str]:
            try:
                entries = self._filesystem.ls(self._path, detail=True, **self._fresh)
            except FileNotFoundError:
                return []
            return self._plain(
                entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry["type"] == "directory"
            )

        return self._attempted(listed)

    def is_folder(self, name: str) -> bool:
        """Whether the name is that of a folder.

        Raises:
            TrainerError: there is nothing of that name, access is denied, or the store is unavailable.
        """
        place = self._at(name)
        return self._attempted(lambda: bool(self._filesystem.info(place, **self._fresh)["type"] == "directory"))

    def below(self, pattern: str | None = None) -> list[str]:
        """Paths, relative to the folder and sorted, of the files in and below it, or of those that a glob matches."""

        def found() -> list[str]:
            if self._fresh:
                self._filesystem.invalidate_cache()
            if pattern is None:
                places = self._filesystem.find(self._path, detail=True)
            else:
                places = self._filesystem.glob(f"{self._path}/{pattern}", detail=True)
            prefix = f"{self._path.strip('/')}/"
            return self._plain(
                place.lstrip("/").removeprefix(prefix)
                for place, entry in places.items()
                if entry["type"] == "file" and place.lstrip("/").startswith(prefix)
            )

        return self._attempted(found)

    def remove(self) -> None:
        """Removes the folder and everything in it; it need not exist."""

        def removed() -> None:
            with contextlib.suppress(FileNotFoundError):
                if self._is_local or not has_magic(self._path):
                    self._filesystem.rm(self._path, recursive=True)
                    return
                for place in self._filesystem.find(self._path):  # `rm` would take the name for a pattern
                    self._filesystem.rm_file(place)

        self._attempted(removed)

    def create(self, name: str, data: bytes) -> bool:
        """Writes one small file if there is none of that name; False where there is.

        Where the store knows conditional writes, they are used, so that of two writers one wins.
        """
        place = self._at(name)

        def put() -> bool:
            if self.exists(name):
                return False
            try:
                if self._is_local:
                    _write_exclusively(Path(place), data)
                else:
                    self._filesystem.pipe_file(place, data, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                if isinstance(error.__cause__, ClientError) and _status(error.__cause__) == 412:  # noqa: PLR2004 - HTTP Precondition Failed
                    return False
                raise
            return True

        return self._attempted(put)

    @property
    def _is_local(self) -> bool:
        return isinstance(self._filesystem, LocalFileSystem)

    @property
    def _fresh(self) -> dict[str, bool]:
        return {"refresh": True} if "s3" in self._filesystem.protocol else {}

    def _at(self, name: str) -> str:
        if "/" in name or name in {"", ".", ".."}:
            raise ValueError(f"{name!r} is not the name of a file in a folder")
        place = f"{self._path}/{name}"
        self._stay_inside(place)
        return place

    def _stay_inside(self, place: str) -> None:
        if self._root is not None and not Path(place).resolve().is_relative_to(self._root.resolve()):
            raise AccessDeniedError(
                f"{self._what} {self.uri}: {Path(place).name} leads out of the claim: put what it links to into the"
                " claim itself"
            )

    def _plain(self, paths: Iterable[str]) -> list[str]:
        """What a store has listed, sorted."""
        found = sorted(paths)
        for path in found:
            if not {".", ".."}.isdisjoint(path.split("/")):
                raise AccessDeniedError(
                    f"{self._what} {self.uri}: the store lists {path!r} there, which leads out of the folder:"
                    " remove it, or name another folder"
                )
        return found

    def _attempted(self, operation: Callable[[], T]) -> T:
        name = f"{self._what} ({self.uri})"
        endpoint = "s3" in self._filesystem.protocol and self._filesystem.endpoint_url
        server = f"AWS_ENDPOINT_URL of {self._credentials}, for {name}," if endpoint else None
        return attempted(operation, self._understood, self._retry, name, server)

    def _understood(self, error: Exception) -> TrainerError:
        cause = error.__cause__ if isinstance(error.__cause__, ClientError) else error
        where = f"{self._what} {self.uri}"
        if isinstance(error, NoCredentialsError | PartialCredentialsError):
            return AccessDeniedError(
                f"no complete credentials for {where}: {self._credentials} must give AWS_ACCESS_KEY_ID"
                " and AWS_SECRET_ACCESS_KEY"
            )
        if isinstance(error, PermissionError) or _denied(cause):
            return AccessDeniedError(
                f"access to {where} was denied with the credentials of {self._credentials}:"
                " check the keys there and what they may read and write"
            )
        if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
            return self._missing(f"{where} does not exist: check the uri" + self._hint(error))
        invalid = isinstance(error, OSError) and error.errno == errno.EINVAL
        if invalid or isinstance(error, ParamValidationError) or google_cloud.refused(error):
            return InvalidSpecError(f"the store does not accept the uri of {where}: {said(error)}")
        return StorageUnavailableError(
            f"{where} could not be reached, tried {self._retry.attempts} times: {said(error)}"
        )

    def _hint(self, error: Exception) -> str:
        cause = error.__cause__
        if isinstance(cause, ClientError) and cause.response.get("Error", {}).get("Code") == "NoSuchBucket":
            return f" (there is no bucket {self._path.split('/', 1)[0]!r})"
        return ""


class Stores:
    """Opens the places that a manifest names.

    Args:
        secrets: folder with one sub-folder per mounted Secret, one file per key.
        allow_file: whether file:// is allowed: in local runs only.
        environ: the process' environment, with the credentials of the store.
        retry: how long outages are waited out.
    """

    def __init__(
        self, *, secrets: Path, allow_file: bool, environ: Mapping[str, str] | None = None, retry: Retry | None = None
    ) -> None:
        self._folder = secrets
        # Read once: a Secret that somebody creates while the job runs was not there when the job was admitted.
        self._secrets = read_secrets(secrets)
        self._allow_file = allow_file
        self._environ = os.environ if environ is None else environ
        self.retry = retry or Retry()

    def folder(
        self,
        uri: str,
        *,
        what: str,
        missing: type[TrainerError],
        secret: str | None = None,
        revision: str | None = None,
    ) -> Folder:
        """The folder at `uri`.

        Raises:
            InvalidSpecError: the scheme is unknown or not allowed here, or the store cannot have such a name.
            SecretNotFoundError: the Secret is not mounted, or has no key that the scheme needs.
            AccessDeniedError: what its key holds is none.
        """
        scheme, _, place = uri.partition("://")  # no parser of urls: in a path `#`, `?` and `%` mean themselves
        root = None
        if scheme not in _SCHEMES or not place.strip("/") or (scheme == "file") != place.startswith("/"):
            raise InvalidSpecError(
                f"the uri {uri} of {what} is none of {', '.join(f'{name}://' for name in _SCHEMES)} with a path"
            )
        if scheme == "file" and not self._allow_file:
            raise InvalidSpecError(
                f"{what} is at {uri}, and file:// is allowed only where no cluster runs the job (tunesmith run):"
                " use s3:// or another store"
            )
        if scheme in _NO_NAMES and _NO_NAMES[scheme][0].search(place):
            raise InvalidSpecError(f"the uri {uri} of {what} {_NO_NAMES[scheme][1]}")
        if scheme == "hf" and revision:
            place = _hf_revision(place, revision)
        if scheme == "pvc":
            root = Path(claim_path(f"pvc://{place.partition('/')[0]}"))
            place = claim_path(uri)
        values, credentials = self.credentials(secret)
        if secret is not None:
            check_keys(scheme, values, secret)
        try:
            opened = filesystem(scheme, values, credentials, alone=secret is not None)
        except ImportError as error:
            raise InvalidSpecError(f"{what} is at {uri}, and this image cannot read {scheme}://: {error}") from None
        return Folder(
            uri=uri,
            filesystem=opened,
            path=place,
            what=what,
            credentials=credentials,
            missing=missing,
            retry=self.retry,
            root=root,
        )

    def file(
        self, uri: str, *, what: str, missing: type[TrainerError], secret: str | None = None
    ) -> tuple[Folder, str]:
        """The folder that holds the file at `uri`, and the file's name."""
        parent, _, name = uri.rstrip("/").rpartition("/")
        folder = self.folder(parent, what=what, missing=missing, secret=secret)
        folder.uri = uri
        return folder, name

    def credentials(self, secret: str | None) -> tuple[Mapping[str, str], str]:
        """The keys and values of a Secret, or of the store's where there is none, and its name for messages.

        Raises:
            SecretNotFoundError: the Secret is not mounted.
            AccessDeniedError: a value is malformed.
        """
        if secret is None:
            credentials = "the environment (in a cluster: the Secret tunesmith-store)"
            check_values(self._environ, credentials)
            return self._environ, credentials
        values = self._secrets.get(secret)
        if not values:
            raise SecretNotFoundError(
                f"the Secret {secret} does not exist, is empty or has no key that is read (nothing is mounted at"
                f" {self._folder / secret}): create it, or remove the secretRef to use the store's credentials"
            )
        check_values(values, f"the Secret {secret}")
        return values, f"the Secret {secret}"

    def check_secrets(self) -> None:
        """Check all mounted Secrets, before anything is read with them.

        Raises:
            AccessDeniedError: a value is malformed.
        """
        for secret, values in self._secrets.items():
            check_values(values, f"the Secret {secret}")


def file_sha256(path: Path) -> str:
    """The 64 hex digits of a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hf_revision(place: str, revision: str) -> str:
    parts = place.strip("/").split("/")
    return "/".join([*parts[:1], f"{parts[1]}@{revision}", *parts[2:]]) if len(parts) > 1 else place


def _write_exclusively(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f".{path.name}.{os.getpid()}")
    whole.write_bytes(data)
    try:
        os.link(whole, path)  # the name appears with its whole content, or not at all
    finally:
        whole.unlink()


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _denied(error: BaseException) -> bool:
    if isinstance(error, ClientError):
        return error.response.get("Error", {}).get("Code") in _DENIED_CODES or _status(error) in _DENIED_STATUS
    response = getattr(error, "response", None)  # huggingface_hub
    return getattr(response, "status_code", None) in _DENIED_STATUS or google_cloud.denied(error)


def said(error: Exception) -> str:
    """What an exception says, in one line."""
    name = type(error).__name__
    kind = name if isinstance(error, BotoCoreError) or not str(error) else ""
    return " ".join(f"{kind} {error}".split())[:300] or name
