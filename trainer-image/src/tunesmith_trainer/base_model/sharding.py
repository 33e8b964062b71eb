"""FSDP2: each rank keeps a shard of every weight of the base model and gathers a layer while it is computed.

An adapter is small, so every rank holds all of it, and its gradients are averaged once per step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tunesmith_trainer.base_model.layers import layers_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedModel

    from tunesmith_trainer.process.ranks import Ranks


def shard(base: PreTrainedModel, device: torch.device, ranks: Ranks, *, full: bool) -> int:
    """Shard the base model's weights layer by layer and return the bytes that this rank keeps.

    No device ever holds more than its own shards and one gathered layer.

    Args:
        base: model in main memory, with or without an adapter; weights waiting to be quantised are quantised on the
            device.
        device: device of this rank.
        ranks: ranks that train together, already connected.
        full: True if all weights are trained, in float32; otherwise trained weights are not sharded.
    """
    mesh = init_device_mesh(device.type, (ranks.size,))
    whole = set() if full else {parameter for parameter in base.parameters() if parameter.requires_grad}
    for layer in layers_of(base):
        layer.to(device)
        if full:
            _to_float32(layer)
        fully_shard(layer, mesh=mesh, ignored_params=whole & set(layer.parameters()))
    if full:
        _to_float32(base)
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    fully_shard(base, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    # Otherwise a Trainer would wrap it in DistributedDataParallel, and generation would not stay in step.
    base._is_distributed_loading_by_transformers = True  # noqa: SLF001 - there is no public setting for it
    base._is_fsdp_managed_module = True  # noqa: SLF001
    parts: list[Any] = [parameter.to_local() for parameter in base.parameters() if is_sharded(parameter)]
    return sum(part.numel() * part.element_size() for part in parts)


def broadcast_from_first(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Give unsharded parameters the first rank's values on every rank."""
    for parameter in _replicated(parameters):
        dist.broadcast(parameter.data, src=0)


def average_gradients(parameters: Iterable[torch.nn.Parameter], ranks: Ranks) -> None:
    """Replace the gradients of unsharded parameters by their means over the ranks."""
    replicated = _replicated(parameters)
    if not replicated:
        return
    gradients = [
        parameter.grad if parameter.grad is not None else torch.zeros_like(parameter) for parameter in replicated
    ]
    together = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(together)
    together /= ranks.size
    parts = together.split([gradient.numel() for gradient in gradients])
    for parameter, part in zip(replicated, parts, strict=True):
        parameter.grad = part.view_as(parameter)


def _replicated(parameters: Iterable[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad and not is_sharded(parameter)]


def gather(base: PreTrainedModel, *, keep: bool) -> None:
    """Undo sharding: what was trained becomes whole in main memory if `keep`; everything else is freed.

    Every rank must call it. The model can then be saved, but no longer computes anything.
    """
    whole: dict[int, torch.nn.Parameter] = {}  # shared weights stay shared
    for module in base.modules():
        for name, parameter in module._parameters.items():  # noqa: SLF001 - set_parameter would count a tied one twice
            if not is_sharded(parameter):
                continue
            if id(parameter) not in whole:
                value = full_tensor_of(parameter, keep=keep) if parameter.requires_grad else torch.empty(0)
                whole[id(parameter)] = torch.nn.Parameter(value, requires_grad=parameter.requires_grad)
            module._parameters[name] = whole[id(parameter)]  # noqa: SLF001
    base._is_distributed_loading_by_transformers = False  # noqa: SLF001
    base._is_fsdp_managed_module = False  # noqa: SLF001


def full_tensor_of(tensor: torch.Tensor, *, keep: bool) -> torch.Tensor:
    """Return the whole of a tensor in main memory if `keep`, otherwise nothing; every rank must call it."""
    whole: Any = tensor.full_tensor() if is_sharded(tensor) else tensor
    result: torch.Tensor = whole.detach().contiguous().cpu() if keep else torch.empty(0)
    return result


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of a tensor, or all of it if it is not sharded."""
    part: Any = tensor.to_local() if is_sharded(tensor) else tensor
    result: torch.Tensor = part
    return result


def is_sharded(value: object) -> bool:
    """Return True if each rank has a shard of it."""
    return isinstance(value, DTensor)


def use_full_optimizer_states(optimizer: torch.optim.Optimizer, *, keep: bool) -> None:
    """Make `state_dict()`, which every rank must call, return whole states, and `load_state_dict()` accept them.

    A checkpoint is the same whether or not weights are sharded. Unless `keep`, `state_dict()` has no states: the main
    memory of a node has no room for one copy per rank.
    """

    def to_full(_: torch.optim.Optimizer, document: dict[str, Any]) -> dict[str, Any]:
        full_states = {
            number: {
                name: full_tensor_of(value, keep=keep) if is_sharded(value) else value for name, value in state.items()
            }
            for number, state in document["state"].items()
        }
        return {**document, "state": full_states if keep else {}}

    def to_shards(own: torch.optim.Optimizer, document: dict[str, Any]) -> dict[str, Any]:
        parameters = [parameter for group in own.param_groups for parameter in group["params"]]
        states = {
            number: {
                name: shard_like(value, parameters[number]) if _has_shape_of(value, parameters[number]) else value
                for name, value in state.items()
            }
            for number, state in document["state"].items()
        }
        return {**document, "state": states}

    optimizer.register_state_dict_post_hook(to_full)
    optimizer.register_load_state_dict_pre_hook(to_shards)


def _has_shape_of(value: object, parameter: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == parameter.shape


def shard_like(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of a whole tensor, sharded like another one."""
    if not is_sharded(like):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _to_float32(module: torch.nn.Module) -> None:
    """Convert weights to float32: in bfloat16 small updates would be lost."""
    for parameter in module.parameters():
        if not is_sharded(parameter):
            parameter.data = parameter.data.float()
