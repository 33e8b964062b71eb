"""The fine-tuning methods of a FineTuneJob and their fields."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunesmith.api.model import ApiModel, Rule

ModuleName = Annotated[str, Field(min_length=1, max_length=128)]


class LoraFields(ApiModel):
    """Low-rank adaptation (LoRA, arXiv:2106.09685)."""

    rules = (
        Rule(
            "!('all-linear' in self.targetModules) || size(self.targetModules) == 1",
            "targetModules: all-linear stands for all of them; remove it or the other names",
            lambda self: "all-linear" not in self.target_modules or len(self.target_modules) == 1,
        ),
    )

    rank: int = Field(default=16, ge=1, le=512, description="Rank of the update matrices.")
    alpha: int = Field(
        default=32, ge=1, le=4096, description="Scale numerator: the update is multiplied by alpha / rank."
    )
    dropout: float = Field(default=0.0, ge=0.0, le=0.9, description="Dropout on the adapter's input.")
    target_modules: list[ModuleName] = Field(
        default=["all-linear"],
        min_length=1,
        max_length=64,
        description="Linear modules that get an adapter, by name; all-linear for all but the head.",
    )


class Quantization(ApiModel):
    """How the frozen base is held in memory (QLoRA, arXiv:2305.14314)."""

    type: Literal["nf4"] = Field(default="nf4", description="4-bit NormalFloat.")
    double_quantization: bool = Field(default=True, description="Quantise the quantisation constants too.")
    compute_type: Literal["bfloat16", "float32"] | None = Field(
        default=None, description="Type of the matrix products. Absent: bfloat16 on a GPU, float32 on a CPU."
    )


class QloraFields(LoraFields):
    """LoRA over a 4-bit base."""

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
    def fields(self) -> LoraFields:
        """The chosen method's fields."""
        chosen = self.lora or self.qlora
        assert chosen is not None  # noqa: S101 - the validator above holds
        return chosen
