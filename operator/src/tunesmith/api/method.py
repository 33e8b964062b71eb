"""The fine-tuning methods of a FineTuneJob and their fields."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

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
    LOFTQ = "LoftQ"


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
IN_4_BITS = (Initialization.DEFAULT, Initialization.GAUSSIAN, Initialization.EVA, Initialization.LOFTQ)


_WITH_WEIGHTS_SHARED_OUT = tuple(
    name
    for name in Initialization
    if name not in {Initialization.EVA, Initialization.CORDA, Initialization.LORA_GA, Initialization.LOFTQ}
)


def quoted(values: Iterable[str]) -> str:
    """A list in CEL."""
    return "[" + ", ".join(f"'{value}'" for value in values) + "]"


class Quantization(ApiModel):
    """How the frozen base is held in memory (QLoRA, arXiv:2305.14314)."""

    type: Literal["nf4"] = Field(default="nf4", description="4-bit NormalFloat.")
    double_quantization: bool = Field(default=True, description="Quantise the quantisation constants too.")
    compute_type: Literal["bfloat16", "float32"] | None = Field(
        default=None, description="Type of the matrix products. Absent: bfloat16 on a GPU, float32 on a CPU."
    )


_lora_rules = (
    *_target_rules,
    Rule(
        f"!self.dora || self.initialization in {quoted(_WITH_DORA)}",
        f"dora goes with initialization {', '.join(_WITH_DORA)}: choose one of them, or remove dora",
        lambda self: not self.dora or self.initialization in _WITH_DORA,
    ),
    Rule(
        "self.initialization != 'Orthogonal' || self.rank % 2 == 0",
        "initialization Orthogonal needs an even rank: change rank",
        lambda self: self.initialization is not Initialization.ORTHOGONAL or self.rank % 2 == 0,
    ),
)


class LoraFields(ApiModel):
    """Low-rank adaptation (LoRA, arXiv:2106.09685)."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *_lora_rules,
        Rule(
            "self.initialization != 'LoftQ'",
            "initialization LoftQ makes up for what 4 bits lose: use it with method.qlora",
            lambda self: self.initialization is not Initialization.LOFTQ,
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
        "OLoRA, CorDA and LoRAGA change the base while training, LoftQ (qlora only) makes up for the 4 bits; they are "
        "saved as plain LoRA of twice the rank, on the base as it was published.",
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
        *_lora_rules,
        Rule(
            f"self.initialization in {quoted(IN_4_BITS)}",
            f"qlora.initialization is {', '.join(IN_4_BITS[:-1])} or {IN_4_BITS[-1]}: the others need the base's "
            "weights in full; use them with method.lora",
            lambda self: self.initialization in IN_4_BITS,
        ),
    )

    quantization: Quantization = Field(default_factory=Quantization, description="How the base is quantised.")


OptionalQuantization = Annotated[
    Quantization | None, Field(description="Holds the frozen base in 4 bits. Absent: in its own precision.")
]


class AdaLoraFields(ApiModel):
    """LoRA that moves its rank to the modules that need it (AdaLoRA, arXiv:2303.10512)."""

    rules = (
        *_target_rules,
        Rule(
            "self.targetRank < self.initialRank",
            "adaLora.targetRank must be less than adaLora.initialRank: ranks are only taken away",
            lambda self: self.target_rank < self.initial_rank,
        ),
    )

    initial_rank: Rank = Field(default=12, description="Rank of every module at the start.")
    target_rank: Rank = Field(default=8, description="Mean rank at the end.")
    alpha: Alpha = Field(default=32, description="Scale numerator: the update is multiplied by alpha / initialRank.")
    dropout: float = Field(default=0.0, ge=0.0, le=0.9, description="Dropout on the adapter's input.")
    target_modules: TargetModules = Field(default=[ALL_LINEAR])
    modules_to_save: ModulesToSave = None
    warmup_ratio: float = Field(
        default=0.1, ge=0.0, le=0.4, description="Share of the steps before ranks are taken away."
    )
    final_ratio: float = Field(
        default=0.2, ge=0.0, le=0.4, description="Share of the steps at the end in which ranks are fixed."
    )
    interval: int = Field(default=1, ge=1, le=10_000, description="Steps between two allocations of the ranks.")
    orthogonality: float = Field(
        default=0.5, ge=0.001, le=10.0, description="Weight of the loss that keeps the matrices orthogonal."
    )
    quantization: OptionalQuantization = None


