"""Attention over sequences that stand one after the other in one row, each seeing itself alone."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn
    from transformers import PreTrainedModel

_NAME = "tunesmith_segments"


def segment_attention(
    module: nn.Module,  # noqa: ARG001 - the signature that transformers calls
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sequence: the work grows with the sequences' own lengths.

    Args:
        module: the attention layer.
        query: (1, heads, tokens, width).
        key: (1, key heads, tokens, width).
        value: as key.
        attention_mask: must be absent: sequences are told apart by `cu_seq_lens_q`.
        dropout: probability.
        scaling: factor of the scores; absent: 1 / √width.
        cu_seq_lens_q: bounds of the sequences, from 0 to tokens; absent: one sequence.
        sliding_window: tokens that a token sees, itself included.
        softcap: not supported.
        kwargs: for other implementations.

    Raises:
        NotImplementedError: for what it would compute wrongly.
    """
    odd = attention_mask is not None or softcap is not None or kwargs.get("s_aux") is not None
    if odd or len(query) != 1 or query.shape[2] != key.shape[2]:
        raise NotImplementedError("attention by segments takes no mask, soft cap, sink, batch or cache")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    bounds = [0, query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    parts = []
    for start, end in itertools.pairwise(bounds):
        mask = None
        if sliding_window is not None and end - start > sliding_window:
            places = torch.arange(end - start, device=query.device)
            distance = places[:, None] - places[None]
            mask = (distance >= 0) & (distance < sliding_window)
        parts.append(
            functional.scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, start:end],
                value[:, :, start:end],
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
            )
        )
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, segment_attention)


@contextmanager
def by_segments(model: PreTrainedModel) -> Iterator[None]:
    """The model attends by segments within, as before after: generation with a cache needs its own attention."""
    before = model.config._attn_implementation  # noqa: SLF001 - there is a public setter and no public getter
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
