"""The held-out loss of the base and of the adapter, computed in the same way."""

from __future__ import annotations

import math
from contextlib import nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tunesmith_trainer.ranks import Ranks
from tunesmith_trainer.training.batches import mismatched, row_lengths
from tunesmith_trainer.training.objectives import Forward

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    from datasets import Dataset
    from peft import PeftModel

    from tunesmith_trainer.training.batches import Collator, Row


def held_out_loss(
    model: PeftModel, rows: Dataset, collate: Collator, batch_size: int, *, adapter: bool, ranks: Ranks
) -> float:
    """The objective's loss over all rows (SFT: nats per target token), whatever the batches.

    KTO's estimate of the divergence is the one exception: it is made over each batch.

    Args:
        model: base with adapter; its forward pass must have the `target_loss` that training has.
        rows: tokenised rows.
        collate: rows → tensors of a batch, as in training, with the objective.
        batch_size: rows per forward pass.
        adapter: with the adapter, or the base alone.
        ranks: that share the batches out; each gets the same mean.
    """
    objective = collate.objective
    forward = Forward(model, model, adapter=adapter)
    was_training = model.training
    model.eval()
    found: list[tuple[list[float], tuple[int, ...]]] = []

    def tensors(batch: Sequence[Row]) -> dict[str, Any]:
        joined = collate.join(batch).items()
        return {name: part.to(model.device) if isinstance(part, torch.Tensor) else part for name, part in joined}

    try:
        with torch.no_grad(), precision(model):
            for batch in islice(_batches(rows, batch_size), ranks.rank, None, ranks.size):
                if objective.mismatched:
                    objective.estimate(forward, [tensors(mismatched(batch))], Ranks())
                terms = objective.terms(forward, tensors(batch))
                found.append(([float(summed) for summed in terms.sums], objective.counts(batch)))
    finally:
        model.train(was_training)
    width = len(objective.counts([]))
    sums = ranks.sum(*(sum(one[0][place] for one in found) for place in range(width)))
    counts = ranks.sum(*(sum(one[1][place] for one in found) for place in range(width)))
    return sum(total / count if count else math.nan for total, count in zip(sums, counts, strict=True))


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