class Ia3Fields(ApiModel):
    """Learned scales of keys, values and the feed-forward's inner activations (IA3, arXiv:2205.05638)."""

    rules = (
        Rule(
            "!has(self.feedforwardModules) || (has(self.targetModules) && "
            "self.feedforwardModules.all(name, name in self.targetModules))",
            "ia3.feedforwardModules are some of ia3.targetModules: name them there too",
            lambda self: set(self.feedforward_modules or []) <= set(self.target_modules or []),
        ),
    )

    target_modules: list[ModuleName] | None = Field(
        default=None,
        min_length=1,
        max_length=64,
        description="Linear modules that get scales. Absent: those that PEFT names for the model's architecture.",
    )
    feedforward_modules: list[ModuleName] | None = Field(
        default=None,
        max_length=64,
        description="Those of them whose input is scaled, not their output. Absent: as targetModules.",
    )
    modules_to_save: ModulesToSave = None
    quantization: OptionalQuantization = None


class VirtualTokensFields(ApiModel):
    """Trained vectors in front of every prompt."""

    virtual_tokens: int = Field(default=20, ge=1, le=1024, description="Number of trained vectors.")
    quantization: OptionalQuantization = None


class PrefixTuningFields(VirtualTokensFields):
    """Trained keys and values in front of every layer's (prefix tuning, arXiv:2101.00190)."""

    projection: bool = Field(default=False, description="Make them with a small network, left out of the artifact.")
    encoder_hidden_size: int | None = Field(
        default=None, ge=1, le=65536, description="Width of that network. Absent: the model's hidden size."
    )


class PromptTuningFields(VirtualTokensFields):
    """Trained embeddings in front of the prompt (prompt tuning, arXiv:2104.08691)."""

    initial_text: str | None = Field(
        default=None,
        min_length=1,
        max_length=4096,
        description="Text whose embeddings they begin as. Absent: those of tokens at random.",
    )


class PTuningFields(VirtualTokensFields):
    """Embeddings in front of the prompt that a small network makes (P-tuning, arXiv:2103.10385)."""

    encoder: Literal["Mlp", "Lstm"] = Field(default="Mlp", description="Kind of that network.")
    encoder_hidden_size: int | None = Field(
        default=None, ge=1, le=65536, description="Width of that network. Absent: the model's hidden size."
    )
    encoder_layers: int = Field(default=2, ge=1, le=16, description="Layers of an Lstm; an Mlp has two.")
    encoder_dropout: float = Field(default=0.0, ge=0.0, le=0.9, description="Dropout in an Lstm.")


class FullFields(ApiModel):
    """All weights are trained; the artifact is a model, not an adapter."""


_MAX_CONFIG_DEPTH = 8
_MAX_CONFIG_VALUES = 2000


def _bounded(config: dict[str, Any]) -> dict[str, Any]:
    """The config, if it is no larger than any of PEFT's: the API server accepts 10,000 levels."""
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
        raise ValueError(f"method.peft.config is nested more than {_MAX_CONFIG_DEPTH} levels deep: no field of PEFT is")
    return config


class PeftFields(ApiModel):
    """Any other method of PEFT."""

    type: str = Field(
        min_length=1, max_length=64, description="PEFT's name of the method, such as VERA, LOHA or OFT (PeftType)."
    )
    config: Annotated[dict[str, Any], AfterValidator(_bounded)] = Field(
        default={},
        max_length=64,
        description="Fields of PEFT's own config class, as PEFT names them. Those that take paths are refused.",
        json_schema_extra={"x-kubernetes-preserve-unknown-fields": True},
    )
    quantization: OptionalQuantization = None


