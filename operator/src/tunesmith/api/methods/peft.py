"""All other methods of PEFT, with PEFT's own fields."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field

from tunesmith.api.methods.declaration import NOT_IN_PEFT, MethodFields, MethodTraits
from tunesmith.api.methods.fields import OptionalQuantization
from tunesmith.api.methods.lora import LORA

_MAX_CONFIG_DEPTH = 8
_MAX_CONFIG_VALUES = 2000
_ON_WEIGHTS = "it works on the weights themselves"
_DECOMPOSES = "it decomposes the weights"

_TRAITS = (
    LORA,
    MethodTraits("ADAMSS", not_quantized=_ON_WEIGHTS, counted=False),
    MethodTraits("ADAPTION_PROMPT", learning_rate=5e-4, not_merged="it adds vectors to the prompt of some layers"),
    MethodTraits("BEFT", not_merged="it adds biases that the base's modules do not have"),
    MethodTraits("BOFT"),
    MethodTraits("C3A", learning_rate=3e-1, identity_at_start=False),
    MethodTraits("CARTRIDGE", not_merged="it adds keys and values", identity_at_start=False, recomputable=False),
    MethodTraits(
        "CPT",
        refused="it computes its own loss from all logits, which training does not compute: use promptTuning",
    ),
    MethodTraits("DEFT", not_quantized=_ON_WEIGHTS),
    MethodTraits("DELORA", learning_rate=1e-3, not_quantized=_ON_WEIGHTS),
    MethodTraits("FOURIERFT", learning_rate=3e-3, identity_at_start=False),
    MethodTraits("FROD", not_quantized=_DECOMPOSES, counted=False),
    MethodTraits("GLORA", not_quantized="it supports plain linear modules only"),
    MethodTraits("GRALORA", learning_rate=2e-4),
    MethodTraits("HIRA", learning_rate=4.5e-3),
    MethodTraits("HRA", not_quantized=_ON_WEIGHTS),
    MethodTraits("LILY", not_merged="PEFT cannot merge it"),
    MethodTraits("LN_TUNING", learning_rate=1e-3),
    MethodTraits("LOHA", not_quantized=_ON_WEIGHTS),
    MethodTraits("LOKR", learning_rate=3e-3, not_quantized=_ON_WEIGHTS),
    MethodTraits("MISS"),
    MethodTraits(
        "MULTITASK_PROMPT_TUNING",
        refused="it learns several tasks, and the rows of a data set do not name their task: use promptTuning",
    ),
    MethodTraits("OFT"),
    MethodTraits("OSF", learning_rate=5e-5, not_quantized=_DECOMPOSES),
    MethodTraits("PEANUT", not_quantized=_ON_WEIGHTS),
    MethodTraits("POLY", refused="it learns several tasks at once, and the rows of a data set do not name their task"),
    MethodTraits("PSOFT", not_quantized=_DECOMPOSES),
    MethodTraits("PVERA", learning_rate=3e-3),
    MethodTraits("RANDLORA"),
    MethodTraits("ROAD", learning_rate=1e-3),
    MethodTraits("SHADOW", not_merged="it runs a second network beside the base"),
    MethodTraits("SHIRA", learning_rate=3e-4, counted=False),
    MethodTraits("SUPERTUNING", not_quantized=_ON_WEIGHTS),
    MethodTraits("TINYLORA", learning_rate=1e-3, not_quantized=_DECOMPOSES),
    MethodTraits("TRAINABLE_TOKENS", learning_rate=2e-1),
    MethodTraits(
        "UNILORA",
        learning_rate=2e-3,
        not_quantized="no gradient reaches it, so it would learn nothing",
        identity_at_start=False,
    ),
    MethodTraits("VBLORA", identity_at_start=False),
    MethodTraits("VERA", learning_rate=1e-3),
    MethodTraits("WAVEFT"),
    MethodTraits("XLORA", refused="it combines adapters in folders of the machine"),
)
OTHER_METHODS = {str(traits.peft_type): traits for traits in _TRAITS}
"""Traits of the methods that `method.peft` trains or refuses by name, by PEFT's type."""


def _bounded(config: dict[str, Any]) -> dict[str, Any]:
    """Check the config's depth and number of values: the API server alone would accept 10,000 levels."""
    level: list[Any] = [config]
    count = 0
    for _ in range(_MAX_CONFIG_DEPTH):
        level = [
            entry
            for node in level
            for entry in (node.values() if isinstance(node, dict) else node if isinstance(node, list) else ())
        ]
        count += len(level)
        if count > _MAX_CONFIG_VALUES:
            raise ValueError(f"method.peft.config has more than {_MAX_CONFIG_VALUES} values: remove some")
    if any(isinstance(node, dict | list) and node for node in level):
        raise ValueError(f"method.peft.config is nested more than {_MAX_CONFIG_DEPTH} levels deep: flatten it")
    return config


class PeftFields(MethodFields):
    """Any other PEFT method."""

    type: Annotated[str, NOT_IN_PEFT] = Field(
        min_length=1, max_length=64, description="PEFT's name of the method, such as VERA, LOHA or OFT (PeftType)."
    )
    config: Annotated[dict[str, Any], AfterValidator(_bounded), NOT_IN_PEFT] = Field(
        default={},
        max_length=64,
        description="Fields of PEFT's configuration class, under PEFT's names. Fields with paths are rejected.",
        json_schema_extra={"x-kubernetes-preserve-unknown-fields": True},
    )
    quantization: OptionalQuantization = None

    @property
    def peft_type(self) -> str:
        """PEFT's spelling of the type."""
        return self.type.upper().replace("-", "_")

    @property
    def traits(self) -> MethodTraits:
        """Traits of the chosen type."""
        return OTHER_METHODS.get(self.peft_type) or MethodTraits(self.peft_type)
