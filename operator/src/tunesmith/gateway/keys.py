"""The table of valid API keys."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING

from tunesmith.contracts.apikey import key_digest

if TYPE_CHECKING:
    from tunesmith.contracts.apikey import ApiKey

_INDEX = 8


class KeyTable:
    """The valid keys by their digest."""

    def __init__(self) -> None:
        self._by_record: dict[str, ApiKey] = {}
        self._by_prefix: dict[bytes, dict[str, ApiKey]] = {}

    def put(self, record_name: str, key: ApiKey) -> None:
        """Add or replace the key of a ConfigMap."""
        self.remove(record_name)
        self._by_record[record_name] = key
        self._by_prefix.setdefault(key.digest[:_INDEX], {})[record_name] = key

    def remove(self, record_name: str) -> None:
        """Forget the key of a ConfigMap."""
        key = self._by_record.pop(record_name, None)
        if key is None:
            return
        prefix = key.digest[:_INDEX]
        del self._by_prefix[prefix][record_name]
        if not self._by_prefix[prefix]:
            del self._by_prefix[prefix]

    def find(self, presented: str) -> ApiKey | None:
        """Return the API key that a client presents, or None if it is not valid.

        The index uses only a prefix of the SHA-256; the whole digest is compared in constant time.
        """
        digest = key_digest(presented)
        found = None
        for key in self._by_prefix.get(digest[:_INDEX], {}).values():
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found
