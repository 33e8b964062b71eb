"""A day of requests for many adapters: a daily cycle, popularity by Zipf's law, and bursts of single adapters."""

from __future__ import annotations

import bisect
import itertools
import math
import random
from typing import TYPE_CHECKING

from tunesmith.autoscale.simulate import Arrival

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

DAY_SECONDS = 86400.0
MEAN_RATE = 3.0
"""Requests per second, without the bursts."""
NIGHT = 0.15
"""Rate at the quietest time, as a share of the highest."""
MEAN_SECONDS, SIGMA = 15.0, 0.8
"""Mean duration of a request, and the standard deviation of its logarithm: most are short, some take minutes."""
BURSTS_PER_HOUR = 2.0
BURST_SECONDS = (60.0, 900.0)
BURST_RATE = (0.5, 2.5)
"""Range of a burst's length, and of its requests per second."""


def day(adapters: int = 200, seconds: float = DAY_SECONDS, seed: int = 1) -> list[Arrival]:
    """Return the requests of a day that begins at midnight, sorted by time."""
    source = random.Random(seed)  # noqa: S311 - not for secrets
    names = [f"team/adapter-{number:03}" for number in range(adapters)]
    shares = list(itertools.accumulate(1 / (rank + 1) for rank in range(adapters)))
    found = list(_cycle(source, names, shares, seconds))
    for at in _poisson(source, BURSTS_PER_HOUR / 3600, 0.0, seconds):
        name = _pick(source, names, shares)
        end = min(seconds, at + source.uniform(*BURST_SECONDS))
        found += [
            Arrival(when, name, _duration(source)) for when in _poisson(source, source.uniform(*BURST_RATE), at, end)
        ]
    return sorted(found, key=lambda arrival: arrival.at)


def rate(at: float) -> float:
    """Return the requests per second at a time of the day, without bursts; the lowest is at 4:00."""
    wave = (1 - math.cos(2 * math.pi * (at - 4 * 3600) / DAY_SECONDS)) / 2
    return MEAN_RATE * (NIGHT + (1 - NIGHT) * wave) / ((1 + NIGHT) / 2)


def _cycle(source: random.Random, names: Sequence[str], shares: Sequence[float], seconds: float) -> Iterator[Arrival]:
    highest = rate(16 * 3600)
    for at in _poisson(source, highest, 0.0, seconds):
        if source.random() * highest < rate(at):
            yield Arrival(at, _pick(source, names, shares), _duration(source))


def _poisson(source: random.Random, per_second: float, start: float, end: float) -> Iterator[float]:
    at = start + source.expovariate(per_second)
    while at < end:
        yield at
        at += source.expovariate(per_second)


def _pick(source: random.Random, names: Sequence[str], shares: Sequence[float]) -> str:
    return names[bisect.bisect(shares, source.random() * shares[-1])]


def _duration(source: random.Random) -> float:
    return source.lognormvariate(math.log(MEAN_SECONDS) - SIGMA**2 / 2, SIGMA)
