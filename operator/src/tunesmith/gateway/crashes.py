"""Requests that were in flight when engines crashed, by pool, from the event streams of the pools' agents.

Every gateway reads all agents, so all gateways refuse the same requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.contracts.crash import CrashLedger

if TYPE_CHECKING:
    from collections.abc import Callable

    from tunesmith.contracts.crash import EngineCrash, SuspectRequest


class CrashTable:
    """Ledger of each pool, since a pool's pods must not affect the requests of another.

    Args:
        clock: seconds since 1970.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._ledgers: dict[str, CrashLedger] = {}

    def record(self, pool_uid: str, crash: EngineCrash) -> None:
        """Count a crash that a pod of a pool reported, once."""
        now = self._clock()
        for uid in [uid for uid, ledger in self._ledgers.items() if ledger.is_empty(now)]:
            del self._ledgers[uid]
        self._ledgers.setdefault(pool_uid, CrashLedger()).record(crash, now)

    def has_suspects(self, pool_uid: str) -> bool:
        """Return True if requests were in flight at recent crashes of the pool."""
        return pool_uid in self._ledgers

    def find(self, pool_uid: str, digest: str) -> SuspectRequest | None:
        """Return the crashes of the pool during which a request was in flight; None without any."""
        ledger = self._ledgers.get(pool_uid)
        return None if ledger is None else ledger.find(digest, self._clock())

    def seconds_until_accepted(self, suspect: SuspectRequest) -> float:
        """Return the time for which a request is still refused."""
        return max(0.0, suspect.until - self._clock())
