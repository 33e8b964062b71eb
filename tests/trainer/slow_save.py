"""A pod that takes long to write its first checkpoint; in a separate file, so that a forked process can import it."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Any

import torch

from tests.trainer import pods
from tunesmith_trainer.training import watchdog

if TYPE_CHECKING:
    from pathlib import Path

SLOW_STEP = 10.0
"""Longer than any step takes, even on a busy machine; in seconds."""


def with_a_slow_save(arguments: list[str], environment: dict[str, str], log: Path) -> None:
    """Run a pod's container whose first checkpoint takes longer than a step may. SAVE_ENDS kills it meanwhile."""
    watchdog.MIN_STEP_SECONDS = SLOW_STEP
    watchdog.Watchdog.__init__.__kwdefaults__["pause"] = 0.1
    save = torch.save

    def save_slowly(*args: Any) -> None:
        torch.save = save
        time.sleep(1.5 * SLOW_STEP)
        if "SAVE_ENDS" in environment:
            os.kill(os.getpid(), signal.SIGKILL)
        save(*args)

    torch.save = save_slowly
    pods._command(arguments, environment, log)
