"""Demand over time, with constant cost per sample and per question. Pure: times are arguments."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

STABLE_SECONDS = 60.0
"""Window of the mean that sizes follow, as Knative's stable window (knative.dev/docs/serving/autoscaling/kpa-specific).
"""
PANIC_SECONDS = 6.0
"""Window of the mean that sizes follow while demand rises steeply: a tenth of the stable window, as Knative's."""
MAX_GAP_SECONDS = 10.0
"""Longest gap between samples; in a longer one demand was unobserved: another replica led, or writes failed."""

Figure = Literal["requests", "active"]


@dataclass(frozen=True)
class Sample:
    """Demand at one moment.

    `at`: seconds on a monotonic clock. `requests`: running and waiting. `complete`: False for a lower bound. `floor`:
    size that is needed at any load. `active`: number of adapters with requests.
    """

    at: float
    requests: int
    complete: bool = True
    floor: int = 0
    active: int = 0


class _Mean:
    """Mean of a figure that holds from each sample until the next one, over the last `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._steps: deque[tuple[float, int, float]] = deque()
        """Time, value, and the integral of the figure up to that time."""

    def add(self, at: float, value: int) -> None:
        if self._steps:
            last, held, integral = self._steps[-1]
            integral += held * (at - last)
        else:
            integral = 0.0
        self._steps.append((at, value, integral))
        # The first step is the one that held at the window's start.
        while len(self._steps) > 1 and self._steps[1][0] <= at - self._seconds:
            self._steps.popleft()

    def value(self) -> float:
        first, held, integral = self._steps[0]
        now, newest, total = self._steps[-1]
        start = max(first, now - self._seconds)
        if now == start:
            return float(newest)
        return (total - integral - held * (start - first)) / (now - start)


class _Peak:
    """Highest value of the last seconds."""

    def __init__(self) -> None:
        self._values: deque[tuple[float, float]] = deque()

    def add(self, at: float, value: float, keep_seconds: float) -> None:
        while self._values and self._values[-1][1] <= value:
            self._values.pop()
        self._values.append((at, value))
        while self._values[0][0] < at - keep_seconds:
            self._values.popleft()

    def value(self) -> float:
        return self._values[0][1]


class _Trace:
    """One figure of the samples."""

    def __init__(self) -> None:
        self.stable, self.panic, self.peak = _Mean(STABLE_SECONDS), _Mean(PANIC_SECONDS), _Peak()

    def add(self, at: float, value: int, keep_seconds: float) -> None:
        self.stable.add(at, value)
        self.panic.add(at, value)
        self.peak.add(at, self.stable.value(), keep_seconds)


class Window:
    """Samples of an adapter's or a pool's demand, and what the decisions need to remember.

    Attributes:
        newest: the latest sample.
        panic_until: time until which no size shrinks, because demand rose steeply.
        shrunk_at: time of the latest decision to shrink.
    """

    def __init__(self) -> None:
        self._traces: dict[Figure, _Trace] = {"requests": _Trace(), "active": _Trace()}
        self._floor = _Peak()
        self._keep_seconds = 0.0
        self._unknown_at = float("-inf")
        self._busy_at = float("-inf")
        self.newest = Sample(float("-inf"), 0)
        self.panic_until = self.shrunk_at = float("-inf")

    def add(self, sample: Sample, keep_seconds: float) -> None:
        """Add a sample that is newer than all others. `keep_seconds`: how far back `peak` and `max_floor` look."""
        unobserved = sample.at - self.newest.at > MAX_GAP_SECONDS  # also true for the first sample
        # Samples that a shorter delay needed no more are missing for a longer one.
        if unobserved or not sample.complete or keep_seconds > self._keep_seconds:
            self._unknown_at = sample.at
        self._keep_seconds = keep_seconds
        if sample.requests:
            self._busy_at = sample.at
        for figure, trace in self._traces.items():
            trace.add(sample.at, getattr(sample, figure), keep_seconds)
        self._floor.add(sample.at, sample.floor, keep_seconds)
        self.newest = sample

    def stable(self, figure: Figure) -> float:
        """Mean of the last `STABLE_SECONDS`."""
        return self._traces[figure].stable.value()

    def panic(self, figure: Figure) -> float:
        """Mean of the last `PANIC_SECONDS`."""
        return self._traces[figure].panic.value()

    def peak(self, figure: Figure) -> float:
        """Highest stable mean of the last `keep_seconds`."""
        return self._traces[figure].peak.value()

    def max_floor(self) -> int:
        """Return the highest floor of the last `keep_seconds`."""
        return int(self._floor.value())

    def known_seconds(self) -> float:
        """Seconds for which demand has been completely known without a gap."""
        return self.newest.at - self._unknown_at

    def idle_seconds(self) -> float:
        """Seconds for which it has been known that there is no request."""
        return 0.0 if self.newest.requests else self.newest.at - max(self._busy_at, self._unknown_at)
