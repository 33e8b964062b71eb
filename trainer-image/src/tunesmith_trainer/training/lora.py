"""LoRA layers as one operation: the low-rank product is added in place, and nothing but its factors is kept."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

if TYPE_CHECKING:
    from peft import PeftModel


class _LowRankLinear(torch.autograd.Function):
    """x Wᵀ + bias + scale · (x Aᵀ) Bᵀ, with gradients for x, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        rows = inputs.reshape(-1, inputs.shape[-1])
        low = rows @ down.T
        outputs = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
        outputs.addmm_(low, up.T, alpha=scale)
        ctx.save_for_backward(rows, low, weight, down, up)
        ctx.scale = scale
        return outputs.view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | float | None, ...]:
        rows, low, weight, down, up = ctx.saved_tensors
        outputs = outer[0].reshape(-1, outer[0].shape[-1])
        low_gradient = outputs @ up
        inputs = None
        if ctx.needs_input_grad[0]:
            inputs = (outputs @ weight).addmm_(low_gradient, down, alpha=ctx.scale).view(*outer[0].shape[:-1], -1)
        # The scale multiplies the small factor.
        return inputs, None, None, (low_gradient * ctx.scale).T @ rows, outputs.T @ (low * ctx.scale), None


def fuse(model: PeftModel) -> int:
    """Makes plain LoRA layers in float32 compute in one operation; their number.

    A layer with dropout, DoRA or another variant, over a base in 4 bits or in another type, stays as PEFT has it; so
    does every layer while its adapter is off or autocast is on.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLinear) and _plain(module)]
    for layer in layers:
        layer.forward = types.MethodType(_forward, layer)
    return len(layers)


def _plain(layer: LoraLinear) -> bool:
    base, names = layer.get_base_layer(), layer.active_adapters
    if type(base) is not nn.Linear or len(names) != 1 or names[0] not in layer.lora_A:
        return False
    name = names[0]
    down, up = layer.lora_A[name], layer.lora_B[name]
    return (
        name not in layer.lora_variant
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and type(down) is type(up) is nn.Linear
        and down.bias is None
        and up.bias is None
        and not base.weight.requires_grad
        and {base.weight.dtype, down.weight.dtype, up.weight.dtype} == {torch.float32}
    )


def _forward(self: LoraLinear, inputs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    odd = args or kwargs or self.disable_adapters or self.merged or inputs.dtype is not torch.float32
    if odd or torch.is_autocast_enabled(inputs.device.type):
        plain: torch.Tensor = type(self).forward(self, inputs, *args, **kwargs)
        return plain
    base, (name,) = self.get_base_layer(), self.active_adapters
    fused: torch.Tensor = _LowRankLinear.apply(
        inputs, base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
    )
    return fused
