"""Number types of a run: of the frozen weights and of matrix products."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from tunesmith.api.hyperparameters import Precision

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from peft import PeftModel


def dtype_of(precision: Precision | None) -> torch.dtype:
    """Return the type of the frozen weights and of matrix products."""
    return torch.bfloat16 if precision is Precision.BFLOAT16 else torch.float32


def training_precision(model: PeftModel) -> AbstractContextManager[None]:
    """Compute matrix products in the type that the base model was loaded in, as training does."""
    rounded = model.config.dtype is torch.bfloat16
    return torch.autocast(model.device.type, torch.bfloat16) if rounded else nullcontext()
