"""Trained weights: gather them from all ranks, and load those that a file has."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.tensor import distribute_tensor

from tunesmith_trainer.base_model import sharding

if TYPE_CHECKING:
    from pathlib import Path

    from tunesmith_trainer.process.ranks import Ranks


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the trained parameters by name, in the same order on every rank."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gather(model: torch.nn.Module, *, keep: bool) -> dict[str, torch.Tensor]:
    """Return the trained weights, whole and in main memory if `keep`; every rank must call it for sharded ones."""
    found = {
        name: sharding.full_tensor_of(parameter, keep=keep)
        for name, parameter in trained_parameters(model).items()
        if keep or sharding.is_sharded(parameter)
    }
    return found if keep else {}


def load(model: torch.nn.Module, file: Path) -> None:
    """Load the trained weights from a file that this rank has."""
    stored, parameters = load_file(file), trained_parameters(model)
    if set(stored) != set(parameters):
        difference = min(set(stored) ^ set(parameters))
        raise RuntimeError(f"the checkpoint and the model differ in the trainable parameter {difference}")
    with torch.no_grad():
        for name, tensor in stored.items():
            parameters[name].copy_(sharding.shard_like(tensor, parameters[name]))


def load_from_first(model: torch.nn.Module, file: Path, ranks: Ranks) -> None:
    """Load the trained weights on every rank from a file that only the first one has, one tensor after the other."""
    with safe_open(file, framework="pt") if ranks.first else nullcontext() as stored, torch.no_grad():
        for name, parameter in trained_parameters(model).items():
            sharded: Any = parameter
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            if stored is not None:
                whole.copy_(stored.get_tensor(name))
            if sharding.is_sharded(parameter):
                parameter.copy_(distribute_tensor(whole, sharded.device_mesh, sharded.placements))
            else:
                dist.broadcast(whole, src=0)
                parameter.copy_(whole)
