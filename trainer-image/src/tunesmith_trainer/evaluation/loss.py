"""The held-out loss of the base and of the adapter, computed in the same way."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from datasets import Dataset
    from peft import PeftModel

    Collate = Callable[[list[dict[str, list[int]]]], dict[str, torch.Tensor]]


def held_out_loss(model: PeftModel, rows: Dataset, collate: Collate, batch_size: int, *, adapter: bool) -> float:
    """Mean loss in nats per target token over all rows; each token counts the same, in whatever batch it is.

    Args:
        model: base with adapter; its forward pass must have TRL's fused head, which the training loss comes from too.
        rows: tokenised rows.
        collate: pads rows to a batch.
        batch_size: rows per forward pass.
        adapter: with the adapter, or the base alone.
    """
    device = model.device
    was_training = model.training
    model.eval()
    total, targets = 0.0, 0
    try:
        with torch.inference_mode(), nullcontext() if adapter else model.disable_adapter(), precision(device):
            for batch in _batches(rows, batch_size):
                inputs = {name: tensor.to(device) for name, tensor in collate(batch).items()}
                output = model(**inputs, fused_lm_head=True)
                total -= float(output.log_probs.double().sum())
                targets += int(output.label_mask.sum())
    finally:
        model.train(was_training)
    return total / targets if targets else math.nan


def _batches(rows: Dataset, size: int) -> Iterator[list[dict[str, list[int]]]]:
    """Rows of similar length together: less padding, the same sum."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    for start in range(0, len(order), size):
        yield [rows[place] for place in order[start : start + size]]


def precision(device: torch.device) -> AbstractContextManager[None]:
    """Products in bfloat16 on a GPU, as in training."""
    return torch.autocast(device.type, torch.bfloat16) if device.type == "cuda" else nullcontext()
