"""Noise on the embeddings during training (NEFTune, arXiv:2310.05914)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn


class EmbeddingNoise:
    """Adds uniform noise of ± alpha / √(tokens · width) to the embeddings of each row, in training mode only.

    transformers' own hook counts the tokens of the whole tensor, including padding and other rows; here only those of
    the row are counted, as in the paper.

    Args:
        embedding: embedding layer.
        alpha: scale of the noise.
    """

    def __init__(self, embedding: nn.Module, alpha: float) -> None:
        self._alpha = alpha
        self._tokens: torch.Tensor | None = None
        embedding.register_forward_hook(self._add)

    def expect(self, batch: dict[str, Any]) -> None:
        """Announce the next micro-batch."""
        ids = batch["input_ids"]
        if "cu_seq_lens_q" in batch:
            sizes = batch["cu_seq_lens_q"].diff()
            # The tokens that a sequence shares with another one are among its own.
            self._tokens = batch["cu_seq_lens_k"].diff().repeat_interleave(sizes)[None]
        elif "attention_mask" in batch:
            self._tokens = batch["attention_mask"].sum(dim=1, keepdim=True).expand_as(ids)
        else:
            self._tokens = torch.full_like(ids, ids.shape[1])

    def _add(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        tokens = self._tokens
        if not module.training or tokens is None or output.shape[:2] != tokens.shape:
            return output
        size = self._alpha / (tokens * output.shape[-1]).sqrt()
        return output + torch.empty_like(output).uniform_(-1, 1) * size[..., None].to(output)
