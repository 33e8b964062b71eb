"""Failures of stores. Their texts say what is wrong, where, and how to fix it, and contain no credential."""

from __future__ import annotations


class StorageError(Exception):
    """A store does not do what was asked of it."""


class AccessDeniedError(StorageError):
    """The store refused the credentials, they cannot be used, or the address may not be reached."""


class CredentialsMissingError(StorageError):
    """A Secret lacks a key."""


class NotFoundError(StorageError):
    """The place does not exist."""


class InvalidUriError(StorageError):
    """The uri is not one that can be read or written here."""


class UnavailableError(StorageError):
    """The store did not answer, or not well: another try may help."""


class FullError(StorageError):
    """The disk of this machine is full."""
