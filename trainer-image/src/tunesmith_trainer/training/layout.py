"""Choose the fastest loss implementation with which a model is correct: they are tried on two short rows."""

from __future__ import annotations

import logging
import math
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from tunesmith_trainer.base_model.layers import mixes_tokens_by_attention
from tunesmith_trainer.base_model.precision import training_precision
from tunesmith_trainer.data import IGNORED
from tunesmith_trainer.errors import SelfCheckError
from tunesmith_trainer.training.attention import Attention, has_varlen_kernel, use_attention
from tunesmith_trainer.training.batches import Collator, Layout, on_device, without_shared_prefixes
from tunesmith_trainer.training.loss import add_target_loss

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peft import PeftModel
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

_TOLERANCE = {torch.float32: 1e-4}
_ROUNDED_TOLERANCE = 2e-2
"""Relative tolerance for types with fewer digits."""
_ROW_TOKENS = 12
_BRANCH_TOKENS = 9
_UNSUPPORTED_ERRORS = (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""Errors raised by implementations that a model does not support."""


@dataclass(frozen=True)
class LossImplementation:
    """A loss implementation.

    Attributes:
        layout: layout of the rows in a micro-batch.
        attention: attention implementation; None: the model's default.
        whole_logits: True if the model's own forward pass computes all logits.
    """

    layout: Layout
    attention: Attention | None = None
    whole_logits: bool = False

    def __str__(self) -> str:
        attention = "" if self.attention is None else f", {self.attention}"
        return f"rows {self.layout}{attention}, logits {'whole' if self.whole_logits else 'chunked'}"

    def use_attention(self, base: PreTrainedModel) -> AbstractContextManager[None]:
        """Make the model use this attention within the block."""
        return nullcontext() if self.attention is None else use_attention(base, self.attention)


def product_type(base: PreTrainedModel) -> torch.dtype:
    """Return the type of a base's matrix products."""
    return base.config.dtype or torch.float32


def tolerance(base: PreTrainedModel) -> float:
    """Return the relative tolerance for equal results of two implementations, in the type of a base's products."""
    return _TOLERANCE.get(product_type(base), _ROUNDED_TOLERANCE)


def loss_implementations(device: torch.device, dtype: torch.dtype) -> list[LossImplementation]:
    """Return the implementations to try on a device with products of a type, the fastest first."""
    flat = [Attention.VARLEN, Attention.SEGMENTS] if has_varlen_kernel(device, dtype) else [Attention.SEGMENTS]
    padded = [LossImplementation(Layout.PADDED, whole_logits=whole) for whole in (False, True)]
    return [*(LossImplementation(Layout.FLAT, attention) for attention in flat), *padded]


def choose_loss_implementation(model: PeftModel, base: PreTrainedModel) -> LossImplementation:
    """Return the fastest implementation whose loss for a row equals that of the model's own pass over it alone.

    Architectures whose layers mix neighbouring rows, and methods that put tokens before a row, are detected by trying.

    Args:
        model: base with adapter.
        base: the model inside it, which gets `target_loss` (see `add_target_loss`).

    Raises:
        SelfCheckError: no implementation returns the row's loss.
    """
    tokens = torch.arange(3, 3 + 2 * _ROW_TOKENS) * 7 % base.config.get_text_config().vocab_size
    other = {"input_ids": tokens[: 2 * _ROW_TOKENS - 5].tolist(), "labels": [IGNORED] * (2 * _ROW_TOKENS - 5)}
    ids = tokens[:_ROW_TOKENS].tolist()
    row = {"input_ids": ids, "labels": [IGNORED, *ids[1:]]}
    tolerated = tolerance(base)
    candidates = loss_implementations(model.device, product_type(base))
    if not mixes_tokens_by_attention(type(base), base.config):
        candidates = [candidate for candidate in candidates if candidate.attention is None]
    reasons = []
    with _evaluation_mode(model):
        expected = _loss_alone(model, ids)
        if not math.isfinite(expected):
            return candidates[0]  # nothing to compare with; the held-out loss will show errors
        for implementation in candidates:
            add_target_loss(base, whole_logits=implementation.whole_logits)
            batch = on_device(Collator(size=2, pad=0, layout=implementation.layout).join([other, row]), model.device)
            try:
                with implementation.use_attention(base):
                    loss = float(model(**batch, target_loss=True).summed)
            except _UNSUPPORTED_ERRORS as error:
                reasons.append(f"{implementation}: {error}")
                continue
            if abs(loss - expected) > tolerated * abs(expected):
                reasons.append(f"{implementation}: {loss:.6f} instead of {expected:.6f}")
                continue
            error_in_training = _training_error(model, base, implementation, batch)
            if error_in_training is None:
                log.info("%s; %s", implementation, reasons)
                return implementation
            reasons.append(f"{implementation}: {error_in_training}")
    raise SelfCheckError(
        f"the loss of a row depends on the other rows of its micro-batch in a {type(base).__name__} "
        f"({'; '.join(reasons)}): this base model cannot be trained in batches; use another one"
    )


def shares_prefixes(model: PeftModel, base: PreTrainedModel, implementation: LossImplementation) -> bool:
    """Return True if rows have the same losses after a prefix that they share as after their own copy of it.

    Args:
        model: base with adapter.
        base: the model inside it.
        implementation: the implementation that was chosen for it.
    """
    if implementation.layout is not Layout.FLAT:
        return False
    tokens = (torch.arange(3, 3 + 2 * _ROW_TOKENS) * 7 % base.config.get_text_config().vocab_size).tolist()
    size = 2 * _ROW_TOKENS - _BRANCH_TOKENS
    row = {
        "input_ids": tokens,
        "labels": [IGNORED, *tokens[1:size], IGNORED, *tokens[size + 1 :]],
        "seq_lengths": [size, _BRANCH_TOKENS],
        "prefix_lengths": [0, size // 2],
    }
    collate = Collator(size=2, pad=0, layout=implementation.layout)
    with _evaluation_mode(model), implementation.use_attention(base):
        shared, whole = (
            model(**on_device(collate.join(rows), model.device), target_loss=True).each
            for rows in ([row], without_shared_prefixes(row))
        )
    return bool(((shared - whole).abs() <= tolerance(base) * whole.abs()).all())


def _training_error(
    model: PeftModel, base: PreTrainedModel, implementation: LossImplementation, batch: dict[str, Any]
) -> Exception | None:
    """Return why an implementation that evaluates correctly cannot train: its kernel may lack dropout or backward."""
    if implementation.attention is not Attention.VARLEN:
        return None
    devices = [model.device] if model.device.type == "cuda" else []
    model.train()
    try:
        with torch.random.fork_rng(devices), torch.enable_grad(), implementation.use_attention(base):
            model(**batch, target_loss=True).summed.backward()
    except _UNSUPPORTED_ERRORS as error:
        return error
    finally:
        model.zero_grad()
        model.eval()
    return None


def _loss_alone(model: PeftModel, ids: list[int]) -> float:
    logits = model(input_ids=torch.tensor([ids], device=model.device)).logits
    # A method that puts its own tokens before the row has more logits.
    scores = logits[0, -len(ids) : -1].float()
    return float(functional.cross_entropy(scores, torch.tensor(ids[1:], device=scores.device), reduction="sum"))


@contextmanager
def _evaluation_mode(model: PeftModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), training_precision(model):
            yield
    finally:
        model.train(was_training)
