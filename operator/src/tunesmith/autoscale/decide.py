"""Decide the number of copies of an adapter and of pods of a pool. Pure: times are arguments.

Sizes follow the mean demand of the last minute. If the mean of the last six seconds needs twice the size, or is higher
than that of the last minute by more than chance explains, they follow that one, and nothing shrinks for a minute
("panic"); without the second condition this is the algorithm of Knative's pod autoscaler
(knative.dev/docs/serving/autoscaling/kpa-specific). They shrink only to what the highest mean of the last
`scaleDownDelaySeconds` needs, at most to half at a time, and to zero only after `idleSeconds` without a request. The
first request of an idle resource counts at once.

Nothing shrinks unless demand was completely known for all of that time: not while a gateway is silent, nor just after
the operator has started.

A decision is a function of its `Inputs` alone, which can be recorded and decided again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from typing import TYPE_CHECKING, Literal, NamedTuple

from tunesmith.autoscale.window import PANIC_SECONDS, STABLE_SECONDS, Means, Window, is_steep

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tunesmith.api.autoscaling import Autoscaling
    from tunesmith.autoscale.schedule import Minimum

PANIC_FACTOR = 2.0
"""Multiple of the current size that the demand of the last seconds must need for a panic."""
MAX_GROWTH = 10
"""A size grows at most to this multiple of itself at a time."""
SHRINK_INTERVAL_SECONDS = 10.0
"""Shortest time between two decisions to shrink; each removes at most half."""
_TICK_SECONDS, _CALM_TICK_SECONDS, _QUIET_TICK_SECONDS = 1.0, 3.0, 9.0
"""Time between two decisions about an adapter: normally; while a copy is used by less than half; and without requests.
The last one is below `window.MAX_GAP_SECONDS`, so that the time counts as observed; the first request makes a decision
due at once."""
_NEW_REVISION = "a new revision is loaded and rolled out without requests too"
_SEEN = ("request running or waiting", "requests running or waiting")
_ESTIMATED = (
    "request at once by arrivals, durations and backlog",
    "requests at once by arrivals, durations and backlog",
)
_ACTIVE = ("active adapter", "active adapters")
_UNITS = {"copy": ("copy", "copies"), "pod": ("pod", "pods")}


@dataclass(frozen=True)
class Inputs:
    """Everything that a decision depends on. Times are in seconds.

    Attributes:
        unit: thing that is counted.
        current: desired number so far; None for a new resource.
        minimum: lowest number now.
        minimum_source: where it comes from.
        maximum: highest number.
        target: highest mean number of requests per copy or pod.
        slots: adapters that compute on one pod at once; None for copies.
        delay_seconds: time for which a smaller number must suffice.
        idle_seconds: time without a request after which the last one goes.
        requests: those running and waiting now.
        complete: True if every gateway reports.
        stable: means of the last `STABLE_SECONDS`.
        panic: means of the last `PANIC_SECONDS`.
        peak_load: highest load within the delay; see `Window.peak`.
        peak_active: highest stable number of active adapters within the delay.
        floor: number that is needed at any load.
        floor_reason: the reason, as a sentence.
        highest_floor: highest floor within the delay.
        known_seconds: time for which demand has been completely known.
        quiet_seconds: time for which it has been known that there is no request.
        panic_seconds: time for which nothing shrinks after a steep rise.
        rest_seconds: time for which nothing shrinks after the last time it did.
    """

    unit: Literal["copy", "pod"]
    current: int | None
    minimum: int
    minimum_source: str
    maximum: int
    target: int
    slots: int | None
    delay_seconds: int
    idle_seconds: int
    requests: int
    complete: bool
    stable: Means
    panic: Means
    peak_load: float
    peak_active: float
    floor: int
    floor_reason: str
    highest_floor: int
    known_seconds: float
    quiet_seconds: float
    panic_seconds: float
    rest_seconds: float


@dataclass(frozen=True)
class Decision:
    """A size, with the reason as a sentence.

    Attributes:
        replicas: the size.
        reason: the reason.
        panics: True if demand rose steeply just now.
        shrinks: True if the size is smaller by this decision.
        inputs: what it depends on; None for a size that is not decided, but set.
    """

    replicas: int
    reason: str
    panics: bool = field(default=False, compare=False)
    shrinks: bool = field(default=False, compare=False)
    inputs: Inputs | None = field(default=None, compare=False)


class _Need(NamedTuple):
    """A size that something needs, and a function that returns the reason; most reasons are never read."""

    size: int
    reason: Callable[[], str]


def decide_copies(window: Window, current: int | None, rule: Autoscaling, low: Minimum) -> Decision:
    """Decide the number of copies of an adapter.

    Args:
        window: samples of the adapter's demand; at least one. Their floor is 1 until the newest revision was loaded.
        current: desired copies so far; None for a new adapter.
        rule: the adapter's limits.
        low: the minimum now; see `schedule.minimum`.
    """
    return _decide_and_remember(window, _inputs("copy", window, current, rule, low, _NEW_REVISION))


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
    return _decide_and_remember(window, _inputs("pod", window, current, rule, low, floor_reason, slots))


def seconds_until_next(window: Window, copies: int, rule: Autoscaling, low: Minimum) -> float:
    """Return the time until the next decision about an adapter is due.

    Args:
        window: samples of its demand.
        copies: number of its copies, as decided now.
        rule: its limits.
        low: the minimum now.
    """
    load = max(window.newest.requests, window.newest.offered)
    if copies > max(1, low.replicas):
        return _TICK_SECONDS
    if load:
        return _CALM_TICK_SECONDS if 2 * load < copies * rule.target_concurrency else _TICK_SECONDS
    if copies > low.replicas:  # the last one goes after some time without a request
        return min(_QUIET_TICK_SECONDS, max(_TICK_SECONDS, rule.idle_seconds - window.idle_seconds()))
    return _QUIET_TICK_SECONDS


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
    most = max(copies.values())
    if by_capacity > most:
        return by_capacity, f"{_count(total, ('copy', 'copies'))} of adapters, {capacity} per pod"
    largest = max(name for name, count in copies.items() if count == most)
    return most, f"{largest} needs {_count(most, ('copy', 'copies'))}, each on a separate pod"


def loaded_pods(window: Window, rule: Autoscaling, slots: int) -> int:
    """Return the number of pods that the demand of the last seconds needs."""
    return max(_size(window.panic.load, rule.target_concurrency), _size(window.panic.active, slots))


def decide(inputs: Inputs) -> Decision:
    """Decide a size."""
    return _Choice(inputs).decision()


def _inputs(
    unit: Literal["copy", "pod"],
    window: Window,
    current: int | None,
    rule: Autoscaling,
    low: Minimum,
    floor_reason: str,
    slots: int | None = None,
) -> Inputs:
    newest = window.newest
    return Inputs(
        unit=unit,
        current=current,
        minimum=low.replicas,
        minimum_source=low.source,
        maximum=rule.max_replicas,
        target=rule.target_concurrency,
        slots=slots,
        delay_seconds=rule.scale_down_delay_seconds,
        idle_seconds=rule.idle_seconds,
        requests=newest.requests,
        complete=newest.complete,
        stable=window.stable,
        panic=window.panic,
        peak_load=window.peak("load"),
        peak_active=window.peak("active"),
        floor=newest.floor,
        floor_reason=floor_reason,
        highest_floor=window.max_floor(),
        known_seconds=window.known_seconds(),
        quiet_seconds=window.idle_seconds(),
        panic_seconds=max(0.0, window.panic_until - newest.at),
        rest_seconds=max(0.0, window.shrunk_at + SHRINK_INTERVAL_SECONDS - newest.at),
    )


def _decide_and_remember(window: Window, inputs: Inputs) -> Decision:
    decision = decide(inputs)
    if decision.panics:
        window.panic_until = window.newest.at + STABLE_SECONDS
    if decision.shrinks:
        window.shrunk_at = window.newest.at
    return decision


class _Choice:
    """The steps of one decision."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._current = inputs.minimum if inputs.current is None else inputs.current

    def decision(self) -> Decision:
        inputs, current = self._inputs, self._current
        stable, panic = self._need(inputs.stable, STABLE_SECONDS), self._need(inputs.panic, PANIC_SECONDS)
        panics = panic.size > 1 and (
            panic.size >= PANIC_FACTOR * current
            or (panic.size > current and is_steep(inputs.panic.load, inputs.stable.load))
        )
        panic_seconds = STABLE_SECONDS if panics else inputs.panic_seconds
        if not current and not inputs.requests:  # past requests bring nothing back from zero
            needed = _Need(0, stable.reason)
        else:
            needed = max(stable, panic, key=_by_size) if panic_seconds > 0 else stable
        if inputs.requests and not needed.size:  # the first request must not wait for a mean
            needed = _Need(1, lambda: _count(inputs.requests, _SEEN))
        if inputs.floor > needed.size:
            needed = _Need(inputs.floor, lambda: inputs.floor_reason)
        if needed.size > current:
            return self._limited(min(needed.size, MAX_GROWTH * max(current, 1)), needed.reason(), panics=panics)
        if current <= inputs.minimum:
            return self._limited(current, needed.reason(), panics=panics)
        if panic_seconds > 0:
            rise = f"{needed.reason()}; nothing shrinks for {ceil(panic_seconds)} s after a steep rise"
            return self._limited(current, rise, panics=panics)
        delay = inputs.delay_seconds
        if not inputs.complete or inputs.known_seconds < delay:
            unknown = f"{needed.reason()}; nothing shrinks until demand has been known for {delay} s"
            return self._limited(current, unknown)
        return self._shrunk()

    def _shrunk(self) -> Decision:
        """Return the current size, or a smaller one."""
        inputs, current = self._inputs, self._current
        needed = self._need_of(
            inputs.peak_load, inputs.peak_active, _noun(inputs.stable), STABLE_SECONDS, inputs.delay_seconds
        )
        if inputs.highest_floor > needed.size:
            needed = _Need(inputs.highest_floor, lambda: inputs.floor_reason)
        if needed.size <= 1 and inputs.highest_floor == 0:  # the last one goes by the time without a request
            if inputs.quiet_seconds >= inputs.idle_seconds:
                needed = _Need(0, lambda: f"no request for {inputs.idle_seconds} s")
            elif needed.size == 0:
                needed = _Need(1, lambda: f"no request, but for less than {inputs.idle_seconds} s")
        if needed.size >= current:
            return self._limited(current, needed.reason())
        if inputs.rest_seconds > 0:
            return self._limited(current, f"{needed.reason()}; the size changed a moment ago")
        # The last one goes by itself; of more than one, at most half go at a time.
        size = needed.size if current == 1 else max(needed.size, ceil(current / 2))
        return self._limited(size, needed.reason(), shrinks=True)

    def _need(self, means: Means, seconds: float) -> _Need:
        return self._need_of(means.load, means.active, _noun(means), seconds)

    def _need_of(
        self, load: float, active: float, noun: tuple[str, str], seconds: float, past: int | None = None
    ) -> _Need:
        inputs = self._inputs
        size, value, target = _size(load, inputs.target), load, inputs.target
        if inputs.slots is not None and (by_slots := _size(active, inputs.slots)) > size:
            size, value, target, noun = by_slots, active, inputs.slots, _ACTIVE

        def reason() -> str:
            count = _count(ceil(round(value, 6)), noun)
            most, time = ("at most ", f" in the last {past} s") if past is not None else ("", "")
            return f"{most}{count} on average over {seconds:.0f} s{time}, {target} per {inputs.unit}"

        return _Need(size, reason)

    def _limited(self, size: int, reason: str, *, panics: bool = False, shrinks: bool = False) -> Decision:
        inputs = self._inputs
        sentence = f"{reason}: {_count(size, _UNITS[inputs.unit])}"
        if size < inputs.minimum:
            size, sentence = inputs.minimum, f"{sentence}, raised to {inputs.minimum} by {inputs.minimum_source}"
        if size > inputs.maximum:
            size, sentence = inputs.maximum, f"{sentence}, limited to {inputs.maximum} by maxReplicas"
        return Decision(size, sentence, panics=panics, shrinks=shrinks, inputs=inputs)


def _size(value: float, target: int) -> int:
    """Return the number of copies or pods that a value needs."""
    return ceil(round(value / target, 6)) if value else 0


def _noun(means: Means) -> tuple[str, str]:
    return _ESTIMATED if means.backlog or means.offered > means.running else _SEEN


def _by_size(need: _Need) -> int:
    return need.size


def _count(count: int, unit: tuple[str, str]) -> str:
    return f"{count} {unit[0] if count == 1 else unit[1]}"
