"""Failures of stores. Messages name the problem, the place and the fix, and contain no credentials."""

from __future__ import annotations


class StorageError(Exception):
    """A failed operation of a store."""


class AccessDeniedError(StorageError):
    """The store refused the credentials, they cannot be used, or the address is not allowed."""


class CredentialsMissingError(StorageError):
    """A Secret lacks a key."""


class NotFoundError(StorageError):
    """The file, folder or bucket does not exist."""


class InvalidUriError(StorageError):
    """The uri is malformed or not supported for the operation."""


class UnavailableError(StorageError):
    """The store did not respond, or responded with an error; a retry may succeed."""


class FullError(StorageError):
    """A disk of this machine, or one that it has mounted, is full; room may be made."""
