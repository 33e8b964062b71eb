"""Attention over sequences that stand one after the other in one row, each seeing itself alone."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn
    from transformers import PreTrainedModel

_KERNEL_TYPES = (torch.bfloat16, torch.float16)
_KERNEL_CAPABILITY = (8, 0)
"""Compute capability that PyTorch's FlashAttention needs: Ampere."""
_KERNEL_WIDTH = 256
"""Widest head that it computes."""


class Attention(StrEnum):
    """How a row's sequences attend, by the name under which transformers knows it."""

    VARLEN = "tunesmith_varlen"
    """One FlashAttention call for all sequences; on GPUs, in 16 bits."""
    SEGMENTS = "tunesmith_segments"
    """One call per sequence, of the kernel that PyTorch finds best; anywhere."""


def has_varlen_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device computes `Attention.VARLEN` with products of a type."""
    if device.type != "cuda" or dtype not in _KERNEL_TYPES:
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= _KERNEL_CAPABILITY


def segment_attention(
    module: nn.Module,  # noqa: ARG001 - the signature that transformers calls
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    sequence_bounds: Sequence[int] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sequence: the work grows with the sequences' own lengths.

    Args:
        module: the attention layer.
        query: (1, heads, tokens, width).
        key: (1, key heads, tokens, width).
        value: as key.
        attention_mask: must be absent: sequences are told apart by their bounds.
        dropout: probability.
        scaling: factor of the scores; absent: 1 / √width.
        cu_seq_lens_q: bounds of the sequences, from 0 to tokens; absent: one sequence.
        sequence_bounds: the same where the host knows them: reading a GPU's would wait for it at every layer.
        sliding_window: tokens that a token sees, itself included.
        kwargs: for other implementations.

    Raises:
        NotImplementedError: for what it would compute wrongly.
    """
    _refuse_others(query, key, attention_mask, kwargs)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    bounds = sequence_bounds
    if bounds is None:
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


def varlen_attention(
    module: nn.Module,  # noqa: ARG001 - the signature that transformers calls
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What `segment_attention` computes, in one call of PyTorch's FlashAttention for sequences of any length.

    Args:
        module: as there; so are the others.
        query: (1, heads, tokens, width).
        key: (1, key heads, tokens, width).
        value: as key.
        attention_mask: must be absent.
        dropout: must be 0: the kernel has none.
        scaling: factor of the scores; absent: 1 / √width.
        cu_seq_lens_q: bounds of the sequences, int32, on the device; absent: one sequence.
        max_length_q: tokens of the longest sequence; absent: all tokens.
        sliding_window: tokens that a token sees, itself included.
        kwargs: for other implementations.

    Raises:
        NotImplementedError: for what it would compute wrongly.
    """
    _refuse_others(query, key, attention_mask, kwargs)
    if dropout or query.shape[-1] > _KERNEL_WIDTH or query.shape[-1] != value.shape[-1]:
        raise NotImplementedError("the kernel has no dropout, and heads of one width up to 256")
    kind = query.device.type
    # Layers that compute positions in float32 leave them so; under autocast a product would round them.
    rounded = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if rounded else query.dtype
    rows = [part[0].transpose(0, 1).to(dtype) for part in (query, key, value)]
    tokens = query.shape[2]
    bounds = cu_seq_lens_q
    if bounds is None:
        bounds = torch.tensor([0, tokens], dtype=torch.int32, device=query.device)
    longest = tokens if cu_seq_lens_q is None or max_length_q is None else max_length_q
    attended = varlen_attn(
        *rows,
        bounds,
        bounds,
        longest,
        longest,
        scale=scaling,
        # Tokens to the left of one's own, and to the right; -1: all.
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended[None].to(query.dtype), None


def _refuse_others(
    query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None, kwargs: dict[str, Any]
) -> None:
    odd = attention_mask is not None or kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None
    if odd or len(query) != 1 or query.shape[2] != key.shape[2]:
        raise NotImplementedError("attention by segments takes no mask, soft cap, sink, batch or cache")


AttentionInterface.register(Attention.SEGMENTS, segment_attention)
AttentionInterface.register(Attention.VARLEN, varlen_attention)


@contextmanager
def attending(model: PreTrainedModel, attention: Attention) -> Iterator[None]:
    """The model attends so within, as before after: generation with a cache needs its own attention."""
    before = model.config._attn_implementation  # noqa: SLF001 - there is a public setter and no public getter
    model.set_attn_implementation(attention)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
