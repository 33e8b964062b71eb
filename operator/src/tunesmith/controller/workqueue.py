"""Queue of unique keys: each is processed by one worker at a time, and is delayed after failures."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import random
import time
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from tunesmith.controller.reconciler import Key

_FIRST_BACKOFF_SECONDS = 0.1
_MAX_BACKOFF_SECONDS = 30.0
_IMMEDIATE_RETRIES = 3


class WorkQueue:
    """Keys that are due, being processed, or due later. For one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ready: deque[Key] = deque()
        self._queued: set[Key] = set()
        self._running: set[Key] = set()
        self._requeued: set[Key] = set()
        self._later: list[tuple[float, int, Key]] = []
        self._due: dict[Key, float] = {}
        self._failures: dict[Key, int] = {}
        self._rests: dict[Key, float] = {}
        self._number = 0
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        return len(self._queued) + len(self._due)

    @property
    def depth(self) -> int:
        """Number of keys that are due and wait for a worker."""
        return len(self._queued) + len(self._requeued)

    def add(self, key: Key) -> None:
        """Make the key due now, or once its processing or its rest is over."""
        if key in self._running:
            self._requeued.add(key)
        elif (rest := self._rests.get(key, 0.0) - self._clock()) > 0:
            self.add_after(key, rest)
        elif key not in self._queued:
            self._queued.add(key)
            self._ready.append(key)
            self._wake.set()

    def add_after(self, key: Key, seconds: float) -> None:
        """Make the key due after some seconds, unless it is already due earlier."""
        due = self._clock() + seconds
        if due < self._due.get(key, float("inf")):
            self._due[key] = due
            self._number += 1
            heapq.heappush(self._later, (due, self._number, key))
            self._wake.set()

    async def get(self) -> Key:
        """Wait for the next due key and return it. `done` or `failed` must be called with it."""
        # Workers whose keys need no I/O would otherwise block the event loop.
        await asyncio.sleep(0)
        while True:
            now = self._clock()
            while self._later and self._later[0][0] <= now:
                due, _, key = heapq.heappop(self._later)
                if self._due.get(key) == due:
                    del self._due[key]
                    self.add(key)
            if self._ready:
                key = self._ready.popleft()
                self._queued.discard(key)
                self._running.add(key)
                if self._ready:
                    self._wake.set()
                return key
            self._wake.clear()
            # Not wait_for, which in Python 3.11 swallows a cancellation that coincides with the wake-up.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._later[0][0] - now if self._later else None):
                    await self._wake.wait()

    def done(self, key: Key, requeue_after: float | None = None, rest: float = 0.0) -> None:
        """Record that processing the key succeeded.

        Args:
            key: key returned by `get`.
            requeue_after: seconds until it is due again; None: when it is added.
            rest: seconds during which it is not due, even if it is added.
        """
        self._failures.pop(key, None)
        if rest > 0:
            self._rests[key] = self._clock() + rest
        else:
            self._rests.pop(key, None)
        self._finish(key)
        if requeue_after is not None:
            self.add_after(key, requeue_after)

    def failed(self, key: Key) -> float:
        """Record that processing the key failed; return the seconds until it is due again, doubled each time.

        A change that arrived meanwhile makes it due now, but only after the first failures.
        """
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        delay = min(_MAX_BACKOFF_SECONDS, _FIRST_BACKOFF_SECONDS * 2.0 ** min(failures, 20)) * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load
        if failures >= _IMMEDIATE_RETRIES:
            # A reconcile that fails repeatedly while it changes objects that it watches must not spin.
            self._requeued.discard(key)
        self._finish(key)
        self.add_after(key, delay)
        return delay

    def _finish(self, key: Key) -> None:
        self._running.discard(key)
        if key in self._requeued:
            self._requeued.discard(key)
            self.add(key)
