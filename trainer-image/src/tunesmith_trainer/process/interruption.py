"""A signal to stop: training finishes its current step, saves, and exits."""

from __future__ import annotations

import signal
from typing import Protocol


class SavedCheckpoints(Protocol):
    """State of the run's checkpoints that is needed to exit."""

    @property
    def uri(self) -> str:
        """Folder of the checkpoints."""

    @property
    def last(self) -> int | None:
        """Step of the newest checkpoint in the store; None if there is none."""

    @property
    def pending(self) -> bool:
        """True while an upload is running or waiting. Read without locks: for signal handlers."""

    def flush(self, seconds: float) -> bool:
        """Wait for uploads, at most `seconds`; return False if some are unfinished."""


class Interruption:
    """Request to stop the process. The signal handler writes it, the training loop reads it; no locks.

    Attributes:
        signal: first signal that arrived while training could still save, or None.
        armed: True while the training loop checks for signals: at any other time a signal stops the process at once.
        checkpoints: checkpoints of the run, once it has some.
        resumed_from_step: step of the checkpoint that the run resumed from.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.armed = False
        self.checkpoints: SavedCheckpoints | None = None
        self.resumed_from_step: int | None = None

    def record(self, number: int) -> bool:
        """Record a signal; return False if the process must exit: training does not check, or it is the second."""
        if not self.armed or self.signal is not None:
            return False
        self.signal = signal.Signals(number)
        return True
