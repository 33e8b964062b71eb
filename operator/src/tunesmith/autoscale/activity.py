"""Adapters that are active much of the time, by which placement spreads them. Pure: the clock is an argument."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

MEMORY_SECONDS = 20.0
"""Time constant of the mean share of time for which an adapter is active."""
BUSY_ABOVE, IDLE_BELOW = 0.5, 0.2
"""Shares of time. An adapter becomes busy above the first one, and stays busy until its share is below the second one,
so that placement does not change with every request."""
_FORGOTTEN_BELOW = 0.01


class Activity:
    """Share of time for which each adapter of a pool is active."""

    def __init__(self) -> None:
        self._shares: dict[str, float] = {}
        self._at: float | None = None
        self.busy: frozenset[str] = frozenset()
        """Adapters that are active much of the time; the same object until they change."""

    def observe(self, active: Collection[str], now: float) -> None:
        """Record the adapters that are active now. `now`: seconds on a monotonic clock."""
        if self._at is None:
            self._at = now
        kept = math.exp(-max(0.0, now - self._at) / MEMORY_SECONDS)
        self._at = now
        shares = {name: share * kept for name, share in self._shares.items()}
        for name in active:
            shares[name] = shares.get(name, 0.0) + 1.0 - kept
        self._shares = {name: share for name, share in shares.items() if share >= _FORGOTTEN_BELOW}
        busy = frozenset(
            name
            for name, share in self._shares.items()
            if share > BUSY_ABOVE or (share >= IDLE_BELOW and name in self.busy)
        )
        if busy != self.busy:
            self.busy = busy
