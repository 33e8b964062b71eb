"""The loss at target positions only: no logits of other positions, and never those of a whole batch at once."""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.utils.generic import ModelOutput

from tunesmith_trainer.data import IGNORED
from tunesmith_trainer.preflight.sizing import LOSS_POSITIONS

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    Score = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class TargetLoss(ModelOutput):
    """Output of a model with `add_target_loss`.

    Attributes:
        loss: 0, plus the penalty of a PEFT method that has one (AdaLoRA's orthogonality).
        each: negative log-likelihood of each target, in nats, in the order of the targets.
        summed: sum of `each`.
        targets: number of targets.
    """

    loss: torch.Tensor | None = None
    each: torch.Tensor | None = None
    summed: torch.Tensor | None = None
    targets: torch.Tensor | None = None


_HALF_SCALE = 256.0
"""Factor of the gradients that the frozen head computes in float16, of which many are below its smallest values."""


class _FrozenHead(torch.autograd.Function):
    """Cross entropy with a frozen head: the gradient is computed in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, labels: torch.Tensor, score: Score) -> torch.Tensor:
        needed = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if needed else None
        losses = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        half = hidden.dtype is torch.float16
        for start in range(0, len(labels), LOSS_POSITIONS):
            part = hidden[start : start + LOSS_POSITIONS].detach().requires_grad_(needed)
            with torch.set_grad_enabled(needed):
                loss = _cross_entropy(part, labels[start : start + LOSS_POSITIONS], score)
                summed = loss.sum() * _HALF_SCALE if half else loss.sum()
            if gradient is not None:
                # The loss of a position depends on that position's state alone.
                (gradient[start : start + LOSS_POSITIONS],) = torch.autograd.grad(summed, part)
            losses[start : start + LOSS_POSITIONS] = loss.detach()
        ctx.gradient = gradient
        return losses

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        if ctx.gradient is None:
            return None, None, None
        weights = outer[0][:, None]
        if ctx.gradient.dtype is torch.float16:
            # The product of both is in its range, unlike each.
            return (ctx.gradient.float() * (weights / _HALF_SCALE)).half(), None, None
        return ctx.gradient * weights.to(ctx.gradient), None, None


def _cross_entropy(hidden: torch.Tensor, labels: torch.Tensor, score: Score) -> torch.Tensor:
    return functional.cross_entropy(score(hidden).float(), labels, reduction="none")


def losses_at(hidden: torch.Tensor, labels: torch.Tensor, score: Score, *, trained: bool) -> torch.Tensor:
    """Return the negative log-likelihood of each of `labels` (n) at `hidden` (n, width), in nats: (n), float32.

    Args:
        hidden: last hidden states at the positions that predict the labels.
        labels: token ids.
        score: maps hidden states to logits.
        trained: True if the head itself is trained, so that gradients must reach it.
    """
    if not len(labels):
        # Empty; keeps the graph connected if a micro-batch has no target. A trained head gets a gradient of zeros, as
        # the other ranks have one.
        return (score(hidden) if trained else hidden).sum(dim=1).float()
    if not trained:
        frozen: torch.Tensor = _FrozenHead.apply(hidden, labels, score)
        return frozen
    parts = [
        checkpoint(
            _cross_entropy,
            hidden[start : start + LOSS_POSITIONS],
            labels[start : start + LOSS_POSITIONS],
            score,
            use_reentrant=False,
        )
        for start in range(0, len(labels), LOSS_POSITIONS)
    ]
    return torch.cat(parts)


def add_target_loss(model: PreTrainedModel, *, whole_logits: bool = False) -> None:
    """Give a causal language model `model(…, labels=…, target_loss=True)`, which returns a TargetLoss.

    All other calls are unchanged. Call it before PEFT or a distributed wrapper wraps the model, so that it works
    through them; calling it again changes `whole_logits`.

    Args:
        model: the base model.
        whole_logits: True to compute the logits with the model's own forward pass, if its head does more than this
            module reproduces.
    """
    original = getattr(model, "_before_target_loss", model.forward)
    scale, softcap = _logit_transform(model)

    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, target_loss: bool = False, **kwargs: Any) -> Any:
        if not target_loss:
            return original(*args, **kwargs)
        labels = kwargs.pop("labels")
        kwargs["use_cache"] = False
        if whole_logits:
            states = original(*args, **kwargs).logits
        else:
            states = self.base_model(*args, **kwargs).last_hidden_state
        head = self.get_output_embeddings()
        # A method that puts its own tokens before the row returns as many labels as there are states.
        shifted = labels[:, 1:].to(states.device)
        chosen = shifted != IGNORED

        def score(hidden: torch.Tensor) -> torch.Tensor:
            if whole_logits:
                return hidden
            logits = head(hidden)
            if scale != 1.0:
                logits = logits * scale
            return logits if softcap is None else torch.tanh(logits / softcap) * softcap

        trained = not whole_logits and any(parameter.requires_grad for parameter in head.parameters())
        each = losses_at(states[:, :-1][chosen], shifted[chosen], score, trained=trained)
        summed = each.sum()
        return TargetLoss(loss=torch.zeros_like(summed), each=each, summed=summed, targets=chosen.sum())

    model._before_target_loss = original  # noqa: SLF001 - its own attribute
    model.forward = types.MethodType(forward, model)


def _logit_transform(model: PreTrainedModel) -> tuple[float, float | None]:
    """Return the factor and the soft cap that the model's own forward pass applies to the logits."""
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        factor = getattr(config, name, None)
        if factor is not None:
            return float(factor), softcap
    divisor = getattr(config, "logits_scaling", None)
    return (1.0 if divisor is None else 1.0 / float(divisor)), softcap
