"""The table of valid API keys."""

from __future__ import annotations

import hmac
import math
import time
from typing import TYPE_CHECKING

from tunesmith.contracts.apikey import key_digest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tunesmith.contracts.apikey import ApiKey

_INDEX = 8


class ExpiredKeyError(Exception):
    """The API key is no longer valid."""


class KeyTable:
    """The valid keys by their digest.

    Args:
        wall_clock: Unix time in seconds.
    """

    def __init__(self, wall_clock: Callable[[], float] = time.time) -> None:
        self._wall_clock = wall_clock
        self._by_record: dict[str, ApiKey] = {}
        self._by_prefix: dict[bytes, dict[str, ApiKey]] = {}

    def put(self, record_name: str, key: ApiKey) -> None:
        """Add or replace the key of a ConfigMap."""
        self.remove(record_name)
        self._by_record[record_name] = key
        for digest in _digests(key):
            self._by_prefix.setdefault(digest[:_INDEX], {})[record_name] = key

    def remove(self, record_name: str) -> None:
        """Forget the key of a ConfigMap."""
        key = self._by_record.pop(record_name, None)
        if key is None:
            return
        for digest in _digests(key):
            same_prefix = self._by_prefix[digest[:_INDEX]]
            same_prefix.pop(record_name, None)
            if not same_prefix:
                del self._by_prefix[digest[:_INDEX]]

    def find(self, presented: str) -> ApiKey | None:
        """Return the API key that a client presents, or None if it is not known.

        The index uses only a prefix of the SHA-256; the whole digest is compared in constant time.

        Raises:
            ExpiredKeyError: it was valid until some time ago.
        """
        digest = key_digest(presented)
        found, expires = None, None
        for key in self._by_prefix.get(digest[:_INDEX], {}).values():
            if hmac.compare_digest(key.digest, digest):
                found, expires = key, key.expires
            elif key.previous_digest is not None and hmac.compare_digest(key.previous_digest, digest):
                found, expires = key, min(key.previous_expires, math.inf if key.expires is None else key.expires)
        if expires is not None and expires <= self._wall_clock():
            raise ExpiredKeyError
        return found


def _digests(key: ApiKey) -> list[bytes]:
    return [key.digest] if key.previous_digest is None else [key.digest, key.previous_digest]
