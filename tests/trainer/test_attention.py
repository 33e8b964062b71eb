"""Attention by segments, and by the kernel for sequences of any length: results of each."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.trainer.tiny_model import SMALL
from tunesmith_trainer.training import layout
from tunesmith_trainer.training.attention import Attention, has_varlen_kernel, segment_attention, varlen_attention
from tunesmith_trainer.training.batches import Layout
from tunesmith_trainer.training.layout import LossImplementation, choose_loss_implementation, loss_implementations
from tunesmith_trainer.training.loss import add_target_loss

HEADS, KEY_HEADS, WIDTH = 4, 2, 16
SIZES = [5, 1, 9, 3]
BOUNDS = [0, *itertools.accumulate(SIZES)]


def visible(bounds: torch.Tensor, key_bounds: torch.Tensor, window: list[int]) -> torch.Tensor:
    """Return (tokens, keys): the keys visible to each token according to the kernel's documentation.

    A sequence with more keys than tokens has those of earlier tokens first.
    """
    places, keys = torch.arange(int(bounds[-1])), torch.arange(int(key_bounds[-1]))
    sequence, of_key = (
        torch.bucketize(positions, ends[1:], right=True) for positions, ends in ((places, bounds), (keys, key_bounds))
    )
    distance = (places - bounds[1:][sequence])[:, None] - (keys - key_bounds[1:][of_key])[None]
    left, right = window
    seen = sequence[:, None] == of_key[None]
    seen &= distance <= left if left >= 0 else torch.tensor(data=True)
    return seen & (-distance <= right if right >= 0 else torch.tensor(data=True))


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **given: Any) -> torch.Tensor:
    """Compute the kernel's result, (tokens, heads, width), with full scores and a mask."""
    for side in ("q", "k"):
        assert given[f"cu_seq_{side}"].dtype == torch.int32
        assert given[f"max_{side}"] == int(given[f"cu_seq_{side}"].diff().max())
    return scaled_dot_product_attention(
        *(part.transpose(0, 1) for part in (query, key, value)),
        attn_mask=visible(given["cu_seq_q"], given["cu_seq_k"], given["window_size"]),
        scale=given["scale"],
        enable_gqa=given["enable_gqa"],
    ).transpose(0, 1)


@pytest.fixture
def kernel_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace PyTorch's operator, which has no CPU kernel, by one written from its documentation.

    So the arguments that it gets, and the use of its result, can be compared.
    """
    names = [argument.name for argument in torch.ops.torch_attn._varlen_attn.default._schema.arguments]

    def call(*given: Any) -> tuple[torch.Tensor]:
        named = dict(zip(names, given, strict=True))
        return (dense(named.pop("query"), named.pop("key"), named.pop("value"), **named), *[torch.empty(0)] * 2)

    class Operators:
        _varlen_attn = staticmethod(call)

    monkeypatch.setattr(varlen.torch.ops, "torch_attn", Operators)


def tensors(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Return query, key and value, which require gradients."""
    torch.manual_seed(0)
    heads = (HEADS, KEY_HEADS, KEY_HEADS)
    return [torch.randn(1, count, BOUNDS[-1], WIDTH, dtype=dtype, requires_grad=True) for count in heads]


def results(attend: Any, inputs: list[torch.Tensor], **given: Any) -> list[torch.Tensor]:
    output, _ = attend(None, *inputs, None, **given)
    weight = torch.linspace(-1, 1, output.numel()).view(output.shape)
    return [output, *torch.autograd.grad((output.float() * weight).sum(), inputs)]


