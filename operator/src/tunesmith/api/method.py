"""The fine-tuning methods of a FineTuneJob and their fields."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from tunesmith.api.model import ApiModel, Rule

if TYPE_CHECKING:
    from collections.abc import Iterable

ModuleName = Annotated[str, Field(min_length=1, max_length=128)]
Rank = Annotated[int, Field(ge=1, le=512)]
Alpha = Annotated[int, Field(ge=1, le=4096)]

ALL_LINEAR = "all-linear"

_target_rules = (
    Rule(
        "!('all-linear' in self.targetModules) || size(self.targetModules) == 1",
        "targetModules: all-linear stands for all of them; remove it or the other names",
        lambda self: ALL_LINEAR not in self.target_modules or len(self.target_modules) == 1,
    ),
)
TargetModules = Annotated[
    list[ModuleName],
    Field(
        min_length=1,
        max_length=64,
        description="Linear modules that get an adapter, by name; all-linear for all but the head.",
    ),
]
ModulesToSave = Annotated[
    list[ModuleName] | None,
    Field(
        min_length=1,
        max_length=64,
        description="Modules that are trained whole and saved with the adapter, such as lm_head. vLLM cannot serve it.",
    ),
]


class Initialization(StrEnum):
    """How a LoRA adapter's matrices begin."""

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


CHANGES_BASE = frozenset(
    {
        Initialization.PISSA,
        Initialization.FAST_PISSA,
        Initialization.OLORA,
        Initialization.CORDA,
        Initialization.LORA_GA,
    }
)
"""They take out of the base what the new adapter adds; saved, the adapter is plain LoRA of twice the rank."""
_WITH_DORA = (Initialization.DEFAULT, Initialization.GAUSSIAN, Initialization.ORTHOGONAL, Initialization.EVA)
_IN_4_BITS = (Initialization.DEFAULT, Initialization.GAUSSIAN, Initialization.EVA)


def _quoted(values: Iterable[Initialization]) -> str:
    """A list in CEL."""
    return "[" + ", ".join(f"'{value}'" for value in values) + "]"


class Quantization(ApiModel):
    """How the frozen base is held in memory (QLoRA, arXiv:2305.14314)."""

    type: Literal["nf4"] = Field(default="nf4", description="4-bit NormalFloat.")
    double_quantization: bool = Field(default=True, description="Quantise the quantisation constants too.")
    compute_type: Literal["bfloat16", "float32"] | None = Field(
        default=None, description="Type of the matrix products. Absent: bfloat16 on a GPU, float32 on a CPU."
    )


class LoraFields(ApiModel):
    """Low-rank adaptation (LoRA, arXiv:2106.09685)."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *_target_rules,
        Rule(
            f"!self.dora || self.initialization in {_quoted(_WITH_DORA)}",
            f"dora goes with initialization {', '.join(_WITH_DORA)}: choose one of them, or remove dora",
            lambda self: not self.dora or self.initialization in _WITH_DORA,
        ),
        Rule(
            "self.initialization != 'Orthogonal' || self.rank % 2 == 0",
            "initialization Orthogonal needs an even rank: change rank",
            lambda self: self.initialization is not Initialization.ORTHOGONAL or self.rank % 2 == 0,
        ),
    )

    rank: Rank = Field(default=16, description="Rank of the update matrices.")
    alpha: Alpha = Field(default=32, description="Scale numerator: the update is multiplied by alpha / rank.")
    dropout: float = Field(default=0.0, ge=0.0, le=0.9, description="Dropout on the adapter's input.")
    target_modules: TargetModules = Field(default=[ALL_LINEAR])
    rs_lora: bool = Field(
        default=False, description="Multiply the update by alpha / √rank instead (rsLoRA, arXiv:2312.03732)."
    )
    dora: bool = Field(
        default=False,
        description="Train magnitude and direction apart (DoRA, arXiv:2402.09353). vLLM serves it merged only.",
    )
    rank_pattern: dict[ModuleName, Rank] | None = Field(
        default=None, max_length=64, description="Ranks that differ from rank, by name of the module."
    )
    alpha_pattern: dict[ModuleName, Alpha] | None = Field(
        default=None, max_length=64, description="Alphas that differ from alpha, by name of the module."
    )
    modules_to_save: ModulesToSave = None
    initialization: Initialization = Field(
        default=Initialization.DEFAULT,
        description="How the matrices begin. EVA, CorDA and LoRAGA look at training rows first. PiSSA, FastPiSSA, "
        "OLoRA, CorDA and LoRAGA change the base while training and are saved as plain LoRA of twice the rank.",
    )
    lora_plus_ratio: float | None = Field(
        default=None,
        ge=1.0,
        le=128.0,
        description="Learning rate of the B matrices over that of the A matrices (LoRA+, arXiv:2402.12354). Absent: 1.",
    )


class QloraFields(LoraFields):
    """LoRA over a 4-bit base."""

    rules = (
        *LoraFields.rules,
        Rule(
            f"self.initialization in {_quoted(_IN_4_BITS)}",
            f"qlora.initialization is {', '.join(_IN_4_BITS[:-1])} or {_IN_4_BITS[-1]}: the others need the base's "
            "weights in full; use them with method.lora",
            lambda self: self.initialization in _IN_4_BITS,
        ),
    )

    quantization: Quantization = Field(default_factory=Quantization, description="How the base is quantised.")


class Method(ApiModel):
    """Exactly one fine-tuning method."""

    rules = (
        Rule(
            "has(self.lora) != has(self.qlora)",
            "method needs exactly one of lora and qlora: keep one and remove the other",
            lambda self: (self.lora is None) != (self.qlora is None),
        ),
    )

    lora: LoraFields | None = Field(default=None, description="LoRA over the base in its own precision.")
    qlora: QloraFields | None = Field(default=None, description="LoRA over a base in 4 bits: less memory, slower.")

    @property
    def name(self) -> str:
        """The chosen method's name in the manifest."""
        return "lora" if self.lora is not None else "qlora"

    @property
    def fields(self) -> LoraFields:
        """The chosen method's fields."""
        chosen = self.lora or self.qlora
        assert chosen is not None  # noqa: S101 - the validator above holds
        return chosen

    @property
    def rank(self) -> int:
        """Rank of the adapter."""
        return self.fields.rank

    @property
    def quantization(self) -> Quantization | None:
        """How the base is quantised, or None."""
        return self.qlora.quantization if self.qlora is not None else None
