"""Adapters of the trainer pass the check that the agent of a pool makes before an engine loads them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from methods_rig import try_method

# The agent's package has an environment of its own; what is imported of it needs numpy only.
sys.path.append(str(Path(__file__).resolve().parents[2] / "server-image/src"))

from tunesmith_server.base_weights import read_base_weights
from tunesmith_server.lora import WEIGHTS, check_config, check_header, check_length, check_values, weight_bounds

_QV = ["q_proj", "v_proj"]
METHODS: dict[str, dict[str, Any]] = {
    "plain": {"lora": {"rank": 4, "alpha": 8}},
    "patterns": {
        "lora": {"rank": 4, "targetModules": _QV, "rankPattern": {"v_proj": 6}, "alphaPattern": {"q_proj": 3}}
    },
    "PiSSA with patterns and rsLora": {
        "lora": {
            "rank": 4,
            "initialization": "PiSSA",
            "rsLora": True,
            "targetModules": _QV,
            "rankPattern": {"v_proj": 6},
        }
    },
    "EVA": {"lora": {"rank": 4, "initialization": "EVA"}},
    "qlora": {"qlora": {"rank": 4}},
    "expressions": {
        "peft": {
            "type": "LORA",
            "config": {
                "r": 4,
                "lora_alpha": 8,
                "target_modules": r".*\.self_attn\.(q|v)_proj",
                "rank_pattern": {r".*\.1\.self_attn\.q_.*": 2},
                "alpha_pattern": {r"layers\.[01]\.self_attn\.v_proj": 2},
            },
        }
    },
    "layers": {"peft": {"type": "LORA", "config": {"r": 4, "target_modules": _QV, "layers_to_transform": [1]}}},
}


@pytest.mark.parametrize("name", METHODS)
def test_what_is_saved_passes_the_agents_check(base_model: Path, tmp_path: Path, name: str) -> None:
    trial = try_method(METHODS[name], base_model, tmp_path / "adapter")
    assert trial.servable.vllm, trial.servable.reason
    base = read_base_weights(base_model)
    bounds = weight_bounds(base, 16)
    config = check_config((tmp_path / "adapter/adapter_config.json").read_bytes(), max_rank=16)
    path = tmp_path / "adapter" / WEIGHTS
    content = path.read_bytes()
    length = check_length(content[:8], len(content), bounds)
    modules = check_header(content[8 : 8 + length], len(content), config, base, bounds)
    assert 0 < check_values(path, modules, config, base, 4.0) < 4


def test_expressions_are_saved_as_names(base_model: Path, tmp_path: Path) -> None:
    try_method(METHODS["expressions"], base_model, tmp_path / "adapter", steps=1)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    layers = [f"model.layers.{layer}.self_attn" for layer in (0, 1)]
    assert config["target_modules"] == [f"{layer}.{part}_proj" for layer in layers for part in "qv"]
    assert config["rank_pattern"] == {f"{layers[1]}.q_proj": 2}
    assert config["alpha_pattern"] == {f"{layer}.v_proj": 2 for layer in layers}