@pytest.mark.usefixtures("kernel_on_cpu")
@pytest.mark.parametrize("given", [{}, {"scaling": 0.5}, {"sliding_window": 4}, {"sliding_window": 1}])
def test_the_kernel_gets_the_arguments_for_the_segments(given: dict[str, Any]) -> None:
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    by_segments = results(segment_attention, tensors(), cu_seq_lens_q=bounds, **given)
    by_kernel = results(varlen_attention, tensors(), cu_seq_lens_q=bounds, max_length_q=max(SIZES), **given)
    for found, expected in zip(by_kernel, by_segments, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("kernel_on_cpu")
@pytest.mark.parametrize("given", [{}, {"sliding_window": 4}])
def test_the_kernel_gets_the_keys_of_shared_prefixes(given: dict[str, Any]) -> None:
    prefixes = [(0, 0), (0, 4), (0, 2), (0, 5)]
    sizes = [own + end - begin for own, (begin, end) in zip(SIZES, prefixes, strict=True)]
    keys = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
    shared: dict[str, Any] = {"sequence_bounds": BOUNDS, "shared_prefixes": prefixes, **given}
    by_segments = results(segment_attention, tensors(), **shared)
    shared |= {"cu_seq_lens_q": torch.tensor(BOUNDS, dtype=torch.int32), "max_length_q": max(SIZES)}
    by_kernel = results(varlen_attention, tensors(), cu_seq_lens_k=keys, max_length_k=max(sizes), **shared)
    for found, expected in zip(by_kernel, by_segments, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("kernel_on_cpu")
def test_float32_positions_are_rounded_like_products() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = varlen_attention(None, *tensors(), None)
        expected, _ = segment_attention(None, *tensors(), None)
    exact, _ = segment_attention(None, *tensors(), None)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=2e-2, atol=2e-2)
    assert 1e-4 < float((found - exact).detach().abs().max()) < 3e-2


@pytest.mark.usefixtures("kernel_on_cpu")
def test_a_row_without_bounds_is_one_sequence() -> None:
    for found, expected in zip(
        results(varlen_attention, tensors()), results(segment_attention, tensors()), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_bounds_on_the_host_equal_those_on_the_device() -> None:
    known = results(segment_attention, tensors(), sequence_bounds=BOUNDS, cu_seq_lens_q=None)
    read = results(segment_attention, tensors(), cu_seq_lens_q=torch.tensor(BOUNDS))
    assert all(torch.equal(*pair) for pair in zip(known, read, strict=True))


@pytest.mark.parametrize("attend", [segment_attention, varlen_attention])
@pytest.mark.parametrize("given", [{"softcap": 50.0}, {"s_aux": torch.zeros(HEADS)}])
def test_unsupported_arguments_are_refused(attend: Any, given: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match="soft cap"):
        attend(None, *tensors(), None, **given)


def test_dropout_is_not_silently_ignored() -> None:
    with pytest.raises(NotImplementedError, match="dropout"):
        varlen_attention(None, *tensors(), None, dropout=0.1)


def test_pytorchs_operator_accepts_the_arguments() -> None:
    # Meta tensors exercise the operators' real signatures and shapes, forward and backward.
    inputs = [part.detach().to("meta").requires_grad_() for part in tensors(torch.bfloat16)]
    bounds = torch.empty(len(BOUNDS), dtype=torch.int32, device="meta")
    output, _ = varlen_attention(None, *inputs, None, cu_seq_lens_q=bounds, max_length_q=9, sliding_window=4)
    gradients = torch.autograd.grad(output.sum(), inputs)
    assert output.shape == (1, BOUNDS[-1], HEADS, WIDTH)
    assert output.dtype is torch.bfloat16
    assert [part.shape for part in gradients] == [part.shape for part in inputs]


@pytest.mark.usefixtures("kernel_on_cpu")
@pytest.mark.parametrize(("dropout", "attention"), [(0.0, Attention.VARLEN), (0.1, Attention.SEGMENTS)])
def test_a_base_with_attention_dropout_is_not_trained_with_the_kernel(
    monkeypatch: pytest.MonkeyPatch, dropout: float, attention: Attention
) -> None:
    """Such a base drops nothing out in evaluation, so the refusal only appears in training."""
    monkeypatch.setattr(layout, "has_varlen_kernel", lambda *_: True)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, attention_dropout=dropout))
    add_target_loss(base)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"]))
    before = torch.get_rng_state()
    assert choose_loss_implementation(model, base).attention is attention
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_cpus_and_float32_try_segments_first_and_gpus_with_16_bits_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    padded = [LossImplementation(Layout.PADDED), LossImplementation(Layout.PADDED, whole_logits=True)]
    segments = LossImplementation(Layout.FLAT, Attention.SEGMENTS)
    gpu = torch.device("cuda", 0)
    assert loss_implementations(torch.device("cpu"), torch.bfloat16) == [segments, *padded]
    assert loss_implementations(gpu, torch.float32) == [segments, *padded]
    for capability, has in (((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert has_varlen_kernel(gpu, torch.bfloat16) is has
        assert (loss_implementations(gpu, torch.bfloat16)[0].attention is Attention.VARLEN) is has
