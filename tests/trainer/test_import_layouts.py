"""Layouts of adapters of PEFT's releases and of other trainers: imported with the same logits, or refused."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from tests.trainer.foreign_rig import (
    change_config,
    import_adapter,
    loaded,
    logits,
    peft_adapter,
    randomize,
    rename_tensors,
)
from tests.trainer.test_agent_check import refusal as agent_refusal
from tunesmith.contracts.artifact import parse_manifest
from tunesmith.contracts.location import ARTIFACT_MANIFEST
from tunesmith.contracts.servability import ADAPTER_CONFIG, ADAPTER_WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.trainer.foreign_rig import Imported

TOLERANCE = 1e-4
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def assert_imported(folder: Path, base: Path, expected: torch.Tensor) -> Imported:
    """Import the adapter in `folder`/adapter: plain PEFT computes the same with it, and a pool's agent accepts it."""
    imported = import_adapter(folder / "adapter", base, folder)
    assert imported.code == 0, imported.result.message
    assert (imported.logits(base) - expected).abs().max() <= TOLERANCE
    assert (logits(loaded(base)) - expected).abs().max() > 10 * TOLERANCE
    assert imported.result.artifact is not None
    assert imported.result.artifact.servable.vllm, imported.result.artifact.servable.reason
    copy = shutil.copytree(imported.folder, folder / "copy")
    assert agent_refusal(copy, base, folder / "adapters", max_ratio=1e6) is None
    return imported


def refusal(folder: Path, base: Path) -> str:
    imported = import_adapter(folder / "adapter", base, folder)
    assert imported.code == 2
    return imported.result.message


def changes(imported: Imported) -> list[str]:
    manifest = parse_manifest((imported.folder / ARTIFACT_MANIFEST).read_bytes())
    assert manifest.imported_from is not None
    return manifest.imported_from.changes


NAMES: dict[str, Callable[[str], str]] = {
    "no prefix": lambda name: name.removeprefix("base_model.model."),
    "repeated prefix": lambda name: f"base_model.model.{name}",
    "with the adapter's name": lambda name: name.replace(".weight", ".default.weight"),
    "recomputed activations": lambda name: name.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name}".replace(".self_attn.", "._fsdp_wrapped_module.self_attn."),
    "torch.compile": lambda name: name.replace("base_model.model.", "_orig_mod.base_model.model._orig_mod."),
    "data parallelism": lambda name: f"module.{name}",
    "language model alone": lambda name: name.replace("base_model.model.model.", "base_model.model."),
    "with images": lambda name: name.replace(".model.model.", ".model.model.language_model."),
    "with images, older transformers": lambda name: name.replace(".model.model.", ".model.language_model.model."),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_that_other_trainers_write(base_model: Path, tmp_path: Path, case: str) -> None:
    expected = peft_adapter(base_model, tmp_path / "adapter")
    rename_tensors(tmp_path / "adapter", NAMES[case])
    assert_imported(tmp_path, base_model, expected)


OLDEST = {
    "base_model_name_or_path": "decapoda-research/llama-7b-hf",
    "bias": "none",
    "enable_lora": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "lora_alpha": 8,
    "lora_dropout": 0.05,
    "merge_weights": False,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 4,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
}
PEFT_0_5 = {key: value for key, value in OLDEST.items() if key not in {"enable_lora", "merge_weights"}} | {
    "auto_mapping": None,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "revision": None,
}
PEFT_0_10 = PEFT_0_5 | {
    "alpha_pattern": {},
    "loftq_config": {},
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "rank_pattern": {},
    "use_dora": False,
    "use_rslora": False,
    "layer_replication": None,
}
UNSLOTH = PEFT_0_10 | {
    "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "unsloth", "unsloth_fixed": True},
    "target_modules": "(?:.*?(?:language|text|model).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)",
    "lora_bias": False,
    "eva_config": None,
    "corda_config": None,
    "trainable_token_indices": None,
    "qalora_group_size": 16,
    "use_qalora": False,
}
NEWER = PEFT_0_10 | {"a_key_of_tomorrow": None, "another_key_of_tomorrow": False}


