"""The held-out loss of the base and of the adapter, computed in the same way."""

from __future__ import annotations

import math
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tunesmith_trainer.base_model.precision import training_precision
from tunesmith_trainer.training.batches import mismatched, on_device, row_lengths, row_without_targets
from tunesmith_trainer.training.objectives import Forward

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from datasets import Dataset
    from peft import PeftModel

    from tunesmith_trainer.process.ranks import Ranks
    from tunesmith_trainer.training.batches import Collator
    from tunesmith_trainer.training.objectives import Row


def held_out_loss(
    model: PeftModel, rows: Dataset, collate: Collator, batch_size: int, *, adapter: bool, ranks: Ranks
) -> float:
    """Return the objective's loss over all rows (SFT: nats per target token), independent of the batches.

    Args:
        model: base with adapter; its forward pass must have the same `target_loss` as in training.
        rows: tokenised rows.
        collate: converts rows to the tensors of a batch, as in training, with the objective.
        batch_size: rows per forward pass.
        adapter: True for the loss with the adapter, False for the base alone.
        ranks: ranks over which the batches are divided; each gets the same mean.
    """
    objective = collate.objective
    forward = Forward(model, model, adapter=adapter)
    was_training = model.training
    model.eval()
    found: list[tuple[list[float], tuple[int, ...]]] = []

    def tensors(batch: Sequence[Row]) -> dict[str, Any]:
        filled = batch or [row_without_targets(rows.with_format("numpy")[0])]
        return on_device(collate.join(filled), model.device)

    try:
        with torch.no_grad(), training_precision(model):
            if objective.mismatched:
                batches = _batches_of_rank(_batches(rows, batch_size, with_other_answers=True), ranks)
                objective.estimate(forward, map(tensors, batches), ranks)
            for batch in _batches_of_rank(_batches(rows, batch_size), ranks):
                terms = objective.terms(forward, tensors(batch))
                found.append(([float(summed) for summed in terms.sums], objective.counts(batch)))
    finally:
        model.train(was_training)
    width = len(objective.counts([]))
    sums = ranks.sum(*(sum(batch_sums[index] for batch_sums, _ in found) for index in range(width)))
    counts = ranks.sum(*(sum(batch_counts[index] for _, batch_counts in found) for index in range(width)))
    return sum(total / count if count else math.nan for total, count in zip(sums, counts, strict=True))


def _batches_of_rank(batches: Iterator[list[Row]], ranks: Ranks) -> Iterator[list[Row]]:
    """Yield the batches of one rank, with an empty one if other ranks have one more: forward passes may communicate."""
    while together := list(islice(batches, ranks.size)):
        yield together[ranks.rank] if ranks.rank < len(together) else []


def _batches(rows: Dataset, size: int, *, with_other_answers: bool = False) -> Iterator[list[Row]]:
    """Yield batches of rows of similar length, for little padding, or of their prompts with other rows' answers."""
    order = np.argsort(-row_lengths(rows), kind="stable").tolist()
    fast = rows.with_format("numpy")
    for start in range(0, len(order), size):
        batch = [fast[index] for index in order[start : start + size]]
        if with_other_answers and len(order) > 1:
            yield mismatched([fast[order[start - 1]], *batch])[1:]
        elif not with_other_answers:
            yield batch
