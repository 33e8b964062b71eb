"""Losses of DPO, ORPO and KTO, from the log-probabilities of whole answers.

Shapes: one number per answer, float32; the losses are one number per pair, or per answer for KTO. Pure functions, which
tests compare with TRL's.
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
    """Return equation 7 of arXiv:2305.18290, with the label smoothing of its section on noisy preferences.

    Args:
        chosen: summed log-probability of the chosen answers.
        rejected: summed log-probability of the rejected answers.
        chosen_reference: summed log-probability of the chosen answers under the base.
        rejected_reference: summed log-probability of the rejected answers under the base.
        fields: beta and the label smoothing.
    """
    margin = fields.beta * ((chosen - rejected) - (chosen_reference - rejected_reference))
    smoothing = fields.label_smoothing
    return -functional.logsigmoid(margin) * (1 - smoothing) - functional.logsigmoid(-margin) * smoothing


def odds_ratio(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Return the second term of equation 6 of arXiv:2403.07691, without its weight.

    Args:
        chosen: mean log-probability per token of the chosen answers.
        rejected: mean log-probability per token of the rejected answers.
    """
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -functional.logsigmoid(log_odds)


def kto(
    answers: torch.Tensor, reference: torch.Tensor, desirable: torch.Tensor, divergence: torch.Tensor, fields: KtoFields
) -> torch.Tensor:
    """Return equation 8 of arXiv:2402.01306, weighted.

    Args:
        answers: summed log-probability of the answers.
        reference: summed log-probability of the answers under the base.
        desirable: True if an answer is a good one (bool).
        divergence: estimate of the KL divergence from the base, at least 0; no gradient flows through it.
        fields: beta and the weights.
    """
    gain = answers - reference - divergence
    value = torch.sigmoid(fields.beta * torch.where(desirable, gain, -gain))
    weight = torch.where(desirable, fields.desirable_weight, fields.undesirable_weight)
    return weight * (1 - value)


def _log1mexp(negative: torch.Tensor) -> torch.Tensor:
    """Return log(1 - exp(x)) for x < 0, accurate at both ends (Mächler, 2012)."""
    # A token of probability 1 has the log-probability 0, and its odds are infinite.
    below = negative.clamp(max=-1e-7)
    near = torch.log(-torch.expm1(below))
    far = torch.log1p(-torch.exp(below))
    return torch.where(below > -math.log(2), near, far)
