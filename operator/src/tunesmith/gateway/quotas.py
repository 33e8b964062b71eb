"""Limits of API keys: requests per minute, and sequences at once.

A key's limits are divided by the number of gateway replicas; each replica counts its own part. A load balancer that
spreads requests unevenly therefore makes a key reach its limit early, never late.
"""

from __future__ import annotations

import math
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from tunesmith.gateway import errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tunesmith.contracts.apikey import ApiKey


class Quotas:
    """The use of API keys that have limits.

    Args:
        replicas: number of gateways that share the limits.
        wall_clock: Unix time in seconds.
    """

    def __init__(self, replicas: int, *, wall_clock: Callable[[], float]) -> None:
        self._replicas = replicas
        self._wall_clock = wall_clock
        self._requests = SlidingWindowCounterRateLimiter(MemoryStorage())
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
        seconds = max(1, math.ceil(reset_time - self._wall_clock()))
        headers = {
            "x-ratelimit-limit-requests": str(limit),
            "x-ratelimit-remaining-requests": str(remaining),
            "x-ratelimit-reset-requests": f"{seconds}s",
        }
        if not accepted:
            raise errors.too_many_requests(limit, seconds, headers)
        return headers

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

    def _part(self, limit: int) -> int:
        return math.ceil(limit / self._replicas)
