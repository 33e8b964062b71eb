"""QLoRA."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunesmith.api.methods.declaration import NOT_IN_PEFT, FieldCondition
from tunesmith.api.methods.fields import Quantization
from tunesmith.api.methods.lora import SHARDED_INITIALIZATION, LoraFields, in_4_bits_rule, lora_rules


class QloraFields(LoraFields):
    """LoRA over a 4-bit base."""

    # DoRA needs the norms of weights before they are quantized to 4 bits.
    sharding = FieldCondition(
        f"{SHARDED_INITIALIZATION.cel} && !(has({{fields}}.dora) && {{fields}}.dora)",
        lambda fields: SHARDED_INITIALIZATION.holds(fields) and not fields.dora,
    )
    rules = (*lora_rules, in_4_bits_rule)

    quantization: Annotated[Quantization, NOT_IN_PEFT] = Field(
        default_factory=Quantization, description="Quantisation of the base model."
    )
