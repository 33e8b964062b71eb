"""LoRA."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, ClassVar

from pydantic import Field

from tunesmith.api.methods.declaration import (
    ALL_LINEAR,
    NOT_IN_PEFT,
    FieldCondition,
    MethodFields,
    MethodTraits,
    PeftName,
)
from tunesmith.api.methods.fields import (
    Alpha,
    LoraDropout,
    ModuleName,
    ModulesToSave,
    Rank,
    TargetModules,
    target_rules,
)
from tunesmith.api.model import Rule, quoted

LORA = MethodTraits("LORA", learning_rate=2e-4, served=True, takes_peft_config=True)


class Initialization(StrEnum):
    """Initial values of a LoRA adapter's matrices."""

    DEFAULT = "Default"
    GAUSSIAN = "Gaussian"
    ORTHOGONAL = "Orthogonal"
    EVA = "EVA"
    PISSA = "PiSSA"
    FAST_PISSA = "FastPiSSA"
    OLORA = "OLoRA"
    CORDA = "CorDA"
    LORA_GA = "LoRAGA"
    MICA = "MiCA"
    LOFTQ = "LoftQ"


@dataclass(frozen=True)
class InitializationTraits:
    """Facts about an initialization.

    Args:
        peft: PEFT's value of init_lora_weights.
        dora: True if DoRA supports it.
        in_4_bits: True if it works on a base in 4 bits.
        sharded: True if it works on a base whose weights are sharded over ranks.
        changes_base: True if it subtracts the new adapter from the base; saved, the adapter is plain LoRA of
            twice the rank.
        base_columns: singular vectors of a base weight that it reads per unit of rank; the rank is bounded by the
            weight's smaller side.
    """

    peft: str | bool
    dora: bool = False
    in_4_bits: bool = False
    sharded: bool = True
    changes_base: bool = False
    base_columns: int = 0


INITIALIZATIONS = {
    Initialization.DEFAULT: InitializationTraits(peft=True, dora=True, in_4_bits=True),
    Initialization.GAUSSIAN: InitializationTraits("gaussian", dora=True, in_4_bits=True),
    Initialization.ORTHOGONAL: InitializationTraits("orthogonal", dora=True),
    Initialization.EVA: InitializationTraits("eva", dora=True, in_4_bits=True, sharded=False),
    Initialization.PISSA: InitializationTraits("pissa", changes_base=True, base_columns=1),
    Initialization.FAST_PISSA: InitializationTraits("pissa_niter_16", changes_base=True, base_columns=1),
    Initialization.OLORA: InitializationTraits("olora", changes_base=True, base_columns=1),
    Initialization.CORDA: InitializationTraits("corda", sharded=False, changes_base=True, base_columns=1),
    Initialization.LORA_GA: InitializationTraits("lora_ga", sharded=False, changes_base=True, base_columns=2),
    Initialization.MICA: InitializationTraits("mica", base_columns=1),
    Initialization.LOFTQ: InitializationTraits("loftq", in_4_bits=True, sharded=False, base_columns=1),
}
_FAST_PISSA = re.compile(r"pissa_niter_\d+")
_WITH_DORA = [name for name, traits in INITIALIZATIONS.items() if traits.dora]
_IN_4_BITS = [name for name, traits in INITIALIZATIONS.items() if traits.in_4_bits]
_SHARDED = [name for name, traits in INITIALIZATIONS.items() if traits.sharded]


def initialization_of(value: object) -> Initialization | None:
    """Return the initialization for PEFT's value of init_lora_weights; None for a boolean or without a counterpart."""
    name = str(value).lower()
    if _FAST_PISSA.fullmatch(name):
        return Initialization.FAST_PISSA
    return next((found for found, traits in INITIALIZATIONS.items() if traits.peft == name), None)


