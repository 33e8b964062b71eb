from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tunesmith.api.manifest import parse_manifest
from tunesmith.api.method import Method
from tunesmith.cli.main import main

if TYPE_CHECKING:
    from pathlib import Path

CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": "org/base",
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "target_modules": ["v_proj", "q_proj"],
    "bias": "none",
    "init_lora_weights": True,
    "inference_mode": True,
}


@pytest.mark.parametrize(
    ("change", "arguments", "code", "said"),
    [
        ({}, (), 0, ""),
        ({"layers_to_transform": [1, 2]}, (), 0, "layers_to_transform: [1, 2] has no counterpart"),
        ({"layers_to_transform": [1, 2]}, ("--strict",), 1, "1 keys have no counterpart: layers_to_transform"),
        ({"target_modules": ".*proj"}, (), 0, 'target_modules: ".*proj" has no counterpart'),
        ({"peft_type": None}, (), 2, "peft_type is missing"),
        ({"r": 4096}, (), 1, "spec.method.lora.rank is 4096: it must be at most 512"),
    ],
)
def test_import_peft(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    arguments: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(CONFIG | change))
    monkeypatch.setattr(sys, "argv", ["tunesmith", "import", "peft", str(file), "--data", "s3://b/t.jsonl", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert (ended.value.code or 0) == code
    assert said in printed.err
    if code == 0:
        job = parse_manifest(printed.out)
        assert job.spec.base_model.uri == "hf://org/base"
        assert job.spec.method.lora is not None
        assert (job.spec.method.lora.rank, job.spec.method.lora.alpha, job.spec.method.lora.dropout) == (8, 16, 0.1)


METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "LoRA's variants": (
        {
            "peft_type": "LORA",
            "r": 8,
            "lora_alpha": 16,
            "target_modules": "all-linear",
            "use_rslora": True,
            "use_dora": True,
            "rank_pattern": {"q_proj": 4},
            "modules_to_save": ["lm_head"],
            "init_lora_weights": "gaussian",
        },
        {
            "lora": {
                "rank": 8,
                "alpha": 16,
                "targetModules": ["all-linear"],
                "rsLora": True,
                "dora": True,
                "rankPattern": {"q_proj": 4},
                "modulesToSave": ["lm_head"],
                "initialization": "Gaussian",
            }
        },
    ),
    "AdaLoRA": (
        {"peft_type": "ADALORA", "init_r": 12, "target_r": 8, "lora_alpha": 32, "deltaT": 10, "rank_pattern": {"a": 1}},
        {"adaLora": {"initialRank": 12, "targetRank": 8, "alpha": 32, "interval": 10}},
    ),
    "IA3": (
        {"peft_type": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        {"ia3": {"targetModules": ["down_proj", "k_proj"], "feedforwardModules": ["down_proj"]}},
    ),
    "prefix tuning": (
        {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 30, "prefix_projection": True, "num_layers": 16},
        {"prefixTuning": {"virtualTokens": 30, "projection": True}},
    ),
    "prompt tuning": (
        {
            "peft_type": "PROMPT_TUNING",
            "num_virtual_tokens": 8,
            "prompt_tuning_init": "TEXT",
            "prompt_tuning_init_text": "Answer.",
        },
        {"promptTuning": {"virtualTokens": 8, "initialText": "Answer."}},
    ),
    "P-tuning": (
        {"peft_type": "P_TUNING", "num_virtual_tokens": 8, "encoder_reparameterization_type": "LSTM"},
        {"pTuning": {"virtualTokens": 8, "encoder": "Lstm"}},
    ),
    "any other": (
        {"peft_type": "VERA", "r": 256, "target_modules": ["q_proj"], "d_initial": 0.1, "init_weights": True},
        {"peft": {"type": "VERA", "config": {"r": 256, "target_modules": ["q_proj"], "d_initial": 0.1}}},
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_kind_of_adapter_becomes_a_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    config, expected = METHODS[name]
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(config | {"base_model_name_or_path": "org/base", "inference_mode": True}))
    arguments = ["tunesmith", "import", "peft", str(file), "--data", "s3://b/t.jsonl", "--strict"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert not ended.value.code, printed.err
    assert parse_manifest(printed.out).spec.method.manifest() == Method.model_validate(expected).manifest()
