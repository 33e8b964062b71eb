"""Check a base model's weights by the headers of their files, before a GPU is taken to load them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors.torch import _TYPES
from transformers import AutoModelForCausalLM

from tunesmith_trainer.base_model.stored import check_scales, load_headers
from tunesmith_trainer.errors import InvalidSpecError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from transformers import PretrainedConfig, PreTrainedModel

    from tunesmith.contracts.safetensors import Tensor
    from tunesmith_trainer.base_model.stored import StoredQuantization

_SCALES = ("SCB", "scale", "weight_scale", "weight_scale_inv", "absmax")
"""Ends of the names of tensors by which quantised weights are multiplied."""
_WHOLE_NUMBERS = frozenset({"BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64"})


def check_headers(config: PretrainedConfig, tensors: Mapping[str, Tensor], stored: StoredQuantization | None) -> None:
    """Check that weights fit the configuration, by the code that loads them, without reading or allocating any.

    Args:
        config: configuration, without the quantisation in which the weights are stored.
        tensors: headers of the weights' files, by the names of the tensors.
        stored: that quantisation; None: the weights are not quantised.

    Raises:
        InvalidSpecError: weights are missing, have another shape, or are quantised in another way than stated.
    """
    types = {name: tensor.dtype for name, tensor in tensors.items()}
    check_scales(types, stored)
    unknown = sorted(set(types.values()) - set(_TYPES))
    if unknown:
        raise InvalidSpecError(f"the base model has weights of the type {unknown[0]}, which cannot be loaded")
    if stored is not None and stored.kept:
        return  # bitsandbytes reads values while it loads
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    weights = {
        name: torch.empty(tensor.shape, dtype=_TYPES[tensor.dtype], device="meta") for name, tensor in tensors.items()
    }
    model, unused, differ = load_headers(type(empty), empty.config, weights, stored)
    if differ:
        name, found, expected = min(differ)
        raise InvalidSpecError(
            f"the weights of the base model do not fit its config.json: {name} has the shape {list(found)} in the files"
            f" and {list(expected)} according to config.json{_and_more(len(differ) - 1)}: copy the whole base model"
            " again, or correct its config.json"
        )
    if stored is None:
        _check_types(model, types, unused)


def _check_types(model: PreTrainedModel, types: Mapping[str, str], unused: Iterable[str]) -> None:
    """Raise InvalidSpecError if weights are quantised but config.json does not say so: they would be read unscaled."""
    scaled = {name.rpartition(".")[0] for name in unused if name.endswith(_SCALES)}
    for name, _ in model.named_parameters():
        kind = types.get(name, "")
        if kind in _WHOLE_NUMBERS or (kind.startswith("F8") and not scaled.isdisjoint({name, name.rpartition(".")[0]})):
            raise InvalidSpecError(
                f"the base model's weights are quantised ({name} is of the type {kind}), but its config.json has no"
                " quantization_config: copy the whole base model again, or use the model that it was quantised from"
            )


def _and_more(count: int) -> str:
    return f" (and {count} more)" if count else ""
