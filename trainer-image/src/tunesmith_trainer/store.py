"""Open stores for the trainer: with the Secrets that a manifest names, its retries and its errors."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.contracts.connections import refused_connection
from tunesmith.contracts.location import CLAIMS_FOLDER
from tunesmith.storage.credentials import Credentials, Origin, environment_credentials, read_secrets
from tunesmith.storage.errors import (
    AccessDeniedError as StoreAccessDeniedError,
)
from tunesmith.storage.errors import (
    CredentialsMissingError,
    FullError,
    InvalidUriError,
    NotFoundError,
    StorageError,
)
from tunesmith.storage.folder import Access, Folder, Retry, open_folder
from tunesmith_trainer.errors import (
    AccessDeniedError,
    InvalidSpecError,
    OutOfDiskError,
    SecretNotFoundError,
    StorageUnavailableError,
    TrainerError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

log = logging.getLogger(__name__)

TRAINING_RETRY = Retry(attempts=26, longest=60.0)
"""Twenty minutes, for each attempt of a job in a cluster: the results of earlier attempts are in the store."""
PUBLISHING_RETRY = Retry(attempts=66, longest=60.0)
"""An hour: the result of hours of training is not discarded while a store is being repaired."""
EXPORTING_RETRY = Retry(attempts=16, longest=60.0)
"""Ten minutes: the artifact is safe in the store by then, and the pod may hold a GPU."""


def _log_outage(sentence: str | None) -> None:
    if sentence is not None:
        log.warning("%s", sentence)


class Stores:
    """Opens the locations that a manifest names.

    Args:
        secrets: folder with one sub-folder per mounted Secret, one file per key.
        allow_file: True if file:// is allowed: in local runs only.
        environ: environment of the process, with the credentials of the store.
        retry: retries during outages.
        claims: folder with the mounted claims.
        waiting: is called with a description of an outage before each pause, and with None once the store answers
            again.
    """

    def __init__(
        self,
        *,
        secrets: Path,
        allow_file: bool,
        environ: Mapping[str, str] | None = None,
        retry: Retry | None = None,
        claims: Path = Path(CLAIMS_FOLDER),
        waiting: Callable[[str | None], None] = _log_outage,
    ) -> None:
        self._folder = secrets
        # Read once: a Secret that is created while the job runs did not exist when the job was admitted.
        self._secrets = read_secrets(secrets)
        self._allow_file = allow_file
        self._environ = os.environ if environ is None else environ
        self._claims = claims
        self._waiting = waiting
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
        """Return the folder at `uri`.

        Raises:
            InvalidSpecError: the scheme is unknown or not allowed here, or the name is invalid for the store.
            SecretNotFoundError: the Secret is not mounted, or lacks a key that the scheme needs.
            AccessDeniedError: the value of a key cannot be used.
        """
        return open_folder(
            uri,
            self.credentials(secret),
            self.access(missing),
            what=what,
            revision=revision,
            claims=self._claims,
            allow_file=self._allow_file,
        )

    def file(
        self, uri: str, *, what: str, missing: type[TrainerError], secret: str | None = None
    ) -> tuple[Folder, str]:
        """Return the folder that holds the file at `uri`, and the file's name.

        Raises:
            TrainerError: the folder cannot be opened; see `folder`.
        """
        parent, _, name = uri.rstrip("/").rpartition("/")
        folder = self.folder(parent, what=what, missing=missing, secret=secret)
        folder.uri = uri
        return folder, name

    def access(self, missing: type[TrainerError], retry: Retry | None = None) -> Access:
        """Return the retries and error mapping of calls; `missing` is raised for what does not exist."""
        return Access(
            retry or self.retry,
            refusal=refused_connection,
            waiting=self._waiting,
            failure=lambda error: trainer_error(error, missing),
        )

    def credentials(self, secret: str | None) -> Credentials:
        """Return the credentials of a Secret, or those of the store if no Secret is named.

        Raises:
            SecretNotFoundError: the Secret is not mounted.
            AccessDeniedError: a value is malformed.
        """
        if secret is None:
            return _checked(environment_credentials(self._environ, _STORE))
        values = self._secrets.get(secret)
        if not values:
            raise SecretNotFoundError(
                f"the Secret {secret} does not exist, is empty or has no known key (nothing is mounted at"
                f" {self._folder / secret}): create it, or remove the secretRef to use the store's credentials"
            )
        return _checked(Credentials(values, f"the Secret {secret}", Origin.SECRET))

    def check_secrets(self) -> None:
        """Check all mounted Secrets before anything is read with them.

        Raises:
            AccessDeniedError: a value is malformed.
        """
        for secret, values in self._secrets.items():
            _checked(Credentials(values, f"the Secret {secret}", Origin.SECRET))


_STORE = "the environment (in a cluster: the Secret tunesmith-store)"


def trainer_error(error: StorageError, missing: type[TrainerError]) -> TrainerError:
    """Return the trainer's failure for an error of a store; `missing` for what does not exist."""
    if isinstance(error, NotFoundError):
        return missing(str(error))
    if isinstance(error, StoreAccessDeniedError):
        return AccessDeniedError(str(error))
    if isinstance(error, CredentialsMissingError):
        return SecretNotFoundError(str(error))
    if isinstance(error, InvalidUriError):
        return InvalidSpecError(str(error))
    if isinstance(error, FullError):
        return OutOfDiskError(str(error))
    return StorageUnavailableError(str(error))


def _checked(credentials: Credentials) -> Credentials:
    try:
        credentials.check_values()
    except StorageError as error:
        raise trainer_error(error, StorageUnavailableError) from None
    return credentials


def file_sha256(path: Path) -> str:
    """Return the 64 hex digits of a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
