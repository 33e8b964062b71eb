"""The held-out loss of the base and of the adapter, computed in the same way."""

from __future__ import annotations

import math
from contextlib import nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tunesmith_trainer.training.batches import row_lengths

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from datasets import Dataset
    from peft import PeftModel

    from tunesmith_trainer.ranks import Ranks
    from tunesmith_trainer.training.batches import Row

    Join = Callable[[Sequence[Row]], dict[str, Any]]


def held_out_loss(
    model: PeftModel, rows: Dataset, join: Join, batch_size: int, *, adapter: bool, ranks: Ranks
) -> float:
    """Mean loss in nats per target token over all rows; each token counts the same, in whatever batch it is.

    Args:
        model: base with adapter; its forward pass must have the `target_loss` that training has.
        rows: tokenised rows.
        join: rows → tensors of a batch, as in training.
        batch_size: rows per forward pass.
        adapter: with the adapter, or the base alone.
        ranks: that share the batches out; each gets the same mean.
    """
    device = model.device
    was_training = model.training
    model.eval()
    total, targets = 0.0, 0.0
    try:
        with torch.inference_mode(), nullcontext() if adapter else model.disable_adapter(), precision(model):
            for batch in islice(_batches(rows, batch_size), ranks.rank, None, ranks.size):
                tensors = join(batch).items()
                inputs = {name: part.to(device) if isinstance(part, torch.Tensor) else part for name, part in tensors}
                output = model(**inputs, target_loss=True)
                total += float(output.summed)
                targets += int(output.targets)
    finally:
        model.train(was_training)
    total, targets = ranks.sum(total, targets)
    return total / targets if targets else math.nan


def _batches(rows: Dataset, size: int) -> Iterator[list[Row]]:
    """Rows of similar length together: little padding, the same sum."""
    order = np.argsort(-row_lengths(rows), kind="stable").tolist()
    fast = rows.with_format("numpy")
    for start in range(0, len(order), size):
        yield [fast[place] for place in order[start : start + size]]


def precision(model: PeftModel) -> AbstractContextManager[None]:
    """Products in the type that the base was loaded in, as in training."""
    rounded = model.config.dtype is torch.bfloat16
    return torch.autocast(model.device.type, torch.bfloat16) if rounded else nullcontext()
