"""A model with an adapter, without memory for weights: the number and location of the trained parameters."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tunesmith_trainer.errors import InvalidSpecError

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PretrainedConfig


def wrapped(config: PeftConfig, base: PretrainedConfig, name: str) -> PeftModel:
    """Return the adapter on a base of this configuration, on the meta device.

    Raises:
        InvalidSpecError: PEFT rejects the configuration for this base; includes its message.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(base))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are issued again when the weights are loaded
            wrapped_model = get_peft_model(model, copy.deepcopy(config))
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError) as error:
        if isinstance(error, NotImplementedError):
            raise
        text = " ".join(str(error).split())[:300]
        raise InvalidSpecError(f"method {name} does not fit the base model: {text}") from None
    assert isinstance(wrapped_model, PeftModel)  # noqa: S101 - narrows the type
    return wrapped_model


def trained_parameters(model: PeftModel) -> int:
    """Return the number of trained parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def targets(model: PeftModel) -> list[str]:
    """Return the sorted full names of the modules that have an adapter; empty for a method that adds to prompts."""
    return sorted(getattr(model.base_model, "targeted_module_names", []))
