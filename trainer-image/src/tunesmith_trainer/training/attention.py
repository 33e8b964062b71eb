"""Attention over concatenated sequences, each of which attends only to itself."""

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
"""Minimum compute capability for PyTorch's FlashAttention: Ampere."""
_KERNEL_WIDTH = 256
"""Maximum head width that it supports."""


class Attention(StrEnum):
    """Attention implementation for a row's sequences, by its name in transformers."""

    VARLEN = "tunesmith_varlen"
    """One FlashAttention call for all sequences; on GPUs, in 16 bits."""
    SEGMENTS = "tunesmith_segments"
    """One call per sequence, of the kernel that PyTorch considers best; on any device."""


def has_varlen_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Return True if a device supports `Attention.VARLEN` with products of a type."""
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
    shared_prefixes: Sequence[tuple[int, int]] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute causal attention within each sequence: the work grows with the sequences' own lengths.

    Args:
        module: the attention layer.
        query: (1, heads, tokens, width).
        key: (1, key heads, tokens, width).
        value: same shape as key.
        attention_mask: must be None: sequences are separated by their bounds.
        dropout: dropout probability.
        scaling: factor of the scores; None: 1 / √width.
        cu_seq_lens_q: bounds of the sequences, from 0 to tokens; None: one sequence.
        sequence_bounds: the same bounds on the host, if known: reading them from a GPU would synchronise at every
            layer.
        sliding_window: tokens that a token attends to, itself included.
        shared_prefixes: start and end of the tokens that precede each sequence, in an earlier one; None: nothing does.
        kwargs: arguments of other implementations: some are refused, the others do not apply.

    Raises:
        NotImplementedError: the arguments are not supported and the result would be wrong.
    """
    _check_arguments(query, key, attention_mask, kwargs)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    bounds = sequence_bounds
    if bounds is None:
        bounds = [0, query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    parts = []
    for number, (start, end) in enumerate(itertools.pairwise(bounds)):
        first, last = (start, start) if shared_prefixes is None else shared_prefixes[number]
        prefix = last - first
        tokens = prefix + end - start
        mask = None
        if prefix or (sliding_window is not None and tokens > sliding_window):
            positions = torch.arange(tokens, device=query.device)
            distance = positions[prefix:, None] - positions[None]
            mask = (distance >= 0) & (distance < (tokens if sliding_window is None else sliding_window))
        keys, values = key[:, :, start:end], value[:, :, start:end]
        if prefix:
            keys = torch.cat([key[:, :, first:last], keys], dim=2)
            values = torch.cat([value[:, :, first:last], values], dim=2)
        parts.append(
            functional.scaled_dot_product_attention(
                query[:, :, start:end],
                keys,
                values,
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
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_k: int | None = None,
    sequence_bounds: Sequence[int] | None = None,
    sliding_window: int | None = None,
    shared_prefixes: Sequence[tuple[int, int]] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute the same as `segment_attention` in one call of PyTorch's FlashAttention for sequences of any length.

    Args:
        module: the attention layer.
        query: (1, heads, tokens, width).
        key: (1, key heads, tokens, width).
        value: same shape as key.
        attention_mask: must be None.
        dropout: must be 0: the kernel has none.
        scaling: factor of the scores; None: 1 / √width.
        cu_seq_lens_q: bounds of the sequences, int32, on the device; None: one sequence.
        max_length_q: tokens of the longest sequence; None: all tokens.
        cu_seq_lens_k: bounds of the sequences with their shared prefixes.
        max_length_k: tokens of the longest of these.
        sequence_bounds: the bounds of the sequences on the host, which shared prefixes need.
        sliding_window: tokens that a token attends to, itself included.
        shared_prefixes: start and end of the tokens that precede each sequence, in an earlier one; None: nothing does.
        kwargs: arguments of other implementations: some are refused, the others do not apply.

    Raises:
        NotImplementedError: the arguments are not supported and the result would be wrong.
    """
    _check_arguments(query, key, attention_mask, kwargs)
    if dropout or query.shape[-1] > _KERNEL_WIDTH or query.shape[-1] != value.shape[-1]:
        raise NotImplementedError(f"the kernel supports no dropout, and only heads of one width up to {_KERNEL_WIDTH}")
    kind = query.device.type
    # Rotary positions may leave query and key in float32. Autocast would round them for PyTorch's own products, but not
    # for this kernel.
    has_autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if has_autocast else query.dtype
    rows = [part[0].transpose(0, 1).to(dtype) for part in (query, key, value)]
    tokens = query.shape[2]
    bounds = cu_seq_lens_q
    if bounds is None:
        bounds = torch.tensor([0, tokens], dtype=torch.int32, device=query.device)
    longest = tokens if cu_seq_lens_q is None or max_length_q is None else max_length_q
    key_bounds, longest_key = bounds, longest
    if shared_prefixes is not None:
        assert sequence_bounds is not None  # noqa: S101 - a batch has all of these
        assert cu_seq_lens_k is not None  # noqa: S101
        assert max_length_k is not None  # noqa: S101
        own = itertools.pairwise(sequence_bounds)
        spans = [span for pair in zip(shared_prefixes, own, strict=True) for span in pair]
        rows[1:] = [torch.cat([part[start:end] for start, end in spans]) for part in rows[1:]]
        key_bounds, longest_key = cu_seq_lens_k, max_length_k
    attended = varlen_attn(
        *rows,
        bounds,
        key_bounds,
        longest,
        longest_key,
        scale=scaling,
        # Tokens to the left of the token, and to its right; -1: all.
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended[None].to(query.dtype), None


def _check_arguments(
    query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None, kwargs: dict[str, Any]
) -> None:
    unsupported = attention_mask is not None or kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None
    if unsupported or len(query) != 1 or query.shape[2] != key.shape[2]:
        raise NotImplementedError("attention within segments supports no mask, soft cap, sink, batch or cache")


AttentionInterface.register(Attention.SEGMENTS, segment_attention)
AttentionInterface.register(Attention.VARLEN, varlen_attention)


@contextmanager
def use_attention(model: PreTrainedModel, attention: Attention) -> Iterator[None]:
    """Make the model use this attention within the block: generation with a cache needs the model's own."""
    before = model.config._attn_implementation  # noqa: SLF001 - there is a public setter and no public getter
    model.set_attn_implementation(attention)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
