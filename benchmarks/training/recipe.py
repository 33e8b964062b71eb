"""Settings, clock, held-out loss and result line that all contenders share."""

from __future__ import annotations

import json
import resource
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

Rows = list[dict[str, list[int]]]

BATCH, MICRO, RANK, ALPHA, RATE, SEED = 8, 4, 16, 32, 2e-4, 42
IGNORED = -100


@dataclass
class Clock:
    """Times of the start of training and of the end of each step.

    Attributes:
        times: seconds since the epoch.
        busy: CPU seconds of all threads of the process.
    """

    times: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)

    def tick(self) -> None:
        """Record both times."""
        self.times.append(time.time())
        self.busy.append(time.process_time())


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def held_out_loss(logits_of: Callable[[torch.Tensor], torch.Tensor], rows: Rows) -> float:
    """Return the loss in nats per target token, computed one row at a time.

    Args:
        logits_of: maps token ids of one row (1, length) to logits (1, length, vocabulary).
        rows: rows with labels.
    """
    total, targets = 0.0, 0
    with torch.inference_mode():
        for row in rows:
            logits = logits_of(torch.tensor([row["input_ids"]]))[0, :-1]
            labels = torch.tensor(row["labels"][1:])
            total += float(torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum"))
            targets += int((labels != IGNORED).sum())
    return total / targets


def figures(clock: Clock, rows: Rows, *, began: float, peak: int, loss: float) -> str:
    """Return the results of a run as one line of JSON.

    Args:
        clock: clock of the run.
        rows: training rows.
        began: time at which the process was started, in seconds since the epoch.
        peak: peak resident memory up to the end of training, in bytes.
        loss: held-out loss, in nats per target token.
    """
    return json.dumps(
        {
            "seconds": clock.times[-1] - clock.times[0],
            "busy": clock.busy[-1] - clock.busy[0],
            "tokens": sum(len(row["input_ids"]) for row in rows),
            "steps": len(clock.times) - 1,
            "first": clock.times[1] - began,
            "peak": peak,
            "loss": loss,
        }
    )
