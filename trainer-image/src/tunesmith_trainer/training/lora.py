"""LoRA layers as one operation: the low-rank product is added in place, and only its factors are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes import matmul_4bit
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from peft import PeftModel


class _LowRankLinear(torch.autograd.Function):
    """Compute x Wᵀ + bias + scale · (x Aᵀ) Bᵀ, with gradients for x, A and B; all in one type, or W in 4 bits.

    Inputs and outputs have two dimensions: some models change outputs in place, which a view would not allow.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        state: QuantState | None,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        low = rows @ down.T
        if state is not None:
            outputs = matmul_4bit(rows, weight, bias=bias, quant_state=state)
        else:
            outputs = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
        outputs.addmm_(low, up.T, alpha=scale)
        ctx.save_for_backward(rows, low, weight, down, up)
        ctx.state, ctx.scale = state, scale
        return outputs

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | float | None, ...]:
        rows, low, weight, down, up = ctx.saved_tensors
        (outputs,) = outer
        low_gradient = outputs @ up
        inputs = None
        if ctx.needs_input_grad[0]:
            if ctx.state is not None:
                weight = dequantize_4bit(weight, ctx.state).to(outputs.dtype)
            inputs = (outputs @ weight).addmm_(low_gradient, down, alpha=ctx.scale)
        # Apply the scale to the small factor.
        return inputs, None, None, None, (low_gradient * ctx.scale).T @ rows, outputs.T @ (low * ctx.scale), None


class _FusedLinear(LoraLinear):
    """PEFT's layer over a base in 16 or 32 bits, as one operation."""

    # Compiled, the addition in place would become a copy.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base = self.get_base_layer()
        dtype = _product_type(x)
        if args or kwargs or base.weight.dtype != dtype or not _can_fuse(self, dtype):
            plain: torch.Tensor = super().forward(x, *args, **kwargs)
            return plain
        return _apply(self, x.to(dtype), base.weight, None)


class _FusedLinear4bit(LoraLinear4bit):
    """PEFT's layer over a base in 4 bits, as one operation."""

    # Compiled, the addition in place would become a copy.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base = self.get_base_layer()
        fix_4bit_weight_quant_state_from_module(base)
        dtype, state = _product_type(x), base.weight.quant_state
        if args or kwargs or base.compute_dtype != dtype or not _can_fuse(self, dtype):
            plain: torch.Tensor = super().forward(x, *args, **kwargs)
            return plain
        return _apply(self, x.to(dtype), base.weight, state).to(x.dtype)


def fuse(model: PeftModel) -> int:
    """Make plain LoRA layers compute in one operation, and return their number.

    A layer with dropout, DoRA or another variant stays PEFT's; PEFT's computation is also used while a layer's adapter
    is disabled, or while products are in another type than the base's.
    """
    layers = [module for module in model.modules() if _plain(module)]
    for layer in layers:
        layer.__class__ = _FusedLinear if type(layer) is LoraLinear else _FusedLinear4bit
    return len(layers)


def _plain(layer: nn.Module) -> bool:
    if type(layer) not in (LoraLinear, LoraLinear4bit):
        return False
    base, names = layer.get_base_layer(), layer.active_adapters
    if type(base) not in (nn.Linear, Linear4bit) or len(names) != 1 or names[0] not in layer.lora_A:
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
    )


def _product_type(inputs: torch.Tensor) -> torch.dtype:
    kind = inputs.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else inputs.dtype


def _can_fuse(layer: LoraLinear | LoraLinear4bit, dtype: torch.dtype) -> bool:
    """Return True if a layer's adapter is enabled and computes in this type without casts."""
    if layer.disable_adapters or layer.merged:
        return False
    down: torch.Tensor = layer.lora_A[layer.active_adapters[0]].weight
    same_dtype: bool = down.dtype == dtype
    return same_dtype or torch.is_autocast_enabled(down.device.type)


def _apply(
    layer: LoraLinear | LoraLinear4bit, inputs: torch.Tensor, weight: torch.Tensor, state: QuantState | None
) -> torch.Tensor:
    base, (name,) = layer.get_base_layer(), layer.active_adapters
    dtype = inputs.dtype
    fused: torch.Tensor = _LowRankLinear.apply(
        inputs.reshape(-1, inputs.shape[-1]),
        weight,
        state,
        None if base.bias is None else base.bias.to(dtype),
        layer.lora_A[name].weight.to(dtype),
        layer.lora_B[name].weight.to(dtype),
        layer.scaling[name],
    )
    return fused.view(*inputs.shape[:-1], fused.shape[-1])
