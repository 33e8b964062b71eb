"""Classification of the exceptions of stores' libraries as StorageErrors, whose messages name the fix. Pure."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunesmith.storage.errors import (
    AccessDeniedError,
    FullError,
    InvalidUriError,
    NotFoundError,
    UnavailableError,
)
from tunesmith.storage.schemes import DENIED_S3_CODES, causes, is_instance

if TYPE_CHECKING:
    from tunesmith.storage.credentials import Credentials
    from tunesmith.storage.errors import StorageError
    from tunesmith.storage.schemes import Scheme

_MAX_DESCRIPTION = 300
_NATIVE_DENIED = re.compile(rf"\b40[13] |<Code>({'|'.join(sorted(DENIED_S3_CODES))}|AuthenticationFailed)</Code>")
_NATIVE_CONNECT = "kind: Connect,"
_NATIVE_CAUSE = re.compile(r'(?:message|error): "([^"]*)"')
_NATIVE_DEBUG = "Debug source:"
"""Begins the part of obstore's messages that has its structures in Rust's format."""
_NATIVE_MISSING = re.compile(r"<Code>(NoSuchBucket|ContainerNotFound)</Code>|\b404 ")


@dataclass(frozen=True)
class Target:
    """File or folder that an operation of a store refers to.

    Attributes:
        name: its name in messages.
        bucket: name of the bucket.
        scheme: scheme of the uri.
        credentials: credentials of the store.
    """

    name: str
    bucket: str
    scheme: Scheme
    credentials: Credentials


def diagnose(error: Exception, target: Target, tries: int) -> StorageError:
    """Return the StorageError for an exception of a store's library after this number of tries."""
    scheme, name, source = target.scheme, target.name, target.credentials.source
    server = _default_server(target)
    server_of_keys = server if scheme.keys_belong_to_server else ""
    if scheme.no_credentials(error) or _no_credentials(error):
        keys = " or ".join(" and ".join(keys) for keys in scheme.credentials)
        return AccessDeniedError(f"no complete credentials for {name}: {source} must have {keys}")
    number = error.errno if isinstance(error, OSError) else None
    if number in {errno.ENOSPC, errno.EDQUOT}:
        return FullError(f"the disk of {name} has no room: free some, or use a larger one")
    if number == errno.EROFS:
        return AccessDeniedError(f"the disk of {name} is read-only: use one that can be written")
    if scheme.denied(error) or _denied(error):
        return AccessDeniedError(
            f"access to {name} was denied with the credentials of {source}: check the keys there and what they may"
            f" read and write{server_of_keys}"
        )
    if scheme.missing(error) or _missing(error):
        bucket = f" (there is no bucket {target.bucket!r})" if scheme.no_bucket(error) else ""
        return NotFoundError(f"{name} does not exist: check the uri{bucket}{server_of_keys}")
    if scheme.invalid(error) or _invalid(error):
        return InvalidUriError(f"the store does not accept the uri of {name}: {describe(error)}")
    tried = f", tried {tries} times" if tries > 1 else ""
    cause = _no_connection(error, target) or describe(error)
    return UnavailableError(f"{name} could not be reached{tried}: {cause}{server}")


def describe(error: Exception) -> str:
    """Return an exception's message in one line of at most 300 characters."""
    name = type(error).__name__
    kind = name if not str(error) or "botocore" in type(error).__module__ else ""
    text = str(error).partition(_NATIVE_DEBUG)[0] if _is_native(error) else str(error)
    return " ".join(f"{kind} {text}".split())[:_MAX_DESCRIPTION] or name


def _default_server(target: Target) -> str:
    """Return the hint that the default server was used, if the credentials name none."""
    scheme, credentials = target.scheme, target.credentials
    if not scheme.endpoint or scheme.endpoint_of(credentials.values) is not None:
        return ""
    return (
        f"; {credentials.source} has no {scheme.endpoint[0]}, so {scheme.default_server} was used: add it if the store"
        " is on another server"
    )


def _no_connection(error: Exception, target: Target) -> str:
    """Return a sentence for an obstore exception that means that no connection was made; empty for others."""
    if not _is_native(error) or _NATIVE_CONNECT not in str(error):
        return ""
    endpoint = target.scheme.endpoint_of(target.credentials.values)
    server = endpoint[1] if endpoint is not None else target.scheme.default_server or "the store"
    causes = _NATIVE_CAUSE.findall(str(error))
    return f"cannot connect to {server}" + (f" ({causes[-1]})" if causes else "")


def _denied(error: BaseException) -> bool:
    """Return True for an exception that means, in every store, that access is denied."""
    if any(isinstance(cause, PermissionError) for cause in causes(error)):
        return True
    # obstore has no such exception for listings.
    return _is_native(error) and (
        is_instance(error, "PermissionDeniedError", "UnauthenticatedError")
        or _NATIVE_DENIED.search(str(error)) is not None
    )


def _no_credentials(error: BaseException) -> bool:
    """Return True for an obstore exception that means that no credentials were found: it tried the machine's."""
    return _is_native(error) and re.search(r"169\.254\.|metadata\.google", str(error)) is not None


def _missing(error: BaseException) -> bool:
    """Return True for an exception that means, in every store, that something does not exist."""
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return True
    return _is_native(error) and _NATIVE_MISSING.search(str(error)) is not None


def _invalid(error: BaseException) -> bool:
    """Return True for an exception that means that no store can have such a name."""
    return isinstance(error, OSError) and error.errno == errno.EINVAL


def _is_native(error: BaseException) -> bool:
    """Return True for an exception of obstore."""
    return type(error).__module__.startswith("obstore")
