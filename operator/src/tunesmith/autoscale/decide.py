"""Decide the number of copies of an adapter and of pods of a pool. Pure: the clock is an argument.

Sizes grow at once, by the mean demand of the last `UP_SECONDS`: requests and, for pods, adapters with requests. They
shrink only to what the highest demand of the last `scaleDownDelaySeconds` needs. Nothing shrinks unless demand was
completely known for all of that time: not while a gateway is silent, nor just after the operator has started.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tunesmith.api.adapterdeployment import AdapterAutoscaling
    from tunesmith.api.servingpool import PoolAutoscaling

UP_SECONDS = 2.0
MAX_GAP_SECONDS = 10.0
"""Longest gap between samples; in a longer one demand was unobserved: another replica led, or writes failed."""


@dataclass(frozen=True)
class Sample:
    """Demand at one moment.

    `requests`: running and waiting. `complete`: False for a lower bound. `floor`: size that is needed at any load.
    `active`: number of adapters with requests.
    """

    at: float
    requests: int
    complete: bool = True
    floor: int = 0
    active: int = 0


@dataclass(frozen=True)
class _Load:
    """A figure of a sample that determines sizes, and its highest value per pod or copy."""

    field: str
    target: int
    one: str
    many: str

    def of(self, sample: Sample) -> int:
        value: int = getattr(sample, self.field)
        return value

    def count(self, value: float) -> str:
        """Return a value, rounded up, with its unit."""
        return _count(ceil(value), (self.one, self.many))

    def sentence(self, value: float, unit: str) -> str:
        return f"{self.count(value)}, {self.target} per {unit}"


class Window:
    """Samples of the last `scaleDownDelaySeconds` and of the last `UP_SECONDS`."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque()

    def add(self, sample: Sample, keep_seconds: float) -> None:
        """Add the newest sample and remove those that no decision needs any more."""
        self._samples.append(sample)
        horizon = sample.at - max(keep_seconds, UP_SECONDS)
        # One sample at or before the horizon stays, as proof that the whole window was observed.
        while len(self._samples) > 1 and self._samples[1].at <= horizon:
            self._samples.popleft()

    def mean(self, load: _Load) -> float:
        """Mean of a load in the last `UP_SECONDS`."""
        recent = self._last(UP_SECONDS)
        return sum(load.of(sample) for sample in recent) / len(recent)

    def floor(self) -> int:
        """Floor of the newest sample."""
        return self._samples[-1].floor

    def complete(self, seconds: float) -> bool:
        """Return True if demand was observed completely, without a gap, for the last `seconds`."""
        samples, newest = list(self._samples), self._samples[-1].at
        if samples[0].at > newest - seconds or any(not sample.complete for sample in self._last(seconds)):
            return False
        pairs = pairwise(samples)
        return all(later.at - earlier.at <= MAX_GAP_SECONDS for earlier, later in pairs if newest - later.at < seconds)

    def maximum(self, load: _Load, seconds: float) -> int:
        """Return the highest value of a load in the last `seconds`."""
        return max(load.of(sample) for sample in self._last(seconds))

    def max_floor(self, seconds: float) -> int:
        """Return the highest floor in the last `seconds`."""
        return max(sample.floor for sample in self._last(seconds))

    def _last(self, seconds: float) -> list[Sample]:
        newest = self._samples[-1].at
        return [sample for sample in self._samples if newest - sample.at <= seconds]


@dataclass(frozen=True)
class Decision:
    """A size, with the reason as a sentence."""

    replicas: int
    reason: str


def decide_copies(window: Window, current: int | None, rule: AdapterAutoscaling) -> Decision:
    """Decide the number of copies of an adapter.

    Args:
        window: samples of the adapter's demand; at least one.
        current: desired copies so far; None for a new adapter.
        rule: the adapter's limits.
    """
    return _decide(window, current, rule, ("copy", "copies"), [_requests(rule.target_concurrency)])


