"""Write to a model repository of the Hugging Face Hub."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile

from tunesmith.storage.diagnosis import describe
from tunesmith.storage.errors import AccessDeniedError, InvalidUriError, StorageError, UnavailableError
from tunesmith.storage.folder import attempt
from tunesmith.storage.hub import hub_client

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from typing import TypeVar

    from tunesmith.storage.credentials import Credentials
    from tunesmith.storage.folder import Access

    T = TypeVar("T")

TOKEN = "HF_TOKEN"  # noqa: S105 - a name, not a secret
_DENIED = frozenset({401, 403, 404})
"""Status codes of a denial: the Hub does not distinguish a missing repository from one that the token must not see."""
_RETRYABLE = frozenset({408, 409, 412, 425, 429})
_SERVER_ERROR = 500


class Repository:
    """A model repository. Every call retries through short outages.

    Args:
        name: `<organisation>/<name>`.
        credentials: HF_TOKEN and, for a Hub other than Hugging Face's, HF_ENDPOINT.
        access: retries and error mapping of calls.

    Raises:
        TrainerError: the token is missing or cannot be used.
    """

    def __init__(self, name: str, credentials: Credentials, access: Access) -> None:
        self._name = name
        self._credentials = credentials
        self._access = access
        try:
            if not credentials.values.get(TOKEN):
                raise AccessDeniedError(
                    f"the export hf://{name} needs a token: put {TOKEN}, a token that may write to it, into"
                    f" {credentials.source}"
                )
            self._hub = hub_client(credentials)
        except StorageError as error:
            raise access.failure(error) from None

    def create(self) -> None:
        """Create the repository, private, unless it exists, and check that the token may write to it.

        Raises:
            TrainerError: the token may not write to it, or the Hub is unavailable.
        """

        def create() -> None:
            if not self._hub.repo_exists(self._name):
                self._hub.create_repo(self._name, private=True, exist_ok=True)
            # Ask how a file is to be uploaded, which requires write access; this does not upload a small file.
            self._hub.preupload_lfs_files(self._name, [CommitOperationAdd("README.md", b"-")])

        self._attempt(create)

    def commit(self, files: Mapping[str, Path], last: str, folder: str, message: str) -> None:
        """Commit all files in one commit; do nothing if the repository already has them.

        Args:
            files: local files by their path in the repository.
            last: path of the file that lists the hashes of all others: if it is the same, all are.
            folder: folder in the repository from which files not in `files` are removed; all others are kept.
            message: commit message.

        Raises:
            TrainerError: the token may not write to the repository, or the Hub is unavailable.
        """

        def commit() -> None:
            tree = self._hub.list_repo_tree(self._name, recursive=True)
            existing = {entry.path: entry.blob_id for entry in tree if isinstance(entry, RepoFile)}
            if existing.get(last) == _blob_id(files[last].read_bytes()):
                return
            old = [path for path in existing if path.startswith(f"{folder}/") and path not in files]
            self._hub.create_commit(
                self._name,
                [
                    *(CommitOperationDelete(path) for path in old),
                    *(CommitOperationAdd(path, str(file)) for path, file in files.items()),
                ],
                commit_message=message,
            )

        self._attempt(commit)

    def _attempt(self, operation: Callable[[], T]) -> T:
        return attempt(operation, self._translate, self._access, f"the export (hf://{self._name})")

    def _translate(self, error: Exception, tries: int) -> StorageError:
        where = f"the export hf://{self._name}"
        # A failed upload is wrapped in an error that does not state the cause.
        cause = error.__cause__ if type(error) is RuntimeError and isinstance(error.__cause__, Exception) else error
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        if status in _DENIED:
            return AccessDeniedError(
                f"access to {where} was denied with the credentials of {self._credentials.source}: {TOKEN} must"
                f" be a token that may write to {self._name}, or create that repository if it does not exist"
            )
        refused = status is not None and status < _SERVER_ERROR and status not in _RETRYABLE
        if refused or isinstance(error, ValueError):
            return InvalidUriError(f"the Hub does not accept {where}: {describe(cause)}")
        tried = f", tried {tries} times" if tries > 1 else ""
        return UnavailableError(f"{where} could not be reached{tried}: {describe(cause)}")


def _blob_id(data: bytes) -> str:
    """Return Git's name for a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
