"""What models say to the same prompts, and how far apart they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


def last_logits(model: Any, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:  # noqa: ANN401 - with or without adapter
    """The logits of the token after each prompt, in float32 on the CPU."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            return [
                model(input_ids=torch.tensor([list(prompt)], device=model.device)).logits[0, -1].float().cpu()
                for prompt in prompts
            ]
    finally:
        model.train(was_training)


def relative_distance(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Norm of the difference over the norm of the expected logits."""
    one, other = torch.cat(list(found)).double(), torch.cat(list(expected)).double()
    return round(float((one - other).norm() / other.norm()), 6)
