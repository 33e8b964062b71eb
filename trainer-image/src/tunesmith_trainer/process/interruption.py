"""A signal to stop: training finishes the step it is in, saves, and ends."""

from __future__ import annotations

import signal
from typing import Protocol


class SavedCheckpoints(Protocol):
    """What ending a process needs to know of the run's checkpoints."""

    @property
    def uri(self) -> str:
        """Folder of the checkpoints."""

    @property
    def last(self) -> int | None:
        """Step of the newest checkpoint in the store; None: there is none."""

    @property
    def pending(self) -> bool:
        """True while an upload is running or waiting. Read without locks: for signal handlers."""

    def flush(self, seconds: float) -> bool:
        """Wait for uploads, at most so long; False if some are unfinished."""


class Interruption:
    """Whether the process was asked to stop. The signal handler writes it, the training loop reads it; no locks.

    Attributes:
        signal: the first signal that came while training could still save, or None.
        armed: whether the training loop looks at it: a signal before or after ends the process at once.
        checkpoints: those of the run, once it has some.
        resumed_from_step: step of the checkpoint that the run went on from.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.armed = False
        self.checkpoints: SavedCheckpoints | None = None
        self.resumed_from_step: int | None = None

    def asked(self, number: int) -> bool:
        """Notes a signal; False where the process must end at once: nothing would look at it, or it is the second."""
        if not self.armed or self.signal is not None:
            return False
        self.signal = signal.Signals(number)
        return True