@pytest.mark.parametrize("config", [OLDEST, PEFT_0_5, PEFT_0_10, UNSLOTH, NEWER])
def test_configurations_of_releases_and_trainers(base_model: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    expected = peft_adapter(base_model, tmp_path / "adapter")
    (tmp_path / "adapter" / ADAPTER_CONFIG).write_text(json.dumps(config))
    imported = assert_imported(tmp_path, base_model, expected)
    assert imported.config["target_modules"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ALL},
        {"target_modules": "all-linear"},
        {"target_modules": [*ALL, "lm_head"]},
        {"target_modules": [*ALL, "embed_tokens"]},
        {"use_rslora": True, "r": 8},
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 16}},
        {
            "rank_pattern": {"^model.layers.0.self_attn.v_proj": 2},
            "alpha_pattern": {"^model.layers.1.self_attn.q_proj": 3},
        },
        {"rank_pattern": {r".*\.1\.self_attn\.q_proj": 6}},
        {"rank_pattern": {"q_proj": 2, "v_proj": 2}},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": r".*\.0\.self_attn\.(q|k)_proj"},
        {"exclude_modules": r".*\.1\..*"},
        {"init_lora_weights": "gaussian"},
    ],
    ids=json.dumps,
)
def test_features_of_peft(base_model: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    expected = peft_adapter(base_model, tmp_path / "adapter", **config)
    assert_imported(tmp_path, base_model, expected)


def test_weights_in_16_bits(base_model: Path, tmp_path: Path) -> None:
    peft_adapter(base_model, tmp_path / "adapter")
    path = tmp_path / "adapter" / ADAPTER_WEIGHTS
    rounded = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file({name: tensor.float() for name, tensor in rounded.items()}, path)
    expected = import_adapter(tmp_path / "adapter", base_model, tmp_path / "adapter").logits(base_model)
    save_file(rounded, path)
    imported = assert_imported(tmp_path, base_model, expected)
    assert {tensor.dtype for tensor in load_file(imported.folder / ADAPTER_WEIGHTS).values()} == {torch.bfloat16}


def test_copies_of_the_base_are_left_out(base_model: Path, tmp_path: Path) -> None:
    expected = peft_adapter(base_model, tmp_path / "adapter")
    model = loaded(base_model)
    path = tmp_path / "adapter" / ADAPTER_WEIGHTS
    copies = {
        "base_model.model.model.embed_tokens.weight": model.model.embed_tokens.weight.detach().clone(),
        "base_model.model.lm_head.weight": model.lm_head.weight.detach().clone(),
    }
    save_file(load_file(path) | copies, path)
    change_config(tmp_path / "adapter", modules_to_save=["embed_tokens", "lm_head"])
    imported = assert_imported(tmp_path, base_model, expected)
    assert changes(imported) == ["left out lm_head.weight, model.embed_tokens.weight, which equal the base's"]
    trained = dict(copies)
    trained["base_model.model.lm_head.weight"] = copies["base_model.model.lm_head.weight"] + 0.1
    save_file(load_file(path) | trained, path)
    again = tmp_path / "again"
    again.mkdir()
    (tmp_path / "adapter").rename(again / "adapter")
    assert "lm_head.weight was trained as well" in refusal(again, base_model)
    wider = copies["base_model.model.lm_head.weight"]
    path = again / "adapter" / ADAPTER_WEIGHTS
    save_file(load_file(path) | {"base_model.model.lm_head.weight": torch.cat([wider, wider[:2]])}, path)
    assert "tokens were added to its vocabulary" in refusal(again, base_model)


def test_two_adapters_in_one_file_are_refused(base_model: Path, tmp_path: Path) -> None:
    peft_adapter(base_model, tmp_path / "adapter")
    rename_tensors(
        tmp_path / "adapter", lambda name: name.replace(".weight", ".a.weight" if ".0." in name else ".b.weight")
    )
    assert "the tensors of several adapters (a, b)" in refusal(tmp_path, base_model)


def initialized(base: Path, folder: Path, initialization: str, **config: Any) -> torch.Tensor:
    """Save an adapter whose initialization changes the base, as it is, and the untrained one beside it."""
    given = {"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "CAUSAL_LM"} | config
    model = get_peft_model(loaded(base), LoraConfig(**given, init_lora_weights=initialization))
    peft_config = model.peft_config["default"]
    peft_config.init_lora_weights = True
    model.save_pretrained(str(folder / f"{initialization.partition('_')[0]}_init"))
    peft_config.init_lora_weights = initialization
    randomize(model)
    model.save_pretrained(str(folder))
    return logits(model.eval())


@pytest.mark.parametrize("initialization", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize(
    "config", [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}}]
)
def test_an_initialization_that_changes_the_base_is_undone(
    base_model: Path, tmp_path: Path, initialization: str, config: dict[str, Any]
) -> None:
    expected = initialized(base_model, tmp_path / "adapter", initialization, **config)
    imported = assert_imported(tmp_path, base_model, expected)
    assert imported.config["r"] == 8
    assert "with the untrained adapter, which doubles the rank" in changes(imported)[0]


@pytest.mark.parametrize("initialization", ["pissa", "olora"])
@pytest.mark.parametrize(
    "config", [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}}]
)
def test_such_an_initialization_is_computed_from_the_base(
    base_model: Path, tmp_path: Path, initialization: str, config: dict[str, Any]
) -> None:
    expected = initialized(base_model, tmp_path / "adapter", initialization, **config)
    (tmp_path / "adapter" / f"{initialization}_init").rename(tmp_path / "elsewhere")
    imported = assert_imported(tmp_path, base_model, expected)
    assert "computed from the base, which doubles the rank" in changes(imported)[0]


