"""Decide the number of copies of an adapter and of pods of a pool. Pure: times are arguments.

Sizes follow the mean demand of the last minute. If the mean of the last six seconds needs twice the size, they follow
that one, and nothing shrinks for a minute ("panic"); this is the algorithm of Knative's pod autoscaler
(knative.dev/docs/serving/autoscaling/kpa-specific). They shrink only to what the highest mean of the last
`scaleDownDelaySeconds` needs, at most to half at a time, and to zero only after `idleSeconds` without a request. The
first request of an idle resource counts at once.

Nothing shrinks unless demand was completely known for all of that time: not while a gateway is silent, nor just after
the operator has started.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from tunesmith.autoscale.window import PANIC_SECONDS, STABLE_SECONDS, Figure, Window

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tunesmith.api.autoscaling import Autoscaling
    from tunesmith.autoscale.schedule import Minimum

PANIC_FACTOR = 2.0
"""Multiple of the current size that the demand of the last seconds must need for a panic."""
MAX_GROWTH = 10
"""A size grows at most to this multiple of itself at a time."""
SHRINK_INTERVAL_SECONDS = 10.0
"""Shortest time between two decisions to shrink; each removes at most half."""


@dataclass(frozen=True)
class _Load:
    """A figure that determines sizes, and its highest value per pod or copy."""

    figure: Figure
    target: int
    one: str
    many: str

    def size(self, value: float) -> int:
        """Return the number of copies or pods that a value needs."""
        return ceil(round(value / self.target, 6))

    def count(self, value: float) -> str:
        """Return a value, rounded up, with its unit."""
        return _count(ceil(round(value, 6)), (self.one, self.many))


@dataclass(frozen=True)
class Decision:
    """A size, with the reason as a sentence."""

    replicas: int
    reason: str


@dataclass(frozen=True)
class _Need:
    """A size that something needs, and why."""

    size: int
    reason: str


def decide_copies(window: Window, current: int | None, rule: Autoscaling, low: Minimum) -> Decision:
    """Decide the number of copies of an adapter.

    Args:
        window: samples of the adapter's demand; at least one. Their floor is 1 until the newest revision was loaded.
        current: desired copies so far; None for a new adapter.
        rule: the adapter's limits.
        low: the minimum now; see `schedule.minimum`.
    """
    loads = [_requests(rule.target_concurrency)]
    return _decide(
        window,
        current,
        rule,
        low,
        ("copy", "copies"),
        loads,
        "a new revision is loaded and rolled out without requests too",
    )


def decide_pods(
    window: Window, current: int | None, rule: Autoscaling, low: Minimum, floor_reason: str, slots: int
) -> Decision:
    """Decide the number of pods of a pool.

    Args:
        window: samples of the demand for the pool's adapters and base together, with `pods_for_copies` as their floor
            and the number of active adapters.
        current: desired pods so far; None for a new pool.
        rule: the pool's limits.
        low: the minimum now; see `schedule.minimum`.
        floor_reason: the reason that `pods_for_copies` returned.
        slots: number of adapters that compute on one pod at the same time.
    """
    return _decide(window, current, rule, low, ("pod", "pods"), _pool_loads(rule, slots), floor_reason)


def pods_for_copies(copies: Mapping[str, int], capacity: int) -> tuple[int, str]:
    """Return the number of pods that the copies of a pool's adapters need, and the reason as a sentence.

    Args:
        copies: number of copies by adapter. Two copies of one adapter never share a pod.
        capacity: adapters that one pod holds.
    """
    total = sum(copies.values())
    if not total:
        return 0, ""
    by_capacity = ceil(total / capacity)
    largest = max(copies, key=lambda name: (copies[name], name))
    if by_capacity > copies[largest]:
        return by_capacity, f"{_count(total, ('copy', 'copies'))} of adapters, {capacity} per pod"
    return copies[largest], f"{largest} needs {_count(copies[largest], ('copy', 'copies'))}, each on a separate pod"


def loaded_pods(window: Window, rule: Autoscaling, slots: int) -> int:
    """Return the number of pods that the demand of the last seconds needs."""
    return max(load.size(window.panic(load.figure)) for load in _pool_loads(rule, slots))


def _requests(target: int) -> _Load:
    return _Load("requests", target, "request running or waiting", "requests running or waiting")


def _pool_loads(rule: Autoscaling, slots: int) -> list[_Load]:
    return [_requests(rule.target_concurrency), _Load("active", slots, "active adapter", "active adapters")]


def _decide(
    window: Window,
    current: int | None,
    rule: Autoscaling,
    low: Minimum,
    unit: tuple[str, str],
    loads: Sequence[_Load],
    floor_reason: str = "",
) -> Decision:
    current = low.replicas if current is None else current
    now = window.newest.at
    stable = max((_need(load, window.stable(load.figure), STABLE_SECONDS, unit) for load in loads), key=_size)
    panic = max((_need(load, window.panic(load.figure), PANIC_SECONDS, unit) for load in loads), key=_size)
    if panic.size > 1 and panic.size >= PANIC_FACTOR * current:
        window.panic_until = now + STABLE_SECONDS
    if current or window.newest.requests:
        needs = [stable, *([panic] if now < window.panic_until else [])]
    else:  # past requests bring nothing back from zero
        needs = [_Need(0, stable.reason)]
    if window.newest.requests:  # the first request must not wait for a mean
        needs.append(_Need(1, loads[0].count(window.newest.requests)))
    if window.newest.floor:
        needs.append(_Need(window.newest.floor, floor_reason))
    needed = max(needs, key=_size)
    if needed.size > current:
        return _limited(min(needed.size, MAX_GROWTH * max(current, 1)), low, rule, needed.reason, unit)
    if current <= low.replicas:
        return _limited(current, low, rule, needed.reason or stable.reason, unit)
    if now < window.panic_until:
        rise = f"{needed.reason}; nothing shrinks for {ceil(window.panic_until - now)} s after a steep rise"
        return _limited(current, low, rule, rise, unit)
    delay = rule.scale_down_delay_seconds
    if not window.newest.complete or window.known_seconds() < delay:
        unknown = f"{needed.reason or stable.reason}; nothing shrinks until demand has been known for {delay} s"
        return _limited(current, low, rule, unknown, unit)
    return _shrunk(window, current, rule, low, unit, loads, _Need(window.max_floor(), floor_reason))


def _shrunk(
    window: Window,
    current: int,
    rule: Autoscaling,
    low: Minimum,
    unit: tuple[str, str],
    loads: Sequence[_Load],
    floor: _Need,
) -> Decision:
    """Return the current size, or a smaller one."""
    delay, idle = rule.scale_down_delay_seconds, rule.idle_seconds
    peaks = [_need(load, window.peak(load.figure), STABLE_SECONDS, unit, f" in the last {delay} s") for load in loads]
    needed = max([*peaks, floor], key=_size)
    if needed.size <= 1 and floor.size == 0:  # the last one goes by the time without a request, not by a mean
        if window.idle_seconds() >= idle:
            needed = _Need(0, f"no request for {idle} s")
        elif needed.size == 0:
            needed = _Need(1, f"no request, but for less than {idle} s")
    if needed.size >= current:
        return _limited(current, low, rule, needed.reason, unit)
    if window.newest.at - window.shrunk_at < SHRINK_INTERVAL_SECONDS:
        return _limited(current, low, rule, f"{needed.reason}; the size changed a moment ago", unit)
    window.shrunk_at = window.newest.at
    # The last one goes by itself; of more than one, at most half go at a time.
    size = needed.size if current == 1 else max(needed.size, ceil(current / 2))
    return _limited(size, low, rule, needed.reason, unit)


def _need(load: _Load, value: float, seconds: float, unit: tuple[str, str], past: str = "") -> _Need:
    mean = f"{'at most ' if past else ''}{load.count(value)} on average over {seconds:.0f} s{past}"
    return _Need(load.size(value), f"{mean}, {load.target} per {unit[0]}")


def _size(need: _Need) -> int:
    return need.size


def _limited(size: int, low: Minimum, rule: Autoscaling, reason: str, unit: tuple[str, str]) -> Decision:
    sentence = f"{reason}: {_count(size, unit)}"
    if size < low.replicas:
        size, sentence = low.replicas, f"{sentence}, raised to {low.replicas} by {low.source}"
    if size > rule.max_replicas:
        size, sentence = rule.max_replicas, f"{sentence}, limited to {rule.max_replicas} by maxReplicas"
    return Decision(size, sentence)


def _count(count: int, unit: tuple[str, str]) -> str:
    return f"{count} {unit[0] if count == 1 else unit[1]}"
