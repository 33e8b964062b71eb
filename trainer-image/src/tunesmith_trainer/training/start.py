"""Detect a run whose trained weights are those of the start."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tunesmith_trainer.base_model import sharding

if TYPE_CHECKING:
    from tunesmith_trainer.process.ranks import Ranks

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class StartingWeights:
    """Checksums of the trained weights before the first step: a copy of all weights would need too much memory.

    Args:
        model: base with adapter, before a checkpoint is restored.
        ranks: ranks that train together.
    """

    def __init__(self, model: torch.nn.Module, ranks: Ranks) -> None:
        self._model = model
        self._ranks = ranks
        self._checksums = self._current()

    def unchanged(self) -> bool:
        """Return True if no trained weight differs from its start; every rank must call it."""
        return not self._ranks.any(self._current() != self._checksums)[0]

    def _current(self) -> dict[str, int]:
        # Before the first step, only the first rank has the starting values of weights that are not sharded.
        return {
            name: _checksum(sharding.local_shard(parameter.detach()))
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad and (self._ranks.first or sharding.is_sharded(parameter))
        }


def _checksum(tensor: torch.Tensor) -> int:
    """Return the sum of the values' bits as integers."""
    return int(tensor.contiguous().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64))
