"""The store of an installation, for `tunesmith gc`."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pydantic import ValidationError

from tunesmith.cli.errors import CliError, Exit
from tunesmith.cli.garbage import StoredFile, is_job_folder
from tunesmith.contracts.location import TEMPORARY_FOLDER
from tunesmith.contracts.owner import Owner
from tunesmith.storage.credentials import environment_credentials
from tunesmith.storage.folder import Access, Folder, open_folder
from tunesmith.storage.schemes import parse_store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tunesmith.cli.garbage import Leftover
    from tunesmith.storage.errors import StorageError
    from tunesmith.storage.folder import Retry


class Store:
    """The folder of a bucket, with the credentials of the environment.

    Args:
        uri: uri such as `s3://bucket/folder`, normalised or not.
        retry: policy for retries during an outage.

    Raises:
        CliError: the uri is not that of a store, or the credentials cannot be used.
    """

    def __init__(self, uri: str, retry: Retry) -> None:
        try:
            self.uri = parse_store(uri)
            """Normalised uri of the store."""
        except ValueError as error:
            raise CliError(f"--store: {error}", Exit.USAGE) from None
        access = Access(retry, native=True, failure=_as_cli_error)
        self._folder = open_folder(self.uri, environment_credentials(os.environ), access, what="the store")

    def uri_of(self, leftover: Leftover) -> str:
        """Return the uri of a leftover."""
        tail = f"/{TEMPORARY_FOLDER}" if leftover.part == TEMPORARY_FOLDER else ""
        return f"{self.uri}/{leftover.folder.path}{tail}"

    def check(self) -> None:
        """Check that FineTuneJobs have written to the store: a mistyped uri would look like a clean store.

        Raises:
            CliError: no FineTuneJob has written to it, or it cannot be read.
        """
        self._folder.files()  # fails if the bucket or the folder does not exist
        for namespace in self._folder.folders():
            if any(is_job_folder(name) for name in self._folder.child(namespace).folders()):
                return
        raise CliError(
            f"{self.uri} has no folder of a FineTuneJob, <namespace>/<job>-<uid>: check --store, which is the value"
            " `store` of the chart, and the address of the server in the environment"
        )

    def files(self, namespace: str | None) -> list[StoredFile]:
        """Return all files of the store, or of a namespace in it.

        Raises:
            CliError: the store cannot be read.
        """
        folder: Folder = self._folder if namespace is None else self._folder.child(namespace)
        prefix = "" if namespace is None else f"{namespace}/"
        # A file without a time is never old enough to be removed.
        now = datetime.now(UTC)
        return [StoredFile(f"{prefix}{file.name}", file.size, file.modified or now) for file in folder.tree()]

    def owner(self, path: str) -> Owner | None:
        """Return the content of an `owner.json`; None if it is not valid.

        Raises:
            CliError: the store did not answer.
        """
        folder, _, name = path.rpartition("/")
        inner = self._folder
        for part in folder.split("/"):
            inner = inner.child(part)
        try:
            return Owner.model_validate_json(inner.read(name))
        except ValidationError:
            return None

    def remove(self, paths: Sequence[str]) -> None:
        """Remove the files in order.

        Raises:
            CliError: a file cannot be removed; the files after it are kept.
        """
        for path in paths:
            self._folder.remove_file(path)


def _as_cli_error(error: StorageError) -> CliError:
    return CliError(str(error))
