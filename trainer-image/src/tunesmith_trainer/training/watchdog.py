"""Detect a step that hangs: a lost collective, a driver that does not respond, a data source that blocks."""

from __future__ import annotations

import contextlib
import threading
import time
from statistics import median
from typing import TYPE_CHECKING, Any, Self

from transformers import TrainerCallback

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

    from transformers import TrainerControl, TrainerState, TrainingArguments

FIRST_STEP_SECONDS = 1800.0
"""Time limit of the first step, which compiles, fills caches and may wait for other nodes."""
MIN_STEP_SECONDS = 300.0
"""Lower bound of a step's time limit."""
FACTOR = 20.0
"""Time limit of a step, in medians of the recent ones."""
MAX_PAUSE_SECONDS = 12 * 3600.0
"""Limit of work between steps: a disk that never responds must not occupy the GPUs forever."""
_RECENT_STEPS = 50


def deadline(seconds: Sequence[float]) -> float:
    """Return the time limit of a step from the recent durations, in seconds: 20 medians, at least five minutes."""
    if not seconds:
        return FIRST_STEP_SECONDS
    return max(MIN_STEP_SECONDS, FACTOR * median(seconds[-_RECENT_STEPS:]))


class Watchdog(TrainerCallback):
    """Calls `hung(step, seconds)` from a separate thread when there has been no progress for too long.

    As a context manager it stops watching when its block is left, including by an error, which ends training without
    `on_train_end`.

    Args:
        hung: called with the steps done and the seconds without progress.
        limit: returns the seconds allowed, given the durations of the steps so far.
        pause: seconds between two checks.
        max_pause: seconds allowed for work between steps.
    """

    def __init__(
        self,
        hung: Callable[[int, float], None],
        *,
        limit: Callable[[Sequence[float]], float] = deadline,
        pause: float = 5.0,
        max_pause: float = MAX_PAUSE_SECONDS,
    ) -> None:
        self._hung = hung
        self._limit = limit
        self._pause = pause
        self._max_pause = max_pause
        self._last_progress = 0.0
        self._step_started = 0.0
        self._step = 0
        self._seconds: list[float] = []
        self._paused = False
        self._stop = threading.Event()

    def start(self) -> None:
        """Start watching."""
        self._last_progress = self._step_started = time.monotonic()
        self._stop.clear()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """Stop watching."""
        self._stop.set()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Allow more time within the block, for work between steps such as scoring many rows or saving a checkpoint."""
        self._last_progress = time.monotonic()
        self._paused = True
        try:
            yield
        finally:
            self._last_progress = time.monotonic()
            self._paused = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of the first step."""
        self._step = state.global_step
        self.start()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of the step."""
        self._last_progress = self._step_started = time.monotonic()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record progress: a micro-batch is done."""
        self._last_progress = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record the duration of the step."""
        self._last_progress = time.monotonic()
        self._step = state.global_step
        self._seconds.append(self._last_progress - self._step_started)
        del self._seconds[:-_RECENT_STEPS]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop watching: there are no more steps."""
        self.stop()

    def _watch(self) -> None:
        checked = time.monotonic()
        while not self._stop.wait(self._pause):
            now = time.monotonic()
            if now - checked > 10 * self._pause:
                # The whole process stood still, as when the machine was suspended: that does not indicate a hung step.
                self._last_progress = now
            checked = now
            # Read before the time of the last progress, which is updated before a pause ends.
            limit = self._max_pause if self._paused else self._limit(self._seconds)
            idle = now - self._last_progress
            if idle > limit:
                self._stop.set()
                self._hung(self._step, idle)