def test_a_base_that_does_not_fit_into_memory(
    base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith_trainer.foreign.base.available_memory", lambda: 1000)
    peft_adapter(base_model, tmp_path / "adapter")
    imported = import_adapter(tmp_path / "adapter", base_model, tmp_path)
    assert imported.code == 0
    assert imported.result.imported is not None
    assert imported.result.imported.parity is False
    assert "its expected answers were not recorded, for want of memory" in imported.result.message
    work = tmp_path / "pissa"
    work.mkdir()
    initialized(base_model, work / "adapter", "pissa")
    (work / "adapter" / "pissa_init").rename(work / "elsewhere")
    assert "its start cannot be computed in this memory" in refusal(work, base_model)


def test_a_random_initialization_is_refused_without_the_untrained_adapter(base_model: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    initialized(base_model, adapter, "pissa_niter_4")
    (adapter / "pissa_init").rename(adapter / "elsewhere")
    text = refusal(tmp_path, base_model)
    assert "put the untrained adapter into the sub-folder pissa_init, or save it with PEFT's path_initial_model" in text
    (adapter / "pissa_converted").mkdir()
    assert "name its sub-folder pissa_converted" in refusal(tmp_path, base_model)
    change_config(adapter, init_lora_weights="lora_ga")
    assert "it was initialized with LoRAGA, which changes the base" in refusal(tmp_path, base_model)


def test_an_untrained_adapter_of_another_shape_is_refused(base_model: Path, tmp_path: Path) -> None:
    initialized(base_model, tmp_path / "adapter", "olora")
    peft_adapter(base_model, tmp_path / "adapter" / "olora_init", r=2)
    assert "has other tensors than the trained one" in refusal(tmp_path, base_model)


def as_mlx(folder: Path, rank: int, scale: float, **parameters: Any) -> None:
    """Turn PEFT's files into those of MLX LM: other names, transposed matrices, a scale."""
    renamed = {}
    for name, tensor in load_file(folder / ADAPTER_WEIGHTS).items():
        module, _, matrix = name.removeprefix("base_model.model.").partition(".lora_")
        if not matrix:
            continue  # PEFT's copy of the embedding
        letter = matrix.removeprefix("embedding_")[0].lower()
        renamed[f"{module}.lora_{letter}"] = tensor.T.contiguous()
    save_file(renamed, folder / "adapters.safetensors")
    (folder / ADAPTER_WEIGHTS).unlink()
    config = {
        "model": "mlx-community/tiny-4bit",
        "fine_tune_type": "lora",
        "num_layers": 16,
        "lora_parameters": {"rank": rank, "dropout": 0.0, "scale": scale, **parameters},
        "learning_rate": 1e-5,
        "train": True,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("targets", "scale"), [(ALL, 20.0), (["q_proj", "v_proj"], 0.5), (["v_proj", "embed_tokens"], 2.0)]
)
def test_mlx(base_model: Path, tmp_path: Path, targets: list[str], scale: float) -> None:
    expected = peft_adapter(base_model, tmp_path / "adapter", target_modules=targets, lora_alpha=4 * scale)
    as_mlx(tmp_path / "adapter", 4, scale)
    imported = assert_imported(tmp_path, base_model, expected)
    assert imported.config["lora_alpha"] == 4 * scale
    assert changes(imported) == ["converted from the layout of MLX LM"]


MLX_REFUSED: dict[str, dict[str, Any]] = {
    "remove alpha": {"lora_parameters": {"rank": 4, "scale": 2.0, "alpha": 16}},
    "need a rank and a scale": {"lora_parameters": {"rank": 4}},
    "DoRA, which vLLM does not load": {"fine_tune_type": "dora"},
    "fuse it with `mlx_lm.fuse`": {"fine_tune_type": "full"},
    "has no lora_parameters": {"lora_parameters": None},
    "states 8": {"lora_parameters": {"rank": 8, "scale": 2.0}},
}


@pytest.mark.parametrize("text", MLX_REFUSED)
def test_mlx_is_refused_where_its_meaning_is_unknown(base_model: Path, tmp_path: Path, text: str) -> None:
    peft_adapter(base_model, tmp_path / "adapter")
    as_mlx(tmp_path / "adapter", 4, 2.0)
    change_config(tmp_path / "adapter", **MLX_REFUSED[text])
    assert text in refusal(tmp_path, base_model)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("adapter.nemo", "a checkpoint of NeMo: export it"),
        ("__0_0.distcp", "a checkpoint of NeMo: export it"),
        ("adapters.npz", "mx.save_safetensors('adapters.safetensors'"),
        ("model.safetensors", "the weights of a whole model"),
        ("adapter_model.safetensors", "weights but no adapter_config.json"),
        ("notes.txt", "contains notes.txt"),
    ],
)
def test_other_files_are_refused_with_what_to_do(base_model: Path, tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / file).write_bytes(b"")
    assert text in refusal(tmp_path, base_model)


