"""The losses of DPO, ORPO and KTO, from the log-probabilities of whole answers.

Shapes: one number per answer, float32; the losses are one number per pair, or per answer for KTO. Pure functions, which
tests hold against TRL's.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from tunesmith.api.objective import DpoFields, KtoFields


def dpo(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    chosen_reference: torch.Tensor,
    rejected_reference: torch.Tensor,
    fields: DpoFields,
) -> torch.Tensor:
    """Equation 7 of arXiv:2305.18290, with the label smoothing of its section on noisy preferences.

    Args:
        chosen: summed log-probability of the chosen answers.
        rejected: of the rejected ones.
        chosen_reference: of the chosen answers by the base.
        rejected_reference: of the rejected ones by the base.
        fields: beta and the smoothing.
    """
    margin = fields.beta * ((chosen - rejected) - (chosen_reference - rejected_reference))
    smoothing = fields.label_smoothing
    return -functional.logsigmoid(margin) * (1 - smoothing) - functional.logsigmoid(-margin) * smoothing


def odds_ratio(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """The second term of equation 6 of arXiv:2403.07691, without its weight.

    Args:
        chosen: mean log-probability per token of the chosen answers.
        rejected: of the rejected ones.
    """
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -functional.logsigmoid(log_odds)


def kto(
    answers: torch.Tensor, reference: torch.Tensor, desirable: torch.Tensor, divergence: torch.Tensor, fields: KtoFields
) -> torch.Tensor:
    """Equation 8 of arXiv:2402.01306, weighted.

    Args:
        answers: summed log-probability of the answers.
        reference: by the base.
        desirable: whether an answer is a good one (bool).
        divergence: estimate of the KL divergence from the base, a number of at least 0; no gradient reaches it.
        fields: beta and the weights.
    """
    gain = answers - reference - divergence
    value = torch.sigmoid(fields.beta * torch.where(desirable, gain, -gain))
    weight = torch.where(desirable, fields.desirable_weight, fields.undesirable_weight)
    return weight * (1 - value)


def _log1mexp(negative: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0, exact at both ends (Mächler, 2012)."""
    # A token that the model is sure of has the log-probability 0, whose odds are infinite.
    below = negative.clamp(max=-1e-7)
    near = torch.log(-torch.expm1(below))
    far = torch.log1p(-torch.exp(below))
    return torch.where(below > -math.log(2), near, far)
