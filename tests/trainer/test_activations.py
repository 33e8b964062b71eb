"""The estimated activations equal the bytes that autograd saves in a real model, per token and layer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from tests.trainer.methods_rig import plan, rows_of, spec_of
from tunesmith.api.methods.fields import Quantization
from tunesmith_trainer.base_model.model import load_model
from tunesmith_trainer.methods.wrap import wrap
from tunesmith_trainer.preflight.memory import TOLERANCE, RunShape, Shape, estimate
from tunesmith_trainer.training.loss import add_target_loss

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

HIDDEN, INTERMEDIATE, VOCABULARY = 128, 352, 64
QUERY_VALUE = ["q_proj", "v_proj"]
ALL = [*QUERY_VALUE, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
INPUTS = {len(ALL): 6 * HIDDEN + INTERMEDIATE, len(QUERY_VALUE): 2 * HIDDEN}


def made(layers: int) -> PreTrainedModel:
    """Return a Llama with random weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model: PreTrainedModel = LlamaForCausalLM(config)
    return model


def adapted(layers: int, lora: dict[str, Any] | None, precision: torch.dtype) -> Any:
    """Return the same model with an adapter in float32, or with all weights trained."""
    base = made(layers)
    add_target_loss(base)
    if lora is None:
        return base
    model = get_peft_model(base.to(precision), LoraConfig(r=8, task_type="CAUSAL_LM", **lora))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def kept(model: Any, tokens: int, precision: torch.dtype) -> int:
    """Return the bytes that the backward pass needs of the forward pass, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights:
            found[place] = tensor  # keep a reference, so that its address is not reused
        return tensor

    ids = torch.randint(3, VOCABULARY, (1, tokens))
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
        model.train()(input_ids=ids, labels=ids, target_loss=True)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def per_token_and_layer(measure: Any) -> float:
    """Return the bytes that another token adds in another layer: neither the head nor copies of weights count."""
    more = measure(2, 96) - measure(1, 96) - (measure(2, 48) - measure(1, 48))
    return float(more) / 48


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ALL},
        {"target_modules": QUERY_VALUE},
        {"target_modules": ALL, "lora_dropout": 0.05},
        {"target_modules": ALL, "use_dora": True},
        None,
    ],
    ids=["all", "query and value", "dropout", "DoRA", "full"],
)
def test_the_estimate_is_near_what_autograd_saves(lora: dict[str, Any] | None, precision: torch.dtype) -> None:
    def estimated(layers: int, tokens: int) -> int:
        run = RunShape(
            adapter_parameters=0,
            adapted_inputs=0 if lora is None else INPUTS[len(lora["target_modules"])],
            tokens=tokens,
            checkpointing=False,
            dropout=lora is not None and "lora_dropout" in lora,
            dora=lora is not None and "use_dora" in lora,
            full_precision=precision is torch.float32,
            full=lora is None,
        )
        return estimate(Shape(HIDDEN, layers, INTERMEDIATE, VOCABULARY, 0, 0), run).activations

    measured = per_token_and_layer(lambda layers, tokens: kept(adapted(layers, lora, precision), tokens, precision))
    assert per_token_and_layer(estimated) == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_a_4_bit_base_saves_as_much_as_one_in_the_type_of_the_products(
    tmp_path: Path, precision: torch.dtype, dropout: float
) -> None:
    method = {"qlora": {"rank": 8, "dropout": dropout}}

    def quantized(layers: int) -> Any:
        folder = tmp_path / str(layers)
        made(layers).save_pretrained(folder)
        base = load_model(folder, torch.device("cpu"), Quantization(), precision)
        add_target_loss(base)
        return wrap(base, plan(method, folder), rows_of(VOCABULARY), spec_of(method).method, 1)

    models = {layers: quantized(layers) for layers in (1, 2)}
    run = RunShape(0, INPUTS[len(ALL)], 1, quantized=True, checkpointing=False, dropout=dropout > 0)
    expected = estimate(
        Shape(HIDDEN, 1, INTERMEDIATE, VOCABULARY, 0, 0), replace(run, full_precision=precision is torch.float32)
    )
    measured = per_token_and_layer(lambda layers, tokens: kept(models[layers], tokens, precision))
    assert expected.activations == pytest.approx(measured, rel=TOLERANCE)
