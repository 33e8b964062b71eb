from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from methods_rig import PROMPTS, distance, plan, try_method
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tunesmith_trainer import merge
from tunesmith_trainer.errors import InvalidSpecError, NotServableError

if TYPE_CHECKING:
    from pathlib import Path

# 2 layers of q, o (64→64), k, v (64→32), gate, up (64→128), down (128→64)
_INPUTS, _OUTPUTS = 2 * (4 * 64 + 2 * 64 + 128), 2 * (2 * 64 + 2 * 32 + 2 * 128 + 64)
_VARIANTS: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({}, 4 * (_INPUTS + _OUTPUTS)),
    "rsLora": ({"rsLora": True}, 4 * (_INPUTS + _OUTPUTS)),
    "dora": ({"dora": True}, 4 * (_INPUTS + _OUTPUTS) + _OUTPUTS),
    "patterns": (
        {"targetModules": ["q_proj", "v_proj"], "rankPattern": {"v_proj": 6}, "alphaPattern": {"q_proj": 3}},
        2 * (4 * 128 + 6 * 96),
    ),
    "lm_head": ({"targetModules": ["q_proj"], "modulesToSave": ["lm_head"]}, 2 * 4 * 128),
    **{
        name: ({"initialization": name}, 4 * (_INPUTS + _OUTPUTS))
        for name in ("Gaussian", "Orthogonal", "EVA", "PiSSA", "FastPiSSA", "OLoRA", "CorDA", "LoRAGA")
    },
    "MiCA": ({"initialization": "MiCA"}, 4 * _INPUTS),
    "PiSSA with patterns and rsLora": (
        {
            "initialization": "PiSSA",
            "rsLora": True,
            "targetModules": ["q_proj", "v_proj"],
            "rankPattern": {"v_proj": 6},
            "alphaPattern": {"q_proj": 3},
        },
        2 * (4 * 128 + 6 * 96),
    ),
}
_UNSERVABLE = {"dora": "does not load DoRA", "lm_head": "trained whole"}


def reload(base: Path, folder: Path) -> list[torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return merge.last_logits(PeftModel.from_pretrained(model, folder), PROMPTS)


@pytest.mark.parametrize("name", _VARIANTS)
def test_a_variant_of_lora_reloads_in_plain_peft_as_it_was_trained(base_model: Path, tmp_path: Path, name: str) -> None:
    fields, parameters = _VARIANTS[name]
    trial = try_method({"lora": {"rank": 4, "alpha": 8, **fields}}, base_model, tmp_path / "adapter")
    head = int(AutoModelForCausalLM.from_pretrained(base_model).lm_head.weight.numel()) if name == "lm_head" else 0
    assert trial.planned.parameters == parameters + head
    assert trial.losses[-1] < trial.losses[0]
    assert distance(trial.logits, trial.base_logits) > 1e-2
    assert distance(reload(base_model, tmp_path / "adapter"), trial.logits) < 2e-5
    # Without its adapter the trained model is the base as it was published, whatever the initialisation did to it.
    with trial.model.disable_adapter():
        assert distance(merge.last_logits(trial.model, PROMPTS), trial.base_logits) < 2e-5
    assert distance(merge.last_logits(trial.model, PROMPTS), trial.logits) == 0
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert config["r"] == (
        8
        if fields.get("initialization") in ("PiSSA", "FastPiSSA", "OLoRA", "CorDA", "LoRAGA") or "PiSSA" in name
        else 4
    )
    if name in _UNSERVABLE:
        assert not trial.servable.vllm
        assert _UNSERVABLE[name] in (trial.servable.reason or "")
    else:
        assert trial.servable.vllm
        assert all(
            tensor.endswith((".lora_A.weight", ".lora_B.weight"))
            for tensor in load_file(tmp_path / "adapter/adapter_model.safetensors")
        )


@pytest.mark.parametrize("initialization", ["Gaussian", "EVA"])
def test_qlora_begins_as_asked(base_model: Path, tmp_path: Path, initialization: str) -> None:
    method = {"qlora": {"rank": 4, "alpha": 8, "initialization": initialization}}
    trial = try_method(method, base_model, tmp_path / "adapter")
    assert trial.losses[-1] < trial.losses[0]
    assert trial.servable.vllm


_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rank pattern": (
        {"lora": {"rankPattern": {"q_prj": 4}}},
        "no module with an adapter named q_prj; did you mean q_proj?",
    ),
    "alpha pattern": (
        {"lora": {"targetModules": ["v_proj"], "alphaPattern": {"q_proj": 4}}},
        "no module with an adapter named q_proj",
    ),
    "saved module": ({"lora": {"modulesToSave": ["lm_hed"]}}, "no module named lm_hed; did you mean lm_head?"),
    "saved and adapted": (
        {"lora": {"modulesToSave": ["mlp"]}},
        "mlp would be trained whole and, as model.layers.0.mlp.",
    ),
    "saved in 4 bits": (
        {"qlora": {"targetModules": ["q_proj"], "modulesToSave": ["v_proj"]}},
        "v_proj is held in 4 bits and cannot be trained whole",
    ),
    "odd pattern": (
        {"lora": {"rank": 4, "initialization": "Orthogonal", "rankPattern": {"q_proj": 3}}},
        "Orthogonal needs even ranks",
    ),
    "rank of the base": (
        {"lora": {"rank": 64, "initialization": "PiSSA"}},
        "takes rank 64 out of model.layers.0.self_attn.k_proj",
    ),
    "rank of LoRA-GA": ({"lora": {"rank": 20, "initialization": "LoRAGA"}}, "lower rank to at most 16"),
}


@pytest.mark.parametrize("name", _REFUSED)
def test_what_does_not_fit_the_base_is_refused_without_weights(base_model: Path, name: str) -> None:
    method, expected = _REFUSED[name]
    with pytest.raises(InvalidSpecError) as error:
        plan(method, base_model)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({"lora": {"dora": True, "initialization": "PiSSA"}}, "dora goes with initialization Default"),
        ({"lora": {"rank": 3, "initialization": "Orthogonal"}}, "needs an even rank"),
        (
            {"qlora": {"initialization": "PiSSA"}},
            "the others need the base's weights in full; use them with method.lora",
        ),
    ],
)
def test_combinations_that_cannot_be_are_refused_by_the_manifest(
    base_model: Path, method: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValidationError, match=expected):
        plan(method, base_model)


def test_servable_required_refuses_before_training(base_model: Path) -> None:
    with pytest.raises(NotServableError, match="vLLM does not load DoRA: leave out dora"):
        plan({"lora": {"dora": True}}, base_model, servable="Required")
    assert not plan({"lora": {"dora": True}}, base_model).servable.vllm
    assert plan({"lora": {"rsLora": True}}, base_model, servable="Required").servable.vllm
