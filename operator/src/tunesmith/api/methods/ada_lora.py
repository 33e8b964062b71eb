"""AdaLoRA."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from tunesmith.api.methods.declaration import ALL_LINEAR, NOT_IN_PEFT, MethodFields, MethodTraits, PeftName
from tunesmith.api.methods.fields import (
    Alpha,
    LoraDropout,
    ModulesToSave,
    OptionalQuantization,
    Rank,
    TargetModules,
    target_rules,
)
from tunesmith.api.model import Rule


class AdaLoraFields(MethodFields):
    """LoRA that reallocates rank to the modules that need it (AdaLoRA, arXiv:2303.10512)."""

    declared = MethodTraits("ADALORA", learning_rate=1e-3, decided_by_training=frozenset({"r", "rank_pattern"}))
    # PEFT requires it before the steps of the run are known.
    peft_constants: ClassVar[dict[str, Any]] = {"total_step": 1_000_000}
    rules = (
        *target_rules,
        Rule(
            "self.targetRank < self.initialRank",
            "adaLora.targetRank must be less than adaLora.initialRank, because ranks are only reduced",
            lambda self: self.target_rank < self.initial_rank,
        ),
    )

    initial_rank: Annotated[Rank, PeftName("init_r")] = Field(
        default=12, description="Rank of every module at the start."
    )
    target_rank: Annotated[Rank, PeftName("target_r")] = Field(default=8, description="Mean rank at the end.")
    alpha: Annotated[Alpha, PeftName("lora_alpha")] = Field(
        default=32, description="Scale numerator: the update is multiplied by alpha / initialRank."
    )
    dropout: LoraDropout = 0.0
    target_modules: TargetModules = Field(default=[ALL_LINEAR])
    modules_to_save: ModulesToSave = None
    # Fractions of the run; PEFT expects steps.
    warmup_ratio: Annotated[float, NOT_IN_PEFT] = Field(
        default=0.1, ge=0.0, le=0.4, description="Share of the steps at the start before ranks are reduced."
    )
    final_ratio: Annotated[float, NOT_IN_PEFT] = Field(
        default=0.2, ge=0.0, le=0.4, description="Share of the steps at the end in which ranks are fixed."
    )
    interval: Annotated[int, PeftName("deltaT")] = Field(
        default=1, ge=1, le=10_000, description="Number of steps between two allocations of the ranks."
    )
    orthogonality: Annotated[float, PeftName("orth_reg_weight")] = Field(
        default=0.5, ge=0.001, le=10.0, description="Weight of the loss that keeps the matrices orthogonal."
    )
    quantization: OptionalQuantization = None

    def peft_values_of_run(self, total_steps: int, base_model: str) -> dict[str, Any]:  # noqa: ARG002 - as in the base class
        """Return the steps at which ranks begin and cease to be taken away."""
        return {
            "total_step": total_steps,
            "tinit": int(self.warmup_ratio * total_steps),
            "tfinal": int(self.final_ratio * total_steps),
        }
