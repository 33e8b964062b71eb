"""How many copies of an adapter, how many pods of a pool. Pure: the clock is an argument.

Up at once, from the mean demand of the last `UP_SECONDS`; down only to what the highest demand of the last
`scaleDownDelaySeconds` needs. While demand is not completely known for that long (a gateway is silent, the operator
has just started), nothing shrinks.
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
GAP_SECONDS = 10.0
"""Samples further apart leave time between them that nobody observed: another replica led, or writes failed."""


@dataclass(frozen=True)
class Sample:
    """Demand at one moment.

    `requests`: running and waiting. `complete`: not a lower bound. `floor`: the size that is needed whatever the load.
    """

    at: float
    requests: int
    complete: bool = True
    floor: int = 0


class Window:
    """The samples of the last `scaleDownDelaySeconds` and of the last `UP_SECONDS`."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque()

    def add(self, sample: Sample, keep_seconds: float) -> None:
        """Add the newest sample and forget those that no decision needs any more."""
        self._samples.append(sample)
        horizon = sample.at - max(keep_seconds, UP_SECONDS)
        # One sample at or before the horizon stays: it shows that the whole window was observed.
        while len(self._samples) > 1 and self._samples[1].at <= horizon:
            self._samples.popleft()

    def requests(self) -> float:
        """Mean requests of the last `UP_SECONDS`."""
        recent = self._last(UP_SECONDS)
        return sum(sample.requests for sample in recent) / len(recent)

    def floor(self) -> int:
        """The newest sample's floor."""
        return self._samples[-1].floor

    def complete(self, seconds: float) -> bool:
        """Whether all of the last `seconds` was observed, without a gap and completely."""
        samples, newest = list(self._samples), self._samples[-1].at
        if samples[0].at > newest - seconds or any(not sample.complete for sample in self._last(seconds)):
            return False
        pairs = pairwise(samples)
        return all(later.at - earlier.at <= GAP_SECONDS for earlier, later in pairs if newest - later.at < seconds)

    def most_requests(self, seconds: float) -> int:
        """Most requests of the last `seconds`."""
        return max(sample.requests for sample in self._last(seconds))

    def highest_floor(self, seconds: float) -> int:
        """Highest floor of the last `seconds`."""
        return max(sample.floor for sample in self._last(seconds))

    def _last(self, seconds: float) -> list[Sample]:
        newest = self._samples[-1].at
        return [sample for sample in self._samples if newest - sample.at <= seconds]


@dataclass(frozen=True)
class Decision:
    """A size and why, as a sentence."""

    replicas: int
    reason: str


def decide_copies(window: Window, current: int | None, rule: AdapterAutoscaling) -> Decision:
    """Copies of an adapter.

    Args:
        window: samples of the adapter's demand; at least one.
        current: copies wanted so far; None for a new adapter.
        rule: the adapter's limits.
    """
    return _decide(window, current, rule, ("copy", "copies"), "")


def decide_pods(window: Window, current: int | None, rule: PoolAutoscaling, why_floor: str) -> Decision:
    """Pods of a pool.

    Args:
        window: samples of the demand for the pool's adapters and base together, with `pods_for_copies` as their floor.
        current: pods wanted so far; None for a new pool.
        rule: the pool's limits.
        why_floor: the sentence of `pods_for_copies`.
    """
    return _decide(window, current, rule, ("pod", "pods"), why_floor)


def pods_for_copies(copies: Mapping[str, int], slots: int) -> tuple[int, str]:
    """Pods that the copies of a pool's adapters need, and why.

    Args:
        copies: by adapter. Two copies of one adapter never share a pod.
        slots: adapters that one pod holds.
    """
    if not copies:
        return 0, ""
    total = sum(copies.values())
    by_slots = ceil(total / slots)
    most = max(copies, key=lambda name: (copies[name], name))
    if by_slots > copies[most]:
        return by_slots, f"{_count(total, ('copy', 'copies'))} of adapters, {_count(slots, ('slot', 'slots'))} per pod"
    return copies[most], f"{most} wants {_count(copies[most], ('copy', 'copies'))}, each on a pod of its own"


def loaded_pods(window: Window, rule: PoolAutoscaling) -> int:
    """Pods that the demand of the last seconds needs."""
    return ceil(window.requests() / rule.target_concurrency)


def _decide(
    window: Window,
    current: int | None,
    rule: AdapterAutoscaling | PoolAutoscaling,
    unit: tuple[str, str],
    why_floor: str,
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
        return _limited(size, low, high, f"{load if by_load >= floor else why_floor}: {_count(size, unit)}")
    if current > low and not window.complete(delay):
        return _limited(current, low, high, f"{load}; {_count(current, unit)} while demand is not known for {delay} s")
    most = window.most_requests(delay)
    size = max(low, ceil(most / target), window.highest_floor(delay))
    if size < current:
        reason = (
            why_floor
            if floor == size > ceil(most / target)
            else f"at most {_requests(most)} in the last {delay} s, {target} per {unit[0]}"
        )
        return _limited(size, low, high, f"{reason}: {_count(size, unit)}")
    return _limited(
        current, low, high, f"{load if by_load >= floor or not why_floor else why_floor}: {_count(current, unit)}"
    )


def _limited(wanted: int, low: int, high: int, sentence: str) -> Decision:
    if wanted > high:
        return Decision(high, f"{sentence}, limited to {high} by maxReplicas")
    if wanted < low:
        return Decision(low, f"{sentence}, raised to {low} by minReplicas")
    return Decision(wanted, sentence)


def _requests(count: int) -> str:
    return f"{count} request{'' if count == 1 else 's'} running or waiting"


def _count(count: int, unit: tuple[str, str]) -> str:
    return f"{count} {unit[0] if count == 1 else unit[1]}"
