"""The S3 store of an installation, as `tunesmith gc` reads and cleans it."""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store
from pydantic import ValidationError

from tunesmith.cli.errors import CliError, Exit
from tunesmith.cli.garbage import StoredFile
from tunesmith.contracts.location import TEMPORARY_FOLDER
from tunesmith.contracts.owner import Owner
from tunesmith.storage.schemes import normalised

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import timedelta

    from tunesmith.cli.garbage import Leftover

_DENIED = re.compile(r"\b40[13] |<Code>(AccessDenied|SignatureDoesNotMatch|InvalidAccessKeyId|ExpiredToken)</Code>")
_MESSAGE = re.compile(r"<Message>(.*?)</Message>")


class Store:
    """A folder of a bucket, with the credentials of the environment.

    Args:
        uri: `s3://bucket/folder`, in any spelling.
        patience: how long an outage is waited out.

    Raises:
        CliError: it is no such uri.
    """

    def __init__(self, uri: str, patience: timedelta) -> None:
        self.uri = normalised(uri)
        """In its one spelling."""
        scheme, _, place = self.uri.partition("://")
        bucket, _, folder = place.partition("/")
        if scheme != "s3" or not bucket:
            raise CliError(
                f"--store {uri} is none that this command can clean, which is s3://bucket/folder: in other stores, let"
                f" a lifecycle rule remove what is old in the folders {TEMPORARY_FOLDER}/",
                Exit.USAGE,
            )
        if not {"?", "#"}.isdisjoint(place) or ".." in place.split("/"):
            raise CliError(
                f"--store {uri} has a '?', a '#' or '..', which no store has: write bucket and folder alone, as in"
                " s3://bucket/folder",
                Exit.USAGE,
            )
        config: dict[str, Any] = {"region": os.environ.get("AWS_REGION") or "us-east-1"}
        endpoint = os.environ.get("AWS_ENDPOINT_URL")
        if endpoint:
            config["endpoint"] = endpoint
        self._store = S3Store(
            bucket,
            prefix=folder or None,
            client_options={"allow_http": (endpoint or "").startswith("http://"), "timeout": "60s"},
            retry_config={"max_retries": 5, "retry_timeout": patience},
            **config,
        )

    def uri_of(self, leftover: Leftover) -> str:
        """Where it lies."""
        tail = f"/{TEMPORARY_FOLDER}" if leftover.part == TEMPORARY_FOLDER else ""
        return f"{self.uri}/{leftover.folder.path}{tail}"

    def files(self, namespace: str | None) -> list[StoredFile]:
        """Everything in the store, or in the namespace's part of it.

        Raises:
            CliError: it cannot be read.
        """
        with self._told(f"read {self.uri}"):
            return [
                StoredFile(entry["path"], entry["size"], entry["last_modified"])
                for page in obstore.list(self._store, prefix=namespace)
                for entry in page
            ]

    def owner(self, path: str) -> Owner | None:
        """What an `owner.json` says; None where it says nothing that can be read.

        Raises:
            CliError: the store did not answer.
        """
        with self._told(f"read {self.uri}/{path}"):
            data = obstore.get(self._store, path).bytes().to_bytes()
        try:
            return Owner.model_validate_json(data)
        except ValidationError:
            return None

    def remove(self, paths: Sequence[str]) -> None:
        """Removes the files, one after the other.

        Raises:
            CliError: one cannot be removed; those behind it are left.
        """
        for path in paths:
            with self._told(f"remove {self.uri}/{path}"):
                obstore.delete(self._store, path)

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Failures as sentences."""
        try:
            yield
        except (BaseError, FileNotFoundError) as error:
            text = " ".join(str(error).split())
            # Of listings the library has no exception for this.
            denied = isinstance(error, PermissionDeniedError | UnauthenticatedError) or _DENIED.search(text)
            if denied:
                raise CliError(f"cannot {what}: the credentials of AWS_* in the environment do not allow it") from error
            said = _MESSAGE.search(text)
            reason = said.group(1) if said else text[:300]
            raise CliError(f"cannot {what}: {reason}; check --store and AWS_* in the environment") from error
