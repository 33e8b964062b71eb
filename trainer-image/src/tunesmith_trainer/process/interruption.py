"""A signal to stop: training finishes the step it is in, saves, and ends."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from tunesmith_trainer.training.checkpoint import Checkpoints


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
        self.checkpoints: Checkpoints | None = None
        self.resumed_from_step: int | None = None

    def asked(self, number: int) -> bool:
        """Notes a signal; False where the process must end at once: nothing would look at it, or it is the second."""
        if not self.armed or self.signal is not None:
            return False
        self.signal = signal.Signals(number)
        return True


@dataclass(frozen=True)
class Faults:
    """What a training loop needs to survive its end.

    Attributes:
        checkpoints: of the job.
        interruption: a signal to stop.
        hung: called, from another thread, with the steps done and the seconds since the last sign of life.
    """

    checkpoints: Checkpoints
    interruption: Interruption
    hung: Callable[[int, float], None]
