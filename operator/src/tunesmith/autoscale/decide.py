"""Decide the number of copies of an adapter and of pods of a pool. Pure: the clock is an argument.

Sizes grow at once, by the mean demand of the last `UP_SECONDS`; they shrink only to what the highest demand of the
last `scaleDownDelaySeconds` needs. Nothing shrinks unless demand was completely known for all of that time: not while
a gateway is silent, nor just after the operator has started.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunesmith.api.adapterdeployment import AdapterAutoscaling
    from tunesmith.api.servingpool import PoolAutoscaling

UP_SECONDS = 2.0
MAX_GAP_SECONDS = 10.0
"""Longest gap between samples; in a longer one demand was unobserved: another replica led, or writes failed."""


@dataclass(frozen=True)
class Sample:
    """Demand at one moment.

    `requests`: running and waiting. `complete`: False for a lower bound. `floor`: size that is needed at any load.
    """

    at: float
    requests: int
    complete: bool = True
    floor: int = 0


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

    def requests(self) -> float:
        """Mean requests of the last `UP_SECONDS`."""
        recent = self._last(UP_SECONDS)
        return sum(sample.requests for sample in recent) / len(recent)

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

    def max_requests(self, seconds: float) -> int:
        """Return the highest number of requests in the last `seconds`."""
        return max(sample.requests for sample in self._last(seconds))

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
    return _decide(window, current, rule, ("copy", "copies"), "")


def decide_pods(window: Window, current: int | None, rule: PoolAutoscaling, floor_reason: str) -> Decision:
    """Decide the number of pods of a pool.

    Args:
        window: samples of the demand for the pool's adapters and base together, with `pods_for_copies` as their floor.
        current: desired pods so far; None for a new pool.
        rule: the pool's limits.
        floor_reason: the reason that `pods_for_copies` returned.
    """
    return _decide(window, current, rule, ("pod", "pods"), floor_reason)


def pods_for_copies(copies: Mapping[str, int], slots: int) -> tuple[int, str]:
    """Return the number of pods that the copies of a pool's adapters need, and the reason as a sentence.

    Args:
        copies: number of copies by adapter. Two copies of one adapter never share a pod.
        slots: adapters that one pod holds.
    """
    if not copies:
        return 0, ""
    total = sum(copies.values())
    by_slots = ceil(total / slots)
    largest = max(copies, key=lambda name: (copies[name], name))
    if by_slots > copies[largest]:
        return by_slots, f"{_count(total, ('copy', 'copies'))} of adapters, {_count(slots, ('slot', 'slots'))} per pod"
    return copies[largest], f"{largest} needs {_count(copies[largest], ('copy', 'copies'))}, each on a separate pod"


def loaded_pods(window: Window, rule: PoolAutoscaling) -> int:
    """Return the number of pods that the demand of the last seconds needs."""
    return ceil(window.requests() / rule.target_concurrency)


def _decide(
    window: Window,
    current: int | None,
    rule: AdapterAutoscaling | PoolAutoscaling,
    unit: tuple[str, str],
    floor_reason: str,
) -> Decision:
    low, high, target, delay = (
        rule.min_replicas,
        rule.max_replicas,
        rule.target_concurrency,
        rule.scale_down_delay_seconds,
    )
    current = low if current is None else current
    by_load, floor = ceil(window.requests() / target), window.floor()
    load = f"{_requests(ceil(window.requests()))}, {target} per {unit[0]}"
    if max(by_load, floor) > current:
        size = max(by_load, floor)
        return _limited(size, low, high, f"{load if by_load >= floor else floor_reason}: {_count(size, unit)}")
    if current > low and not window.complete(delay):
        return _limited(
            current, low, high, f"{load}; {_count(current, unit)} until demand has been known for {delay} s"
        )
    peak = window.max_requests(delay)
    size = max(low, ceil(peak / target), window.max_floor(delay))
    if size < current:
        reason = (
            floor_reason
            if floor == size > ceil(peak / target)
            else f"at most {_requests(peak)} in the last {delay} s, {target} per {unit[0]}"
        )
        return _limited(size, low, high, f"{reason}: {_count(size, unit)}")
    return _limited(
        current, low, high, f"{load if by_load >= floor or not floor_reason else floor_reason}: {_count(current, unit)}"
    )


def _limited(size: int, low: int, high: int, sentence: str) -> Decision:
    if size > high:
        return Decision(high, f"{sentence}, limited to {high} by maxReplicas")
    if size < low:
        return Decision(low, f"{sentence}, raised to {low} by minReplicas")
    return Decision(size, sentence)


def _requests(count: int) -> str:
    return f"{count} request{'' if count == 1 else 's'} running or waiting"


def _count(count: int, unit: tuple[str, str]) -> str:
    return f"{count} {unit[0] if count == 1 else unit[1]}"
