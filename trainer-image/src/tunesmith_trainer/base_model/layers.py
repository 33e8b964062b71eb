"""Which modules of a base model are its layers: what is gathered, or read from disk, one at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def has_known_layers(model: type[PreTrainedModel]) -> bool:
    """Whether an architecture says what its layers are."""
    return bool(model._no_split_modules)  # noqa: SLF001 - what accelerate goes by, too


def layers_of(base: PreTrainedModel) -> list[nn.Module]:
    """The layers of a base, an adapter in it or not; none where its architecture does not say."""
    names = set(base._no_split_modules or ())  # noqa: SLF001
    return [module for module in base.modules() if type(module).__name__ in names]
