"""What all contenders have in common: the settings, the clock, the loss on held-out rows and the line of figures."""

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
    """When training began, and when steps ended.

    Attributes:
        times: seconds since the epoch.
        busy: seconds of all the process's threads together.
    """

    times: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)

    def tick(self) -> None:
        """Takes both times."""
        self.times.append(time.time())
        self.busy.append(time.process_time())


def peak_memory() -> int:
    """Highest resident memory of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def held_out_loss(logits_of: Callable[[torch.Tensor], torch.Tensor], rows: Rows) -> float:
    """Nats per target token, a row at a time.

    Args:
        logits_of: the model: token ids of one row (1, length) to logits (1, length, vocabulary).
        rows: with labels.
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
    """The figures of a run as one JSON line.

    Args:
        clock: of the run.
        rows: trained on.
        began: when the process was started, seconds since the epoch.
        peak: highest resident memory up to the end of training, bytes.
        loss: on held-out rows, nats per target token.
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