lora_rules = (
    *target_rules,
    Rule(
        f"!self.dora || self.initialization in {quoted(_WITH_DORA)}",
        f"dora supports initialization {', '.join(_WITH_DORA)} only: use one of them, or remove dora",
        lambda self: not self.dora or self.initialization in _WITH_DORA,
    ),
    Rule(
        "!has(self.targetParameters) || (!self.dora && self.dropout == 0.0 && self.initialization == 'Default')",
        "targetParameters goes with initialization Default, without dora and dropout: remove what differs",
        lambda self: (
            self.target_parameters is None
            or (not self.dora and self.dropout == 0 and self.initialization is Initialization.DEFAULT)
        ),
    ),
    Rule(
        "self.initialization != 'Orthogonal' || self.rank % 2 == 0",
        "initialization Orthogonal needs an even rank: change the rank",
        lambda self: self.initialization is not Initialization.ORTHOGONAL or self.rank % 2 == 0,
    ),
)
"""Rules of lora and qlora."""
in_4_bits_rule = Rule(
    f"self.initialization in {quoted(_IN_4_BITS)}",
    f"qlora.initialization must be {', '.join(_IN_4_BITS[:-1])} or {_IN_4_BITS[-1]}, because the others need "
    "unquantized weights: use them with method.lora",
    lambda self: self.initialization in _IN_4_BITS,
)
SHARDED_INITIALIZATION = FieldCondition(
    f"(!has({{fields}}.initialization) || {{fields}}.initialization in {quoted(_SHARDED)})",
    lambda fields: fields.initialization in _SHARDED,
)


class LoraFields(MethodFields):
    """Low-rank adaptation (LoRA, arXiv:2106.09685)."""

    declared = LORA
    sharding: ClassVar[FieldCondition | None] = SHARDED_INITIALIZATION
    rules: ClassVar[tuple[Rule, ...]] = (
        *lora_rules,
        Rule(
            "self.initialization != 'LoftQ'",
            "initialization LoftQ compensates for quantization: use it with method.qlora",
            lambda self: self.initialization is not Initialization.LOFTQ,
        ),
    )

    rank: Annotated[Rank, PeftName("r")] = Field(default=16, description="Rank of the update matrices.")
    alpha: Annotated[Alpha, PeftName("lora_alpha")] = Field(
        default=32, description="Scale numerator: the update is multiplied by alpha / rank."
    )
    dropout: LoraDropout = 0.0
    target_modules: TargetModules = Field(default=[ALL_LINEAR])
    target_parameters: Annotated[list[ModuleName] | None, PeftName("target_parameters", modules=True)] = Field(
        default=None,
        min_length=1,
        max_length=64,
        description="Weights of experts that get an adapter, by name, such as experts.gate_up_proj; all-linear does "
        "not include them. vLLM serves it merged only.",
    )
    rs_lora: Annotated[bool, PeftName("use_rslora")] = Field(
        default=False, description="Multiply the update by alpha / √rank instead (rsLoRA, arXiv:2312.03732)."
    )
    dora: Annotated[bool, PeftName("use_dora")] = Field(
        default=False,
        description="Train magnitude and direction separately (DoRA, arXiv:2402.09353). vLLM can only serve the "
        "merged model.",
    )
    rank_pattern: Annotated[dict[ModuleName, Rank] | None, PeftName("rank_pattern")] = Field(
        default=None, max_length=64, description="Ranks that differ from rank, by module name."
    )
    alpha_pattern: Annotated[dict[ModuleName, Alpha] | None, PeftName("alpha_pattern")] = Field(
        default=None, max_length=64, description="Alphas that differ from alpha, by module name."
    )
    modules_to_save: ModulesToSave = None
    initialization: Annotated[
        Initialization,
        PeftName("init_lora_weights", {name: traits.peft for name, traits in INITIALIZATIONS.items()}),
    ] = Field(
        default=Initialization.DEFAULT,
        description="Initial values of the matrices. EVA, CorDA and LoRAGA are computed from training rows. PiSSA, "
        "FastPiSSA, OLoRA, CorDA and LoRAGA change the base model during training and are saved as plain LoRA of twice "
        "the rank, for the unchanged base model. LoftQ (qlora only) compensates for quantization.",
    )

    @property
    def published_rank(self) -> int:
        """Lower bound of the published adapter's highest rank."""
        highest = max(self.rank, *(self.rank_pattern or {}).values(), 0)
        return 2 * highest if INITIALIZATIONS[self.initialization].changes_base else highest

    lora_plus_ratio: Annotated[float | None, NOT_IN_PEFT] = Field(
        default=None,
        ge=1.0,
        le=128.0,
        description="Ratio of the learning rate of the B matrices to that of the A matrices (LoRA+, "
        "arXiv:2402.12354). Absent: 1.",
    )
