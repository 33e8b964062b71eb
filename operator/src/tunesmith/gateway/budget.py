"""The budget for all bytes in flight: bodies while they are read, held and forwarded, and pieces of answers."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Self

from tunesmith.gateway import errors

if TYPE_CHECKING:
    from tunesmith.gateway.limits import Limits


class Budget:
    """Bytes in flight, in total and by key.

    A key may use half of what the others leave, so that a few keys never use up what another one needs: n keys that
    take all they can get have 1/(n + 1) each, and as much stays free. Source: dynamic thresholds, A. K. Choudhury and
    E. L. Hahne, "Dynamic queue length thresholds for shared-memory packet switches", 1998.

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
            ApiError: 429 if every other key has fewer bytes in flight, otherwise 503. Clients see a 429 as a rate
                limit, whereas proxies interpret several 503 as a broken gateway.
        """
        of_key = self._by_key[key] + count
        of_others = self.used - self._by_key[key]
        limit = min(self._per_key, (self._total - of_others) // 2)
        if of_key > limit:
            heaviest = max((used for name, used in self._by_key.items() if name != key), default=0)
            raise errors.key_over_budget(limit) if of_key > heaviest else errors.over_budget()
        self.used += count
        self._by_key[key] = of_key

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
