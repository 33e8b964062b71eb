"""The budget for all bytes in flight: bodies while they are read, held and forwarded, and pieces of answers."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Self

from tunesmith.gateway import errors

if TYPE_CHECKING:
    from tunesmith.gateway.limits import Limits


class Budget:
    """Bytes in flight, in total and by key.

    Args:
        limits: the bounds, `max_in_flight_bytes` and `max_in_flight_bytes_per_key`.
    """

    def __init__(self, limits: Limits) -> None:
        self._total = limits.max_in_flight_bytes
        self._per_key = limits.max_in_flight_bytes_per_key
        self.used = 0
        self._by_key: Counter[str] = Counter()

    def share(self, key: str) -> Share:
        """Return an empty share for one request; `key` is the name of its API key."""
        return Share(self, key)

    def reserve(self, key: str, count: int) -> None:
        """Reserve bytes.

        Raises:
            ApiError: 503 above the whole budget, 429 above the key's part of it. Clients see a 429 as a rate limit,
                whereas proxies interpret several 503 as a broken gateway.
        """
        if self._by_key[key] + count > self._per_key:
            raise errors.key_over_budget(self._per_key)
        if self.used + count > self._total:
            raise errors.over_budget()
        self.used += count
        self._by_key[key] += count

    def release(self, key: str, count: int) -> None:
        """Release reserved bytes."""
        self.used -= count
        self._by_key[key] -= count
        if not self._by_key[key]:
            del self._by_key[key]


class Share:
    """Bytes reserved for one request; a context manager that releases them on exit."""

    def __init__(self, budget: Budget, key: str) -> None:
        self._budget = budget
        self._key = key
        self._count = 0

    def reserve(self, count: int) -> None:
        """Reserve more bytes.

        Raises:
            ApiError: the budget is used up.
        """
        self._budget.reserve(self._key, count)
        self._count += count

    def set_to(self, count: int) -> None:
        """Reserve or release bytes so that the share is exactly `count` bytes.

        Raises:
            ApiError: the budget is used up.
        """
        if count > self._count:
            self.reserve(count - self._count)
        elif count < self._count:
            self._budget.release(self._key, self._count - count)
            self._count = count

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.set_to(0)
