"""Fields shared by several methods."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunesmith.api.methods.declaration import ALL_LINEAR, NOT_IN_PEFT, MethodFields, PeftName
from tunesmith.api.model import ApiModel, Rule

ModuleName = Annotated[str, Field(min_length=1, max_length=128)]
Rank = Annotated[int, Field(ge=1, le=512)]
Alpha = Annotated[int, Field(ge=1, le=4096)]

target_rules = (
    Rule(
        "!('all-linear' in self.targetModules) || size(self.targetModules) == 1",
        "targetModules: all-linear includes all linear modules: remove it or the other names",
        lambda self: ALL_LINEAR not in self.target_modules or len(self.target_modules) == 1,
    ),
)
"""Rules of every method with `target_modules: TargetModules`."""
TargetModules = Annotated[
    list[ModuleName],
    Field(
        min_length=1,
        max_length=64,
        description="Names of the linear modules with an adapter. all-linear: all except the output layer.",
    ),
    PeftName("target_modules", modules=True),
]
ModulesToSave = Annotated[
    list[ModuleName] | None,
    Field(
        min_length=1,
        max_length=64,
        description="Modules that are fully trained and saved with the adapter, such as lm_head. vLLM cannot serve "
        "such an adapter.",
    ),
    PeftName("modules_to_save", modules=True),
]
LoraDropout = Annotated[
    float, Field(ge=0.0, le=0.9, description="Dropout on the adapter's input."), PeftName("lora_dropout")
]


class Quantization(ApiModel):
    """Quantisation of the frozen base in memory (QLoRA, arXiv:2305.14314)."""

    type: Literal["nf4"] = Field(
        default="nf4",
        description="4-bit NormalFloat. A base model that is published in 4 bits of bitsandbytes keeps its own type.",
    )
    double_quantization: bool = Field(
        default=True,
        description="Also quantise the quantisation constants. A base model that is published in 4 bits keeps its own.",
    )
    compute_type: Literal["bfloat16", "float16", "float32"] | None = Field(
        default=None, description="Data type of matrix products. Absent: that of hyperparameters.precision."
    )


OptionalQuantization = Annotated[
    Quantization | None,
    Field(description="Quantisation of the frozen base model to 4 bits. Absent: its own precision."),
    NOT_IN_PEFT,
]


class VirtualTokensFields(MethodFields):
    """Trained vectors that precede every prompt."""

    virtual_tokens: Annotated[int, PeftName("num_virtual_tokens")] = Field(
        default=20, ge=1, le=1024, description="Number of trained vectors."
    )
    quantization: OptionalQuantization = None