MethodFields = (
    LoraFields
    | QloraFields
    | AdaLoraFields
    | Ia3Fields
    | PrefixTuningFields
    | PromptTuningFields
    | PTuningFields
    | FullFields
    | PeftFields
)
_NAMES = {
    "lora": "lora",
    "qlora": "qlora",
    "ada_lora": "adaLora",
    "ia3": "ia3",
    "prefix_tuning": "prefixTuning",
    "prompt_tuning": "promptTuning",
    "p_tuning": "pTuning",
    "full": "full",
    "peft": "peft",
}
"""Attribute → name in the manifest."""
_LISTED = ", ".join(_NAMES.values())
# One rate for all leaves many methods untrained. Where PEFT's benchmark (method_comparison, MetaMathQA to GSM8K with
# Llama 3.2 3B) compared rates, its best; the papers' for LoRA, AdaLoRA, FourierFT and Uni-LoRA.
_LEARNING_RATES = {
    "lora": 2e-4,
    "qlora": 2e-4,
    "adaLora": 1e-3,
    "ia3": 5e-3,
    "prefixTuning": 5e-3,
    "promptTuning": 1e-3,
    "pTuning": 1e-4,
    "full": 1e-5,
}
_PEFT_LEARNING_RATE = 1e-4
_PEFT_LEARNING_RATES = {
    "LORA": 2e-4,
    "ADAPTION_PROMPT": 5e-4,
    "C3A": 3e-1,
    "DELORA": 1e-3,
    "FOURIERFT": 3e-3,
    "GRALORA": 2e-4,
    "HIRA": 4.5e-3,
    "LN_TUNING": 1e-3,
    "LOKR": 3e-3,
    "MULTITASK_PROMPT_TUNING": 1e-3,
    "OSF": 5e-5,
    "PVERA": 3e-3,
    "ROAD": 1e-3,
    "SHIRA": 3e-4,
    "TINYLORA": 1e-3,
    "TRAINABLE_TOKENS": 2e-1,
    "UNILORA": 2e-3,
    "VERA": 1e-3,
}
_OPTIONALLY_QUANTIZED = [name for name in _NAMES.values() if name not in {"lora", "qlora", "full"}]
QUANTIZED_CEL = (
    "("
    + " || ".join(
        [
            "has(self.method.qlora)",
            *(f"(has(self.method.{name}) && has(self.method.{name}.quantization))" for name in _OPTIONALLY_QUANTIZED),
        ]
    )
    + ")"
)
"""Of a spec: whether the base is held in 4 bits."""
SHARDABLE_CEL = (
    "(has(self.method.full) || has(self.method.ia3) || "
    + " || ".join(
        f"(has(self.method.{name}) && (!has(self.method.{name}.initialization) || "
        f"self.method.{name}.initialization in {quoted(_WITH_WEIGHTS_SHARED_OUT)}))"
        for name in ("lora", "qlora")
    )
    + ") && !(has(self.method.qlora) && has(self.method.qlora.dora) && self.method.qlora.dora)"
)
"""Of a spec: whether the base's weights can be shared out among ranks (FSDP2)."""


class Method(ApiModel):
    """Exactly one fine-tuning method."""

    rules = (
        Rule(
            f"[{', '.join(f'has(self.{name})' for name in _NAMES.values())}].exists_one(given, given)",
            f"method needs exactly one of {_LISTED}: keep one and remove the others",
            lambda self: len([name for name in _NAMES if getattr(self, name) is not None]) == 1,
        ),
    )

    lora: LoraFields | None = Field(default=None, description="LoRA over the base in its own precision.")
    qlora: QloraFields | None = Field(default=None, description="LoRA over a base in 4 bits: less memory, slower.")
    ada_lora: AdaLoraFields | None = Field(default=None, description="LoRA that learns where rank is needed.")
    ia3: Ia3Fields | None = Field(default=None, description="Learned scales: the fewest parameters.")
    prefix_tuning: PrefixTuningFields | None = Field(default=None, description="Trained keys and values.")
    prompt_tuning: PromptTuningFields | None = Field(default=None, description="Trained prompt embeddings.")
    p_tuning: PTuningFields | None = Field(default=None, description="Prompt embeddings made by a small network.")
    full: FullFields | None = Field(default=None, description="Train all weights: the artifact is a whole model.")
    peft: PeftFields | None = Field(default=None, description="Any other method of PEFT, with PEFT's own fields.")

    @property
    def name(self) -> str:
        """The chosen method's name in the manifest, such as adaLora."""
        return next(name for attribute, name in _NAMES.items() if getattr(self, attribute) is not None)

    @property
    def fields(self) -> MethodFields:
        """The chosen method's fields."""
        chosen: MethodFields = next(fields for attribute in _NAMES if (fields := getattr(self, attribute)) is not None)
        return chosen

    @property
    def rank(self) -> int | None:
        """Rank of a LoRA adapter; None for other methods."""
        return self.fields.rank if isinstance(self.fields, LoraFields) else None

    @property
    def shardable(self) -> bool:
        """Whether the base's weights can be shared out among ranks."""
        if isinstance(self.fields, LoraFields):
            # DoRA takes the norms of weights that wait to be put into 4 bits.
            whole = self.fields.dora and self.quantization is not None
            return self.fields.initialization in _WITH_WEIGHTS_SHARED_OUT and not whole
        return isinstance(self.fields, Ia3Fields | FullFields)

    @property
    def dropout(self) -> float:
        """Dropout on the adapter's input."""
        return self.fields.dropout if isinstance(self.fields, LoraFields | AdaLoraFields) else 0.0

    @property
    def quantization(self) -> Quantization | None:
        """How the base is quantised, or None."""
        return None if self.lora is not None else getattr(self.fields, "quantization", None)

    @property
    def learning_rate(self) -> float:
        """Peak learning rate where the manifest names none."""
        if self.peft is not None:
            return _PEFT_LEARNING_RATES.get(self.peft.type.upper(), _PEFT_LEARNING_RATE)
        return _LEARNING_RATES[self.name]
