"""Fine-tuning method of a FineTuneJob: exactly one of those that `tunesmith.api.methods` declares."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from pydantic import Field

from tunesmith.api.methods.ada_lora import AdaLoraFields
from tunesmith.api.methods.full import FullFields
from tunesmith.api.methods.ia3 import Ia3Fields
from tunesmith.api.methods.lora import LoraFields
from tunesmith.api.methods.p_tuning import PTuningFields
from tunesmith.api.methods.peft import OTHER_METHODS, PeftFields
from tunesmith.api.methods.prefix_tuning import PrefixTuningFields
from tunesmith.api.methods.prompt_tuning import PromptTuningFields
from tunesmith.api.methods.qlora import QloraFields
from tunesmith.api.model import ApiModel, Rule

if TYPE_CHECKING:
    from tunesmith.api.methods.declaration import MethodFields
    from tunesmith.api.methods.fields import Quantization


class Method(ApiModel):
    """Exactly one fine-tuning method."""

    lora: LoraFields | None = Field(default=None, description="LoRA on the base model in its own precision.")
    qlora: QloraFields | None = Field(
        default=None, description="LoRA on the base model in 4 bits: less memory, slower."
    )
    ada_lora: AdaLoraFields | None = Field(
        default=None, description="LoRA with ranks that are distributed during training."
    )
    ia3: Ia3Fields | None = Field(default=None, description="Trained scales of activations: fewest parameters.")
    prefix_tuning: PrefixTuningFields | None = Field(default=None, description="Trained keys and values.")
    prompt_tuning: PromptTuningFields | None = Field(default=None, description="Trained prompt embeddings.")
    p_tuning: PTuningFields | None = Field(default=None, description="Prompt embeddings from a small trained network.")
    full: FullFields | None = Field(
        default=None, description="Full fine-tuning of all weights. The artifact is a complete model."
    )
    peft: PeftFields | None = Field(default=None, description="Any other method of PEFT, with PEFT's own fields.")

    @property
    def name(self) -> str:
        """Name of the chosen method in the manifest, such as adaLora."""
        return next(name for attribute, name in _NAMES.items() if getattr(self, attribute) is not None)

    @property
    def fields(self) -> MethodFields:
        """Fields of the chosen method."""
        chosen: MethodFields = next(fields for attribute in _NAMES if (fields := getattr(self, attribute)) is not None)
        return chosen

    @property
    def rank(self) -> int | None:
        """Rank of a LoRA adapter; None for other methods."""
        return self.fields.rank if isinstance(self.fields, LoraFields) else None

    @property
    def published_rank(self) -> int | None:
        """Lowest value that the highest rank of the published LoRA adapter can have; None for other methods."""
        return self.fields.published_rank if isinstance(self.fields, LoraFields) else None

    @property
    def shardable(self) -> bool:
        """True if the base's weights can be sharded over ranks."""
        return self.fields.shardable

    @property
    def dropout(self) -> float:
        """Dropout on the adapter's input."""
        return getattr(self.fields, "dropout", 0.0)

    @property
    def quantization(self) -> Quantization | None:
        """Quantisation of the base; None if it is not quantised."""
        return getattr(self.fields, "quantization", None)

    @property
    def learning_rate(self) -> float:
        """Default peak learning rate. A single default for all methods would leave many of them untrained."""
        return self.fields.traits.learning_rate


_NAMES = {attribute: str(info.alias) for attribute, info in Method.model_fields.items()}
"""Name in the manifest by attribute."""
METHODS: dict[str, type[MethodFields]] = {
    str(info.alias): next(option for option in get_args(info.annotation) if option is not type(None))
    for info in Method.model_fields.values()
}
"""Class of fields by method, under the method's name in the manifest."""
SERVED_TYPES = sorted(
    {
        str(traits.peft_type)
        for traits in (*(fields.declared for fields in METHODS.values()), *OTHER_METHODS.values())
        if traits is not None and traits.served
    }
)
"""PEFT types of the adapters that vLLM loads."""
SHARDABLE = [name for name, fields in METHODS.items() if fields.sharding is not None]
"""Names of the methods that allow sharding of the base's weights over ranks, at least with some values of their
fields."""
QUANTIZED_CEL = (
    "("
    + " || ".join(
        present
        for name, fields in METHODS.items()
        if (present := fields.quantization_cel(f"self.method.{name}")) is not None
    )
    + ")"
)
"""CEL expression on a spec: true if the base is held in 4 bits."""
SHARDABLE_CEL = (
    "("
    + " || ".join(
        fields.sharding.at(f"self.method.{name}") for name, fields in METHODS.items() if fields.sharding is not None
    )
    + ")"
)
"""CEL expression on a spec: true if the base's weights can be sharded over ranks (FSDP2)."""

Method.rules = (
    Rule(
        f"[{', '.join(f'has(self.{name})' for name in METHODS)}].exists_one(given, given)",
        f"method must have exactly one of {', '.join(METHODS)}: keep one and remove the others",
        lambda self: len([name for name in _NAMES if getattr(self, name) is not None]) == 1,
    ),
)
