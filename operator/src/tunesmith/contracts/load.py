"""Arrival rate and service time of a model's requests, as gateways measure them. Pure: times are arguments."""

from __future__ import annotations

import math

RATE_SECONDS = 5.0
"""Time constant of the arrival rate."""
SERVICE_SECONDS = 60.0
"""Time constant of the mean service time."""
NEGLIGIBLE_RATE = 0.01
"""Requests per second; a lower rate is that of no request for 15 s or longer."""


class Load:
    """Exponentially weighted arrival rate and service time; times are seconds on a monotonic clock."""

    __slots__ = ("_arrived", "_arrived_at", "_finished", "_finished_at", "_seconds")

    def __init__(self) -> None:
        self._arrived = self._finished = self._seconds = 0.0
        self._arrived_at = self._finished_at = float("-inf")

    def arrive(self, count: int, now: float) -> None:
        """Record new requests; each counts once, however often it is sent to a pod."""
        self._arrived = self._arrived * _kept(self._arrived_at, now, RATE_SECONDS) + count
        self._arrived_at = now

    def finish(self, count: int, seconds: float, now: float) -> None:
        """Record requests that a pod finished after `seconds` each."""
        kept = _kept(self._finished_at, now, SERVICE_SECONDS)
        self._finished = self._finished * kept + count
        self._seconds = self._seconds * kept + count * seconds
        self._finished_at = now

    def rate(self, now: float) -> float:
        """Return the requests that arrive per second."""
        return self._arrived * _kept(self._arrived_at, now, RATE_SECONDS) / RATE_SECONDS

    @property
    def service_seconds(self) -> float | None:
        """Mean time of recent requests on a pod; None before the first one finished."""
        return self._seconds / self._finished if self._finished else None


def _kept(before: float, now: float, seconds: float) -> float:
    return math.exp(-max(0.0, now - before) / seconds)
