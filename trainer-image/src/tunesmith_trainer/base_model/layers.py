"""Find the layers of a base model: the modules that are gathered, or read from disk, one at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def has_known_layers(model: type[PreTrainedModel]) -> bool:
    """Return True if an architecture declares its layers."""
    return bool(model._no_split_modules)  # noqa: SLF001 - accelerate uses it, too


def layers_of(base: PreTrainedModel) -> list[nn.Module]:
    """Return the layers of a base model, with or without an adapter; empty if its architecture declares none."""
    names = set(base._no_split_modules or ())  # noqa: SLF001
    return [module for module in base.modules() if type(module).__name__ in names]
