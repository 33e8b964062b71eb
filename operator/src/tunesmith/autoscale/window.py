"""Demand over time, with constant cost per sample and per question. Pure: times are arguments."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

if TYPE_CHECKING:
    from tunesmith.autoscale.demand import Demand

STABLE_SECONDS = 60.0
"""Window of the mean that sizes follow, as Knative's stable window (knative.dev/docs/serving/autoscaling/kpa-specific).
"""
PANIC_SECONDS = 6.0
"""Window of the mean that sizes follow while demand rises steeply: a tenth of the stable window, as Knative's."""
MAX_GAP_SECONDS = 10.0
"""Longest gap between samples; in a longer one demand was unobserved: another replica led, or writes failed."""

STEEP_DEVIATIONS = 3.0
"""Rise over the last minute's mean that chance does not explain, in standard deviations: requests that arrive
independently of each other vary by the square root of their mean number. The size of a large pool rarely doubles."""

Figure = Literal["load", "active"]


@dataclass(frozen=True)
class Sample:
    """Demand at one moment.

    Attributes:
        at: seconds on a monotonic clock.
        requests: those running and waiting.
        complete: False for a lower bound.
        floor: size that is needed at any load.
        active: number of adapters with requests.
        running: requests on pods; None: all.
        offered: see `demand.Demand`.
        backlog: see `demand.Demand`.
    """

    at: float
    requests: int
    complete: bool = True
    floor: int = 0
    active: int = 0
    running: int | None = None
    offered: float = 0.0
    backlog: float = 0.0

    @classmethod
    def of(cls, demand: Demand, at: float, floor: int = 0) -> Self:
        """Return the sample of a demand."""
        return cls(
            at,
            demand.requests,
            demand.complete,
            floor,
            demand.active,
            demand.running,
            demand.offered,
            demand.backlog,
        )


class Means(NamedTuple):
    """Means over some seconds; see `Sample`."""

    running: float
    offered: float
    backlog: float
    active: float

    @property
    def load(self) -> float:
        """Requests for which there should be room on pods.

        The running ones are fewer than the offered ones while there is no room for them; they then wait, and count in
        the backlog.
        """
        return max(self.running, self.offered) + self.backlog


_Step = tuple[float, float, float, float, float, float, float, float, float]
"""Time; running, offered, backlog and active from then on; and the integral of each up to then."""


class _Steps:
    """Figures that hold from each sample until the next one, and their means over the last seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._steps: deque[_Step] = deque()

    def add(self, at: float, running: float, offered: float, backlog: float, active: float) -> None:
        steps = self._steps
        if not steps:
            steps.append((at, running, offered, backlog, active, 0.0, 0.0, 0.0, 0.0))
            return
        last, held_running, held_offered, held_backlog, held_active, *integrals = steps[-1]
        gap = at - last
        steps.append(
            (
                at,
                running,
                offered,
                backlog,
                active,
                integrals[0] + held_running * gap,
                integrals[1] + held_offered * gap,
                integrals[2] + held_backlog * gap,
                integrals[3] + held_active * gap,
            )
        )
        # The first step is the one that held at the window's start.
        while steps[1][0] <= at - self._seconds:
            steps.popleft()

    def means(self) -> Means:
        first, newest = self._steps[0], self._steps[-1]
        now = newest[0]
        start = max(first[0], now - self._seconds)
        if now == start:
            return Means(*newest[1:5])
        skipped, length = start - first[0], now - start
        running, offered, backlog, active = (
            (newest[place + 4] - first[place + 4] - first[place] * skipped) / length for place in (1, 2, 3, 4)
        )
        return Means(running, offered, backlog, active)


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


def is_steep(load: float, usual: float) -> bool:
    """Return True if a load exceeds the usual one by more than chance explains."""
    usual = max(0.0, usual)  # a mean of zeros may be negative by rounding
    return load > usual + STEEP_DEVIATIONS * math.sqrt(usual)


class Window:
    """Samples of an adapter's or a pool's demand, and what the decisions need to remember.

    Attributes:
        newest: the latest sample.
        stable: means of the last `STABLE_SECONDS`.
        panic: means of the last `PANIC_SECONDS`.
        panic_until: time until which no size shrinks, because demand rose steeply.
        shrunk_at: time of the latest decision to shrink.
    """

    def __init__(self) -> None:
        self._stable, self._panic = _Steps(STABLE_SECONDS), _Steps(PANIC_SECONDS)
        self._peaks: dict[Figure, _Peak] = {"load": _Peak(), "active": _Peak()}
        self._floor = _Peak()
        self._keep_seconds = 0.0
        self._unknown_at = float("-inf")
        self._busy_at = float("-inf")
        self.newest = Sample(float("-inf"), 0)
        self.stable = self.panic = Means(0.0, 0.0, 0.0, 0.0)
        self.panic_until = self.shrunk_at = float("-inf")

    def add(self, sample: Sample, keep_seconds: float) -> None:
        """Add a sample that is newer than all others. `keep_seconds`: how far back `peak` and `max_floor` look."""
        unobserved = sample.at - self.newest.at > MAX_GAP_SECONDS  # also true for the first sample
        # Samples that a shorter delay needed no more are missing for a longer one.
        if unobserved or not sample.complete or keep_seconds > self._keep_seconds:
            self._unknown_at = sample.at
        self._keep_seconds = keep_seconds
        if sample.requests or sample.offered:  # short requests are rarely seen while they run
            self._busy_at = sample.at
        running = sample.requests if sample.running is None else sample.running
        for steps in (self._stable, self._panic):
            steps.add(sample.at, float(running), sample.offered, sample.backlog, float(sample.active))
        self.stable, self.panic = self._stable.means(), self._panic.means()
        load, recent = self.stable.load, self.panic.load
        # A size that a steep rise would bring back at once is not given up.
        self._peaks["load"].add(sample.at, recent if is_steep(recent, load) else load, keep_seconds)
        self._peaks["active"].add(sample.at, self.stable.active, keep_seconds)
        self._floor.add(sample.at, sample.floor, keep_seconds)
        self.newest = sample

    def peak(self, figure: Figure) -> float:
        """Highest stable mean of the last `keep_seconds`, or panic mean where it was steep."""
        return self._peaks[figure].value()

    def max_floor(self) -> int:
        """Return the highest floor of the last `keep_seconds`."""
        return int(self._floor.value())

    def known_seconds(self) -> float:
        """Seconds for which demand has been completely known without a gap."""
        return self.newest.at - self._unknown_at

    def idle_seconds(self) -> float:
        """Seconds for which it has been known that there is no request."""
        return 0.0 if self.newest.requests else self.newest.at - max(self._busy_at, self._unknown_at)
