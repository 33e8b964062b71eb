"""Adapters on a base model whose layers are partly on disk and read whenever they are computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, remove_hook_from_module
from peft import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

from tunesmith_trainer.base_model.layers import layers_of

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from peft import PeftModel
    from torch import nn


def is_offloaded(model: nn.Module) -> bool:
    """Return True if some weights are not in memory."""
    return any(parameter.device.type == "meta" for parameter in model.parameters())


def read_by_layer(model: PeftModel) -> None:
    """Read the weights of a layer before it is computed, and release them after it.

    Accelerate reads each module's weights for that module alone. An adapter may need the weights of the module that it
    wraps, which accelerate treats as another module.

    Args:
        model: base with adapter, with accelerate's hooks.
    """
    layers = layers_of(model.get_base_model())
    # Modules outside of the layers, such as the output embedding.
    adapted = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for block in (*layers, *adapted):
        hooks = [(module, hook) for module in block.modules() for hook in _reading_hooks(module)]
        for module, _ in hooks:
            remove_hook_from_module(module)
        if hooks:
            _attach(block, hooks)


def _attach(block: nn.Module, hooks: Iterable[tuple[nn.Module, AlignDevicesHook]]) -> None:
    def read(*_: Any) -> None:  # noqa: ANN401 - whatever torch passes
        for module, hook in hooks:
            hook.pre_forward(module)

    def release(*_: Any) -> None:  # noqa: ANN401 - whatever torch passes
        for module, hook in hooks:
            hook.post_forward(module, None)

    block.register_forward_pre_hook(read)
    block.register_forward_hook(release)


def _reading_hooks(module: nn.Module) -> list[AlignDevicesHook]:
    """Return the hooks of a module that read its weights."""
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return [hook for hook in hooks if isinstance(hook, AlignDevicesHook) and hook.offload]


def hold_adapter(model: PeftModel, weights: Path, rounded: torch.dtype | None) -> None:
    """Load the saved adapter into memory: PEFT offloads the adapter of a layer that is on disk.

    Args:
        model: base with adapter.
        weights: file of the saved adapter.
        rounded: type to round its values to; None: keep the saved type.
    """
    parameters = dict(model.named_parameters())
    names = {id(tensor): name for name, tensor in parameters.items()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    saved = {name: tensor.to(rounded) for name, tensor in load_file(weights).items()}
    # PEFT saves under other names; given the parameters themselves, it returns the mapping.
    named = get_peft_model_state_dict(model, state_dict=parameters, save_embedding_layers=False)
    found = {
        names[id(tensor)]: saved[name].to(device if tensor.device.type == "meta" else tensor.device, tensor.dtype)
        for name, tensor in named.items()
        if id(tensor) in names and name in saved
    }
    model.load_state_dict(found, strict=False, assign=True)
