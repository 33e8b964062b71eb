"""Errors of the cluster, each with its retry policy and its label in metrics."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar


class Retry(StrEnum):
    """Retry policy for a caller that needs the call to succeed."""

    NEVER = "Never"
    """The same call keeps failing until somebody changes something."""
    REREAD = "Reread"
    """Read the object again, decide again, and repeat the call."""
    BACKOFF = "Backoff"
    """The same call may succeed later."""


class ClusterError(Exception):
    """A failed call to the cluster. `str()` is a sentence for people."""

    retry: ClassVar[Retry] = Retry.BACKOFF
    label: ClassVar[str] = "error"

    def __init__(self, message: str, *, status: int = 0, reason: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


class ConfigurationError(ClusterError):
    """No usable kubeconfig and no service account was found."""

    retry = Retry.NEVER
    label = "configuration"


class NotFoundError(ClusterError):
    """The object, or its kind, does not exist (HTTP 404)."""

    retry = Retry.REREAD
    label = "not_found"


class AlreadyExistsError(ClusterError):
    """An object of that name exists (HTTP 409, AlreadyExists)."""

    retry = Retry.REREAD
    label = "already_exists"


class ConflictError(ClusterError):
    """The object changed since it was read, or another field manager owns a field (HTTP 409)."""

    retry = Retry.REREAD
    label = "conflict"


class InvalidError(ClusterError):
    """The API server refuses the object (HTTP 400, 405, 413, 415, 422). The message is the API server's."""

    retry = Retry.NEVER
    label = "invalid"


class UnauthorizedError(ClusterError):
    """The credentials are not accepted (HTTP 401)."""

    label = "unauthorized"


class ForbiddenError(ClusterError):
    """The credentials do not allow the call, or an admission rule or a quota refuses it (HTTP 403)."""

    label = "forbidden"


class ExpiredError(ClusterError):
    """The resourceVersion is too old (HTTP 410): list again."""

    retry = Retry.REREAD
    label = "expired"


class UnavailableError(ClusterError):
    """The API server cannot be reached, is overloaded or failed (network, HTTP 429 and 5xx)."""

    label = "unavailable"


_BY_STATUS: dict[int, type[ClusterError]] = {
    400: InvalidError,
    401: UnauthorizedError,
    403: ForbiddenError,
    404: NotFoundError,
    405: InvalidError,
    409: ConflictError,
    410: ExpiredError,
    413: InvalidError,
    415: InvalidError,
    422: InvalidError,
}


def error_of(status: int, reason: str, message: str) -> ClusterError:
    """Return the error for an HTTP status and the `reason` and `message` of the API server's Status object."""
    kind = AlreadyExistsError if reason == "AlreadyExists" else _BY_STATUS.get(status, UnavailableError)
    return kind(message or reason or f"the API server returned status {status}", status=status, reason=reason)
