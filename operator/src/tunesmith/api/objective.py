"""Training objective of a FineTuneJob."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from tunesmith.api.model import ApiModel, Rule


class ObjectiveName(StrEnum):
    """Names of the objectives in the manifest."""

    SFT = "sft"
    DPO = "dpo"
    ORPO = "orpo"
    KTO = "kto"


class SftFields(ApiModel):
    """Supervised fine-tuning: raises the probability of the answers."""


class DpoFields(ApiModel):
    """Direct preference optimisation (DPO, arXiv:2305.18290): raises the chosen answer relative to the rejected one."""

    beta: float = Field(
        default=0.1, ge=0.001, le=10.0, description="Strength of the penalty for deviating from the base model."
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0.0,
        le=0.49,
        description="Assumed share of pairs with swapped answers (arXiv:2305.18290).",
    )


class OrpoFields(ApiModel):
    """Odds ratio preference optimisation (ORPO, arXiv:2403.07691): learns chosen answers, penalises rejected ones."""

    weight: float = Field(
        default=0.1, ge=0.001, le=10.0, description="Weight of the odds ratio relative to the chosen answer's loss (λ)."
    )


class KtoFields(ApiModel):
    """Kahneman-Tversky optimisation (KTO, arXiv:2402.01306): learns from single good and bad answers.

    A pair of a chosen and a rejected answer counts as one good and one bad answer.
    """

    beta: float = Field(
        default=0.1, ge=0.001, le=10.0, description="Strength of the penalty for deviating from the base model."
    )
    desirable_weight: float = Field(
        default=1.0, ge=0.01, le=100.0, description="Weight of the loss of desirable answers."
    )
    undesirable_weight: float = Field(
        default=1.0, ge=0.01, le=100.0, description="Weight of the loss of undesirable answers."
    )


class Objective(ApiModel):
    """Exactly one objective."""

    rules = (
        Rule(
            f"[{', '.join(f'has(self.{name})' for name in ObjectiveName)}].exists_one(given, given)",
            "objective must have exactly one of sft, dpo, orpo and kto: keep one and remove the others",
            lambda self: len([name for name in ObjectiveName if getattr(self, name) is not None]) == 1,
        ),
    )

    sft: SftFields | None = Field(default=None, description="Supervised fine-tuning on the answers.")
    dpo: DpoFields | None = Field(
        default=None, description="Preference optimisation on pairs, with the base model as reference."
    )
    orpo: OrpoFields | None = Field(
        default=None, description="Preference optimisation on pairs, without a reference model."
    )
    kto: KtoFields | None = Field(
        default=None, description="Preference optimisation on answers labelled desirable or undesirable."
    )

    @property
    def name(self) -> ObjectiveName:
        """Name of the chosen objective."""
        return next(name for name in ObjectiveName if getattr(self, name) is not None)
