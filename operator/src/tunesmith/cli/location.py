"""Access to folders of stores from a user's machine."""

from __future__ import annotations

import base64
import os
from contextlib import suppress
from typing import TYPE_CHECKING

from tunesmith.api.credentials import STORE_SECRET
from tunesmith.cli.connection import connect
from tunesmith.cli.errors import CliError
from tunesmith.cli.output import note
from tunesmith.cluster.errors import ClusterError
from tunesmith.storage.credentials import Credentials, Origin, environment_credentials, secret_values
from tunesmith.storage.errors import UnavailableError
from tunesmith.storage.folder import Access, Retry, open_folder
from tunesmith.storage.schemes import BY_NAME, split

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunesmith.storage.errors import StorageError
    from tunesmith.storage.folder import Folder

_RETRY = Retry(attempts=4)


async def find_credentials(uri: str, namespace: str | None) -> Credentials:
    """Return the keys for a uri: those of the environment, or of the namespace's Secret if the environment lacks them.

    The environment's address of the server has precedence, since the Secret's may be reachable only inside the cluster.
    """
    environment = environment_credentials(os.environ)
    scheme = BY_NAME.get(split(uri)[0])
    if scheme is None or any(os.environ.get(key) for keys in scheme.credentials for key in keys):
        return environment
    secret: Mapping[str, str] | None = None
    with suppress(ClusterError):
        async with await connect() as cluster:
            found = await cluster.find("Secret", STORE_SECRET, namespace)
        data = (found or {}).get("data") or {}
        secret = {key: base64.b64decode(value).decode(errors="replace").strip() for key, value in data.items()}
    if not secret:
        return environment
    own = secret_values(os.environ)
    return Credentials({**secret, **own}, f"the Secret {STORE_SECRET}", Origin.STORE_SECRET, frozenset(own))


def open_at(uri: str, credentials: Credentials, *, what: str) -> Folder:
    """Return the folder at a uri.

    Raises:
        CliError: the uri is not that of a store, or the credentials cannot be used. Calls of the folder also raise it.
    """

    def as_cli_error(error: StorageError) -> CliError:
        return CliError(f"{error}{_hint(error, uri, credentials)}")

    access = Access(_RETRY, waiting=_waiting, native=True, failure=as_cli_error)
    return open_folder(uri, credentials, access, what=what)


def _waiting(message: str | None) -> None:
    if message is not None:
        note(message)


def _hint(error: StorageError, uri: str, credentials: Credentials) -> str:
    scheme = BY_NAME.get(split(uri)[0])
    endpoint = scheme.endpoint_of(credentials.values) if scheme is not None else None
    if isinstance(error, UnavailableError) and endpoint is not None:
        key, source = endpoint[0], credentials.source_of(endpoint[0])
        if credentials.origin is Origin.STORE_SECRET and key not in credentials.overridden:
            return f"; set {key} if the address in {source} is reachable only inside the cluster"
        return f"; check {key} of {source}"
    return f" (keys are read from the environment, otherwise from the namespace's Secret {STORE_SECRET})"
