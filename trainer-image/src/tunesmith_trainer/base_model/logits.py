"""Logits of models after the same prompts, and the distance between them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from torch import nn


def last_logits(model: Any, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:  # noqa: ANN401 - with or without adapter
    """Return the logits of the token after each prompt, in float32 on the CPU."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), mixed_precision(model):
            return [model(input_ids=batch_of_one(model, prompt)).logits[0, -1].float().cpu() for prompt in prompts]
    finally:
        model.train(was_training)


def batch_of_one(model: Any, tokens: Sequence[int]) -> torch.Tensor:  # noqa: ANN401 - with or without adapter
    """Return (1, tokens) on the model's device. A model whose weights are read from disk (`meta`) moves it itself."""
    device = model.device
    return torch.tensor([list(tokens)], device="cpu" if device.type == "meta" else device)


def mixed_precision(model: nn.Module) -> AbstractContextManager[None]:
    """Compute matrix products as in training: in the type with fewer bits if weights are in it and in float32."""
    device, types = "cpu", set()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            device = parameter.device.type
            types.add(parameter.dtype)
    if device == "meta":  # read from disk when computed
        device = "cuda" if torch.cuda.is_available() else "cpu"
    fewer = types - {torch.float32}
    return torch.autocast(device, fewer.pop()) if len(types) > 1 else nullcontext()


def relative_distance(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Return the norm of the difference over the norm of the expected logits."""
    logits, reference = torch.cat(list(found)).double(), torch.cat(list(expected)).double()
    return round(float((logits - reference).norm() / reference.norm()), 6)
