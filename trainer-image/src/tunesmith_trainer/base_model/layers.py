"""Find the layers of a base model: the modules that are gathered, or read from disk, one at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
_WITH_SINKS = {"gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash"}
"""Model types whose attention has a learned sink."""
_WITHOUT_BOUNDS = {"nemotron"}
"""Model types whose layers do not pass the bounds of the sequences to the attention."""


def has_known_layers(model: type[PreTrainedModel]) -> bool:
    """Return True if an architecture declares its layers."""
    return bool(model._no_split_modules)  # noqa: SLF001 - accelerate uses it, too


def mixes_tokens_by_attention(model: type[PreTrainedModel], config: PretrainedConfig) -> bool:
    """Return True if tokens reach each other only through the attention that `set_attn_implementation` sets.

    Recurrent layers and convolutions continue from the token before, and some architectures have attention of their
    own.

    Args:
        model: architecture.
        config: its configuration.
    """
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ())
    return model._supports_attention_backend and not model._is_stateful and kinds <= _ATTENTION_LAYERS  # noqa: SLF001


def can_share_prefixes(config: PretrainedConfig) -> bool:
    """Return True if the rows of a base model with the same beginning can share its computation.

    `training.attention` computes neither soft caps nor sinks, and needs the bounds of the rows.
    """
    text = config.get_text_config()
    return (
        mixes_tokens_by_attention(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config)
        and getattr(text, "attn_logit_softcapping", None) is None
        and text.model_type not in _WITH_SINKS | _WITHOUT_BOUNDS
    )


def layers_of(base: PreTrainedModel) -> list[nn.Module]:
    """Return the layers of a base model, with or without an adapter; empty if its architecture declares none."""
    names = set(base._no_split_modules or ())  # noqa: SLF001
    return [module for module in base.modules() if type(module).__name__ in names]
