"""LoRA layers as one operation: the same results as PEFT's own, in every type, and only for plain layers."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from tunesmith_trainer.training.lora import fuse

WIDTH, OUT, TOKENS = 64, 96, 40
BITS16, BITS32 = torch.bfloat16, torch.float32


def adapted(dtype: torch.dtype, *, four_bits: bool, bias: bool = True, **settings: Any) -> PeftModel:
    """Return one linear layer in a type, or in 4 bits that compute in it, with an active adapter in float32."""
    torch.manual_seed(0)
    layer: nn.Module = nn.Linear(WIDTH, OUT, bias=bias, dtype=dtype)
    if four_bits:
        packed = Linear4bit(WIDTH, OUT, bias=bias, compute_dtype=dtype, quant_type="nf4")
        packed.load_state_dict(layer.state_dict())
        layer = packed.to("cpu")
    model = nn.Sequential(layer)
    model.is_loaded_in_4bit = four_bits
    model.requires_grad_(requires_grad=False)
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, **settings)
    return get_peft_model(model, config)


def results(model: PeftModel, stored: torch.dtype, products: AbstractContextManager[Any]) -> list[torch.Tensor]:
    """Return the output, and the gradients of the input, of A and of B."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(1, TOKENS, WIDTH, generator=generator).to(stored).requires_grad_()
    weight = torch.randn(1, TOKENS, OUT, generator=generator)
    with products:
        output = model(inputs)
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [output, *torch.autograd.grad((output.float() * weight).sum(), [inputs, *factors])]


@pytest.mark.parametrize("four_bits", [False, True], ids=["linear", "4 bits"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("base", "inputs", "autocast"),
    [(BITS32, BITS32, False), (BITS16, BITS16, True), (BITS16, BITS32, True), (BITS16, BITS16, False)],
    ids=["float32", "autocast", "autocast of float32", "bfloat16 with an adapter in float32"],
)
def test_a_fused_layer_computes_the_same_as_pefts(
    base: torch.dtype, inputs: torch.dtype, *, autocast: bool, bias: bool, four_bits: bool
) -> None:
    def products() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", BITS16) if autocast else nullcontext()

    model = adapted(base, four_bits=four_bits, bias=bias)
    expected = results(model, inputs, products())
    fused = copy.deepcopy(model)
    assert fuse(fused) == 1
    found = results(fused, inputs, products())
    assert len(found) == 4
    tolerance = 1e-5 if base is BITS32 else 1.5e-2
    for one, other in zip(found, expected, strict=True):
        assert one.dtype is other.dtype
        assert float((one - other).detach().norm()) <= tolerance * float(other.detach().norm())


@pytest.mark.parametrize("four_bits", [False, True], ids=["linear", "4 bits"])
def test_only_input_and_factors_are_kept_for_the_backward_pass(*, four_bits: bool) -> None:
    def kept(model: PeftModel) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, nn.Parameter):
                sizes.setdefault(tensor.data_ptr(), tensor.nbytes)
            return tensor

        inputs = torch.randn(TOKENS, WIDTH, dtype=BITS16, requires_grad=True)
        sizes[inputs.data_ptr()] = 0
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", BITS16):
            model(inputs).sum()
        return sum(sizes.values())

    model = adapted(BITS16, four_bits=four_bits)
    before = kept(model)
    fuse(model)
    factors = 2 * 4 * (WIDTH + OUT + TOKENS)
    assert kept(model) <= factors < before


def test_a_layer_accepts_an_empty_input() -> None:
    """A head gets no positions if a rank's micro-batch has no target."""
    model = adapted(BITS32, four_bits=False)
    fuse(model)
    inputs = torch.zeros(0, WIDTH, requires_grad=True)
    output = model(inputs)
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(output.sum(), [inputs, *factors])
    assert output.shape == (0, OUT)
    assert gradients[0].shape == inputs.shape
    assert all(int(gradient.count_nonzero()) == 0 for gradient in gradients)


@pytest.mark.parametrize("four_bits", [False, True], ids=["linear", "4 bits"])
@pytest.mark.parametrize("settings", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_other_layers_are_not_changed(settings: dict[str, Any], *, four_bits: bool) -> None:
    model = adapted(BITS32, four_bits=four_bits, **settings)
    before = [type(module) for module in model.modules()]
    assert fuse(model) == 0
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize("four_bits", [False, True], ids=["linear", "4 bits"])
def test_a_disabled_adapter_adds_nothing(*, four_bits: bool) -> None:
    model = adapted(BITS32, four_bits=four_bits)
    inputs = torch.ones(1, 2, WIDTH)
    fuse(model)
    with model.disable_adapter():
        off = model(inputs)
    torch.testing.assert_close(off, model.base_model.model[0].base_layer(inputs))
    assert not torch.allclose(model(inputs), off)
