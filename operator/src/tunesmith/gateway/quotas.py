"""Limits of API keys: requests per minute, tokens per minute and day, and sequences at once.

A key's limits are divided by the number of gateway replicas; each replica counts its own part. A load balancer that
spreads requests unevenly therefore makes a key reach its limit early, never late.
"""

from __future__ import annotations

import math
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from limits import RateLimitItemPerDay, RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import FixedWindowRateLimiter, SlidingWindowCounterRateLimiter

from tunesmith.gateway import errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from limits import RateLimitItem

    from tunesmith.contracts.apikey import ApiKey


_TOKENS = "tokens"


@dataclass(frozen=True, slots=True)
class Reservation:
    """Tokens that are reserved for a request.

    Attributes:
        key: name of the API key.
        tokens: number of tokens.
        windows: the limits they count towards, with the Unix time in seconds at which each starts again.
        headers: what is left of the limit per minute.
    """

    key: str
    tokens: int
    windows: tuple[tuple[RateLimitItem, float], ...]
    headers: dict[str, str]


class Quotas:
    """The use of API keys that have limits.

    Args:
        replicas: number of gateways that share the limits.
        wall_clock: Unix time in seconds.
    """

    def __init__(self, replicas: int, *, wall_clock: Callable[[], float]) -> None:
        self._replicas = replicas
        self._wall_clock = wall_clock
        self._storage = MemoryStorage()
        self._requests = SlidingWindowCounterRateLimiter(self._storage)
        self._tokens = FixedWindowRateLimiter(self._storage)
        self._running: Counter[str] = Counter()

    async def count_request(self, key: ApiKey) -> dict[str, str]:
        """Count a request, and return the headers by which OpenAI's clients see what is left of the key's limit.

        Raises:
            ApiError: 429, the key has used up its requests of the last minute.
        """
        limit = key.requests_per_minute
        if limit is None:
            return {}
        item = RateLimitItemPerMinute(self._part(limit))
        accepted = await self._requests.hit(item, key.name)
        reset_time, remaining = await self._requests.get_window_stats(item, key.name)
        seconds = self._seconds_until(reset_time)
        headers = _headers("requests", limit, remaining, seconds)
        if not accepted:
            raise errors.too_many_requests(limit, seconds, headers)
        return headers

    async def reserve_tokens(self, key: ApiKey, tokens: int) -> Reservation | None:
        """Reserve tokens for a request, or return None if the key has no limit of tokens.

        Raises:
            ApiError: 429, the key's tokens of the minute or the day are used up; 400, the request alone needs more.
        """
        limits = {
            "minute": (key.tokens_per_minute, RateLimitItemPerMinute),
            "day": (key.tokens_per_day, RateLimitItemPerDay),
        }
        smallest = min((self._part(limit) for limit, _ in limits.values() if limit is not None), default=None)
        if smallest is None:
            return None
        if tokens > smallest:
            raise errors.too_many_tokens_for_key(tokens, smallest)
        windows: list[tuple[RateLimitItem, float]] = []
        headers: dict[str, str] = {}
        for unit, (limit, per_unit) in limits.items():
            if limit is None:
                continue
            item = per_unit(self._part(limit))
            accepted = await self._tokens.hit(item, _TOKENS, key.name, cost=tokens)
            reset_time, remaining = await self._tokens.get_window_stats(item, _TOKENS, key.name)
            windows.append((item, reset_time))
            seconds = self._seconds_until(reset_time)
            if not accepted:
                await self.settle_tokens(Reservation(key.name, tokens, tuple(windows), {}), 0)
                raise errors.too_many_tokens(limit, unit, seconds)
            if unit == "minute":
                headers = _headers("tokens", limit, remaining, seconds)
        return Reservation(key.name, tokens, tuple(windows), headers)

    async def settle_tokens(self, reservation: Reservation, used: int) -> None:
        """Count the tokens that a request used, instead of those reserved for it.

        A window that ended meanwhile keeps its count.
        """
        for item, reset_time in reservation.windows:
            if self._wall_clock() < reset_time and used != reservation.tokens:
                storage_key = item.key_for(_TOKENS, reservation.key)
                await self._storage.incr(storage_key, item.get_expiry(), amount=used - reservation.tokens)

    @contextmanager
    def running(self, key: ApiKey, sequences: int) -> Iterator[None]:
        """Count sequences while their request is held and answered.

        Raises:
            ApiError: 429, the key has as many sequences running as it may; 400, the request alone has more.
        """
        limit = key.max_concurrency
        if limit is None:
            yield
            return
        if sequences > self._part(limit):
            raise errors.too_many_sequences_for_key(sequences, self._part(limit))
        if self._running[key.name] + sequences > self._part(limit):
            raise errors.too_many_running(limit)
        self._running[key.name] += sequences
        try:
            yield
        finally:
            self._running[key.name] -= sequences
            if not self._running[key.name]:
                del self._running[key.name]

    def _seconds_until(self, reset_time: float) -> int:
        return max(1, math.ceil(reset_time - self._wall_clock()))

    def _part(self, limit: int) -> int:
        return math.ceil(limit / self._replicas)


def _headers(what: str, limit: int, remaining: int, seconds: int) -> dict[str, str]:
    """Return OpenAI's headers about a limit of requests or tokens."""
    return {
        f"x-ratelimit-limit-{what}": str(limit),
        f"x-ratelimit-remaining-{what}": str(remaining),
        f"x-ratelimit-reset-{what}": f"{seconds}s",
    }