def decide_pods(window: Window, current: int | None, rule: PoolAutoscaling, floor_reason: str, slots: int) -> Decision:
    """Decide the number of pods of a pool.

    Args:
        window: samples of the demand for the pool's adapters and base together, with `pods_for_copies` as their floor
            and the number of active adapters.
        current: desired pods so far; None for a new pool.
        rule: the pool's limits.
        floor_reason: the reason that `pods_for_copies` returned.
        slots: number of adapters that compute on one pod at the same time.
    """
    return _decide(window, current, rule, ("pod", "pods"), _pool_loads(rule, slots), floor_reason)


def pods_for_copies(copies: Mapping[str, int], capacity: int) -> tuple[int, str]:
    """Return the number of pods that the copies of a pool's adapters need, and the reason as a sentence.

    Args:
        copies: number of copies by adapter. Two copies of one adapter never share a pod.
        capacity: adapters that one pod holds.
    """
    if not copies:
        return 0, ""
    total = sum(copies.values())
    by_capacity = ceil(total / capacity)
    largest = max(copies, key=lambda name: (copies[name], name))
    if by_capacity > copies[largest]:
        return by_capacity, f"{_count(total, ('copy', 'copies'))} of adapters, {capacity} per pod"
    return copies[largest], f"{largest} needs {_count(copies[largest], ('copy', 'copies'))}, each on a separate pod"


def loaded_pods(window: Window, rule: PoolAutoscaling, slots: int) -> int:
    """Return the number of pods that the demand of the last seconds needs."""
    return max(ceil(window.mean(load) / load.target) for load in _pool_loads(rule, slots))


def _requests(target: int) -> _Load:
    return _Load("requests", target, "request running or waiting", "requests running or waiting")


def _pool_loads(rule: PoolAutoscaling, slots: int) -> list[_Load]:
    return [_requests(rule.target_concurrency), _Load("active", slots, "active adapter", "active adapters")]


def _decide(
    window: Window,
    current: int | None,
    rule: AdapterAutoscaling | PoolAutoscaling,
    unit: tuple[str, str],
    loads: Sequence[_Load],
    floor_reason: str = "",
) -> Decision:
    low, high, delay = rule.min_replicas, rule.max_replicas, rule.scale_down_delay_seconds
    current = low if current is None else current
    decisive = max(loads, key=lambda load: ceil(window.mean(load) / load.target))
    by_load, floor = ceil(window.mean(decisive) / decisive.target), window.floor()
    sentence = decisive.sentence(window.mean(decisive), unit[0])
    if max(by_load, floor) > current:
        size = max(by_load, floor)
        return _limited(size, low, high, f"{sentence if by_load >= floor else floor_reason}: {_count(size, unit)}")
    if current > low and not window.complete(delay):
        return _limited(
            current, low, high, f"{sentence}; {_count(current, unit)} until demand has been known for {delay} s"
        )
    highest = max(loads, key=lambda load: ceil(window.maximum(load, delay) / load.target))
    peak = window.maximum(highest, delay)
    by_peak = ceil(peak / highest.target)
    size = max(low, by_peak, window.max_floor(delay))
    if size < current:
        seen = f"at most {highest.count(peak)} in the last {delay} s, {highest.target} per {unit[0]}"
        reason = floor_reason if floor == size > by_peak else seen
        return _limited(size, low, high, f"{reason}: {_count(size, unit)}")
    return _limited(
        current,
        low,
        high,
        f"{sentence if by_load >= floor or not floor_reason else floor_reason}: {_count(current, unit)}",
    )


def _limited(size: int, low: int, high: int, sentence: str) -> Decision:
    if size > high:
        return Decision(high, f"{sentence}, limited to {high} by maxReplicas")
    if size < low:
        return Decision(low, f"{sentence}, raised to {low} by minReplicas")
    return Decision(size, sentence)


def _count(count: int, unit: tuple[str, str]) -> str:
    return f"{count} {unit[0] if count == 1 else unit[1]}"
