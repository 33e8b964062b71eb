"""Which way of computing the loss is the fastest that a model computes rightly: tried on two short rows."""

from __future__ import annotations

import logging
import math
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from tunesmith_trainer.data import IGNORED
from tunesmith_trainer.errors import SelfCheckError
from tunesmith_trainer.logits import products
from tunesmith_trainer.training.attention import by_segments
from tunesmith_trainer.training.batches import Collator, Layout
from tunesmith_trainer.training.loss import add_target_loss

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peft import PeftModel
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

_TOLERANCE = {torch.float32: 1e-4}
_TOLERANCE_ROUNDED = 2e-2
"""Relative, for types with fewer digits."""
_ROW_TOKENS = 12
_CANDIDATES = ((Layout.FLAT, False), (Layout.PADDED, False), (Layout.PADDED, True))
"""Layout, and whether the logits are whole; the fastest first."""


def attention_of(layout: Layout, base: PreTrainedModel) -> AbstractContextManager[None]:
    """The attention that a layout needs, within a `with` block."""
    return by_segments(base) if layout is Layout.FLAT else nullcontext()


def choose_layout(model: PeftModel, base: PreTrainedModel) -> Layout:
    """The fastest layout in which a row's loss is what the model's own forward pass gives it alone.

    Architectures whose layers mix neighbouring rows, and methods that put tokens before a row, are found out by trying.

    Args:
        model: base with adapter.
        base: the model inside, which gets `target_loss` (see `add_target_loss`).

    Raises:
        SelfCheckError: no way gives the row's loss.
    """
    tokens = torch.arange(3, 3 + 2 * _ROW_TOKENS) * 7 % base.config.get_text_config().vocab_size
    before = {"input_ids": tokens[: 2 * _ROW_TOKENS - 5].tolist(), "labels": [IGNORED] * (2 * _ROW_TOKENS - 5)}
    ids = tokens[:_ROW_TOKENS].tolist()
    row = {"input_ids": ids, "labels": [IGNORED, *ids[1:]]}
    tolerance = _TOLERANCE.get(next(iter(base.parameters())).dtype, _TOLERANCE_ROUNDED)
    reasons = []
    with _evaluating(model):
        expected = _alone(model, ids)
        if not math.isfinite(expected):
            return Layout.FLAT  # nothing to compare with; the held-out loss tells it
        for layout, whole_logits in _CANDIDATES:
            add_target_loss(base, whole_logits=whole_logits)
            batch = _to(Collator(size=2, pad=0, layout=layout).join([before, row]), model.device)
            try:
                with attention_of(layout, base):
                    loss = float(model(**batch, target_loss=True).summed)
            except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
                reasons.append(f"{layout}: {error}")
                continue
            if abs(loss - expected) <= tolerance * abs(expected):
                log.info("rows lie %s, logits are %s; %s", layout, "whole" if whole_logits else "chunked", reasons)
                return layout
            reasons.append(f"{layout}: {loss:.6f} instead of {expected:.6f}")
    raise SelfCheckError(
        f"the loss of a row depends on the rows beside it in a {type(base).__name__} ({'; '.join(reasons)}): this base "
        "model cannot be trained in batches"
    )


def _alone(model: PeftModel, ids: list[int]) -> float:
    logits = model(input_ids=torch.tensor([ids], device=model.device)).logits
    # A method that puts tokens of its own before the row has more logits.
    scores = logits[0, -len(ids) : -1].float()
    return float(functional.cross_entropy(scores, torch.tensor(ids[1:], device=scores.device), reduction="sum"))


def _to(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


@contextmanager
def _evaluating(model: PeftModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), products(model):
            yield
    finally:
        model.train(was_training)