def other_base(base_model: Path, folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    for file in base_model.iterdir():
        if "token" in file.name or "template" in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_modules_that_store_their_weights_transposed(base_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(2)
    config = GPT2Config(vocab_size=len_of(base_model), n_embd=32, n_layer=2, n_head=2, n_positions=128, eos_token_id=2)
    base = other_base(base_model, tmp_path / "base", GPT2LMHeadModel(config))
    expected = peft_adapter(base, tmp_path / "adapter", target_modules=["c_attn"], fan_in_fan_out=True)
    imported = import_adapter(tmp_path / "adapter", base, tmp_path)
    assert imported.code == 0, imported.result.message
    assert (imported.logits(base) - expected).abs().max() <= TOLERANCE
    assert imported.result.artifact is not None
    assert "serves a GPT2LMHeadModel, but not with adapters" in str(imported.result.artifact.servable.reason)


def len_of(base_model: Path) -> int:
    return int(json.loads((base_model / "config.json").read_text())["vocab_size"])


@pytest.fixture
def experts(base_model: Path, tmp_path: Path) -> Path:
    torch.manual_seed(2)
    config = MixtralConfig(
        vocab_size=len_of(base_model),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        bos_token_id=1,
        eos_token_id=2,
    )
    return other_base(base_model, tmp_path / "base", MixtralForCausalLM(config))


def test_adapters_of_attention_beside_experts(experts: Path, tmp_path: Path) -> None:
    expected = peft_adapter(experts, tmp_path / "adapter")
    assert_imported(tmp_path, experts, expected)


def test_adapters_of_single_experts_are_refused(experts: Path, tmp_path: Path) -> None:
    peft_adapter(experts, tmp_path / "adapter")
    rename_tensors(
        tmp_path / "adapter", lambda name: name.replace(".self_attn.q_proj", ".block_sparse_moe.experts.0.w1")
    )
    assert "belongs to one expert" in refusal(tmp_path, experts)


def test_adapters_of_stacked_experts_are_not_servable(experts: Path, tmp_path: Path) -> None:
    model = get_peft_model(
        loaded(experts), LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    )
    model.save_pretrained(str(tmp_path / "adapter"))
    imported = import_adapter(tmp_path / "adapter", experts, tmp_path)
    if imported.code == 0:
        assert imported.result.artifact is not None
        assert not imported.result.artifact.servable.vllm
        assert "parameters as targets" in str(imported.result.artifact.servable.reason)
    else:
        assert "expert" in imported.result.message
