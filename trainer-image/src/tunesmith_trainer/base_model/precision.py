"""Number types of a run: of the frozen weights and of matrix products."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from tunesmith.api.hyperparameters import Precision

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from peft import PeftModel


_TYPES = {
    Precision.BFLOAT16: torch.bfloat16,
    Precision.FLOAT16: torch.float16,
    Precision.FLOAT32: torch.float32,
}


def dtype_of(precision: Precision | None) -> torch.dtype:
    """Return the type of the frozen weights and of matrix products."""
    return _TYPES[precision or Precision.FLOAT32]


def training_precision(model: PeftModel) -> AbstractContextManager[None]:
    """Compute matrix products in the type that the base model was loaded in, as training does."""
    dtype = model.config.dtype
    rounded = dtype in {torch.bfloat16, torch.float16}
    return torch.autocast(model.device.type, dtype) if rounded else nullcontext()
