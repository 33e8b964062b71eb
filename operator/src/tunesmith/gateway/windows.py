"""Arithmetic of limits over time, and a gateway's own counts. Pure but for the clock, which is an argument.

A limit of requests counts in a sliding window: the previous window counts in proportion to the part of it that is less
than a period ago (sliding window counter, as Cloudflare's). A limit of tokens counts in fixed windows, since a request
gives back the tokens that it reserved and did not use. A window starts with the first use after the last one ended.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_PRUNE_INTERVAL = 256


class Measure(Enum):
    """What a limit counts: its name in Redis, the window in seconds (0: as long as it runs), True for a sliding one."""

    REQUESTS_PER_MINUTE = ("requests-per-minute", 60, True)
    TOKENS_PER_MINUTE = ("tokens-per-minute", 60, False)
    TOKENS_PER_DAY = ("tokens-per-day", 86_400, False)
    CONCURRENCY = ("concurrency", 0, False)

    def __init__(self, label: str, seconds: int, sliding: bool) -> None:  # noqa: FBT001 - a row of the table
        self.label = label
        self.seconds = seconds
        self.sliding = sliding


class Charge(NamedTuple):
    """What a request uses of a limit.

    Attributes:
        owner: whose limit, such as `key/alice` or `adapter/team/pirate`.
        limit: highest use in a window.
        cost: use of this request.
    """

    owner: str
    measure: Measure
    limit: int
    cost: int


class WindowState(NamedTuple):
    """Use of a limit at a time.

    Attributes:
        start: Unix time in seconds at which the current window started.
        previous: use in the window before it.
        current: use in the current window, or of what is running.
        now: Unix time in seconds.
    """

    start: float
    previous: int
    current: int
    now: float

    def used(self, measure: Measure) -> int:
        """Return the use that counts towards the limit."""
        if not measure.sliding:
            return self.current
        passed = (self.now - self.start) / measure.seconds
        return self.current + math.floor(self.previous * max(0.0, 1 - passed))

    def seconds_until(self, charge: Charge) -> float:
        """Return the seconds after which a charge fits, if nothing else is used meanwhile."""
        period = charge.measure.seconds
        if not period:
            return 1.0
        left = self.start + period - self.now
        room = charge.limit - charge.cost
        if not charge.measure.sliding or room < 0:
            return left
        if self.current <= room and self.previous:
            # The previous window must count for at most what the current one leaves.
            return left - period * (room - self.current) / self.previous
        return left + (period * (1 - room / self.current) if self.current else 0)

    def seconds_until_reset(self, measure: Measure) -> float:
        """Return the seconds after which the current window ends."""
        return self.start + measure.seconds - self.now


class Decision(NamedTuple):
    """Result of an admission.

    Attributes:
        refused: index of the first charge that does not fit; None: all fit and count.
        states: use of each charge's limit, with the charges if they count.
    """

    refused: int | None
    states: tuple[WindowState, ...]


@dataclass(slots=True)
class _Window:
    start: float
    previous: int = 0
    current: int = 0

    def roll(self, now: float, period: int) -> None:
        """Move to the window that contains `now`."""
        passed = now - self.start
        if passed >= 2 * period:
            self.start, self.previous, self.current = now, 0, 0
        elif passed >= period:
            self.start, self.previous, self.current = self.start + period, self.current, 0


class LocalCounters:
    """Use of limits by the requests of this gateway.

    Args:
        wall_clock: Unix time in seconds.
    """

    def __init__(self, wall_clock: Callable[[], float]) -> None:
        self._wall_clock = wall_clock
        self._windows: dict[tuple[Measure, str], _Window] = {}
        self._running: Counter[str] = Counter()

    def admit(self, charges: Sequence[Charge]) -> Decision:
        """Count the charges if all of them fit."""
        now = self._wall_clock()
        refused = next(
            (i for i, c in enumerate(charges) if self._state(c, now).used(c.measure) + c.cost > c.limit), None
        )
        if refused is None:
            self._add(charges, now)
        return Decision(refused, tuple(self._state(charge, now) for charge in charges))

    def record(self, charges: Sequence[Charge], decision: Decision) -> None:
        """Count charges that were admitted elsewhere, in windows that start at the same time as there."""
        self._add(charges, self._wall_clock())
        for charge, state in zip(charges, decision.states, strict=True):
            if charge.measure.seconds:
                self._windows[charge.measure, charge.owner].start = state.start

    def settle(self, charge: Charge, start: float, change: int) -> None:
        """Change the use that a charge added to the window that started at `start`."""
        if not charge.measure.seconds:
            self._running[charge.owner] += change
            if self._running[charge.owner] <= 0:
                del self._running[charge.owner]
            return
        window = self._windows.get((charge.measure, charge.owner))
        if window is None:
            return
        window.roll(self._wall_clock(), charge.measure.seconds)
        if window.start < start + charge.measure.seconds:
            window.current = max(0, window.current + change)
        elif window.start < start + 2 * charge.measure.seconds:
            window.previous = max(0, window.previous + change)

    def has_ended(self, measure: Measure, start: float) -> bool:
        """Return True if the window that started at `start` no longer counts."""
        return self._wall_clock() >= start + 2 * measure.seconds

    def totals(self) -> Iterator[tuple[Measure, str, float, int]]:
        """Yield measure, owner, start of the window and use of everything that still counts."""
        now = self._wall_clock()
        for (measure, owner), window in self._windows.items():
            window.roll(now, measure.seconds)
            yield measure, owner, window.start - measure.seconds, window.previous
            yield measure, owner, window.start, window.current

    def running(self) -> Iterator[tuple[str, int]]:
        """Yield owner and number of running sequences."""
        yield from self._running.items()

    def _state(self, charge: Charge, now: float) -> WindowState:
        if not charge.measure.seconds:
            return WindowState(now, 0, self._running[charge.owner], now)
        window = self._windows.get((charge.measure, charge.owner))
        if window is None:
            return WindowState(now, 0, 0, now)
        window.roll(now, charge.measure.seconds)
        return WindowState(window.start, window.previous, window.current, now)

    def _add(self, charges: Sequence[Charge], now: float) -> None:
        for charge in charges:
            if not charge.measure.seconds:
                self._running[charge.owner] += charge.cost
                continue
            window = self._windows.get((charge.measure, charge.owner))
            if window is None:
                if len(self._windows) % _PRUNE_INTERVAL == _PRUNE_INTERVAL - 1:
                    self._prune(now)
                window = self._windows[charge.measure, charge.owner] = _Window(now)
            window.roll(now, charge.measure.seconds)
            window.current += charge.cost

    def _prune(self, now: float) -> None:
        ended = [key for key, window in self._windows.items() if now - window.start >= 2 * key[0].seconds]
        for key in ended:
            del self._windows[key]
