"""docs/architectures.md agrees with the CPU stage about every family; representative ones are trained.

`make verify-architectures` measures the rest.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.trainer.architectures import FAMILIES, LEFT_OUT, Family, make
from tests.trainer.methods_rig import PROMPTS, distance, spec_of, try_method
from tests.trainer.verify_architectures import limit_of
from tunesmith.contracts.servability import of_any_layer
from tunesmith.contracts.vllm_architectures import VLLM as VLLM_RELEASE
from tunesmith.contracts.vllm_architectures import WITH_ADAPTERS, WITHOUT_ADAPTERS
from tunesmith.contracts.vllm_modules import ASKED, UNADAPTED
from tunesmith_trainer.base_model import model as base_model
from tunesmith_trainer.base_model.logits import last_logits
from tunesmith_trainer.errors import InvalidSpecError
from tunesmith_trainer.methods.config import MethodPlan, plan_method
from tunesmith_trainer.methods.targets import BYPASSED, Modules, modules_of

if TYPE_CHECKING:
    from tests.trainer.trainer_rig import Workbench

TABLE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
BY_NAME = {family.name: family for family in FAMILIES}
LORA, ADAPTED, QLORA, IN_4_BITS, VLLM, PARITY = 2, 3, 5, 6, 11, 12


@cache
def modules(name: str) -> Modules:
    return modules_of(BY_NAME[name].config)


def plan(name: str, method: dict[str, Any]) -> MethodPlan:
    return plan_method(spec_of(method), modules(name))


def refusal(name: str, method: dict[str, Any]) -> str:
    with pytest.raises(InvalidSpecError) as caught:
        plan(name, method)
    return str(caught.value)


@pytest.fixture(scope="module")
def table() -> dict[str, list[str]]:
    """Return the cells of each family."""
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
    return {row[0]: row for row in rows}


def test_the_table_lists_every_family(table: dict[str, list[str]]) -> None:
    assert list(table) == [family.name for family in FAMILIES]


def test_every_causal_model_that_transformers_and_vllm_share_has_a_row_or_a_reason() -> None:
    served = WITH_ADAPTERS | WITHOUT_ADAPTERS
    shared = {name for name, classes in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if {classes} & served}
    listed = {family.model_type for family in FAMILIES}
    assert shared - listed == set(LEFT_OUT)


@pytest.mark.parametrize("family", FAMILIES, ids=[family.model_type for family in FAMILIES])
def test_the_table_agrees_with_the_cpu_stage(family: Family, table: dict[str, list[str]]) -> None:
    row = table[family.name]
    planned = plan(family.name, {"lora": {"rank": 4}})
    known = modules(family.name)
    assert row[LORA].startswith("yes")
    assert row[ADAPTED].partition(" [")[0] == f"{100 * planned.adapted_weights // known.layer_weights} %"
    named = plan(family.name, {"lora": {"rank": 4, "targetModules": list(family.explicit)}})
    assert row[VLLM].split(" ")[0] == ("yes" if planned.servable.vllm else "named" if named.servable.vllm else "no")
    assert (row[PARITY] == "–") == row[VLLM].startswith("no ")
    try:
        plan(family.name, {"qlora": {"rank": 4}})
    except InvalidSpecError:
        assert row[QLORA].startswith("no")
    else:
        assert row[QLORA].startswith("yes")
        assert row[IN_4_BITS] == f"{100 * known.quantizable_weights // known.layer_weights} %"


def test_vllm_computed_what_the_trainer_did(table: dict[str, list[str]]) -> None:
    for name, row in table.items():
        figure, _, kind = row[PARITY].partition(" in ")
        if row[PARITY] != "–" and not row[PARITY].startswith("not measured"):
            assert float(figure) <= limit_of(BY_NAME[name]), name
            assert kind == BY_NAME[name].engine.get("dtype", "")


@pytest.mark.parametrize(
    "name", [family.name for family in FAMILIES if not family.experts and "text_config" not in family.settings]
)
def test_all_linear_trains_as_many_parameters_as_peft(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(BY_NAME[name].config)
    planned = plan(name, {"lora": {"rank": 4}})
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    if "mamba" in name.lower() or name in {"Falcon-H1", "Nemotron-H"}:
        with pytest.raises(ValueError, match="incompatible with Mamba"):
            get_peft_model(model, config)
        assert "out_proj" not in planned.targets
        return
    adapted = get_peft_model(model, config)
    bypassed = f".{BYPASSED.get(BY_NAME[name].model_type)}.lora_"
    assert planned.parameters == sum(
        one.numel() for full, one in adapted.named_parameters() if one.requires_grad and bypassed not in full
    )


@pytest.mark.parametrize("name", ["DeepSeek-V3", "GLM-4-MoE", "Qwen3-Next"])
def test_peft_has_no_adapters_for_modules_that_are_named_like_experts(name: str) -> None:
    """Dense layers and shared experts, beside stacked ones: PEFT's own all-linear means the stacked ones by them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(BY_NAME[name].config)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    theirs = {
        parameter.split(".lora_A.")[0].removeprefix("base_model.model.")
        for parameter, _ in adapted.named_parameters()
        if ".lora_A." in parameter
    }
    ours = set(plan(name, {"lora": {"rank": 4}}).modules)
    assert {module for module in theirs if module in modules(name).linear} == ours
    assert [module for module in modules(name).linear if module not in ours]


def test_all_linear_of_a_vision_language_model_is_its_language_model() -> None:
    planned = plan("Gemma 3, vision", {"lora": {}})
    assert all(name.startswith("model.language_model.") for name in planned.modules)
    named = plan("Gemma 3, vision", {"lora": {"targetModules": ["q_proj"]}})
    assert list(named.modules) == [f"model.language_model.layers.{layer}.self_attn.q_proj" for layer in range(2)]


@pytest.mark.parametrize("name", ["DeepSeek-V3.2", "DeepSeek-V4", "GLM-5", "Hy 4", "Qwen4", "dots3"])
def test_all_linear_leaves_out_indexers_which_get_no_gradient(name: str) -> None:
    planned = plan(name, {"lora": {}})
    assert modules(name).indexers
    assert not modules(name).indexers & set(planned.modules)


def test_experts_that_are_stacked_in_two_dimensions_count() -> None:
    assert plan("DBRX", {"lora": {}}).adapted_weights < modules("DBRX").layer_weights / 2


def test_modules_whose_names_are_numbers_are_named_in_full() -> None:
    planned = plan("Gemma 3n", {"lora": {}})
    assert planned.config is not None
    numbers = [name for name in planned.config.target_modules if name.rpartition(".")[2].isdigit()]
    assert numbers
    assert all("." in name for name in numbers)


def test_experts_get_an_adapter_where_they_are_named() -> None:
    experts = {"targetParameters": ["experts.gate_up_proj", "experts.down_proj"]}
    without, with_experts = plan("Mixtral", {"lora": {}}), plan("Mixtral", {"lora": experts})
    weights = modules("Mixtral").layer_weights
    assert without.adapted_weights < weights == with_experts.adapted_weights
    assert without.servable.vllm
    assert not with_experts.servable.vllm
    assert "remove targetParameters" in str(with_experts.servable.reason)


def test_an_adapter_is_servable_without_the_modules_that_vllm_does_not_adapt() -> None:
    whole = plan("GLM-4-0414", {"lora": {}}).servable
    assert not whole.vllm
    assert whole.reason == (
        "vLLM 0.32 does not apply adapters to gate_up_proj of a Glm4ForCausalLM: train without it (targetModules: "
        "[down_proj, k_proj, o_proj, q_proj, v_proj]), or merge the adapter (output.merge) and serve the result as a "
        "model of its own"
    )
    named = {"targetModules": ["down_proj", "k_proj", "o_proj", "q_proj", "v_proj"]}
    assert plan("GLM-4-0414", {"lora": named}).servable.vllm


def test_an_adapter_of_half_a_matrix_that_vllm_refuses_alone_is_not_servable() -> None:
    alone = plan("Qwen3.5", {"lora": {"targetModules": ["in_proj_z"]}}).servable
    assert not alone.vllm
    assert str(alone.reason).startswith(
        "vLLM 0.32 refuses an adapter of model.layers.0.linear_attn.in_proj_z without one of in_proj_qkv in the same "
        "layer: train it too, or merge"
    )
    assert plan("Qwen3.5", {"lora": {"targetModules": ["in_proj_z", "in_proj_qkv"]}}).servable.vllm
    assert plan("Qwen3.5", {"lora": {"targetModules": ["in_proj_qkv"]}}).servable.vllm


def test_the_modules_that_vllm_does_not_adapt_are_those_of_the_pinned_release() -> None:
    """After an update of vLLM, run `make verify-architectures`."""
    assert ASKED == VLLM_RELEASE
    known = {modules(name).class_name: {of_any_layer(full) for full in modules(name).linear} for name in BY_NAME}
    for architecture, names in UNADAPTED.items():
        assert names <= known[architecture]


def test_an_adapter_of_a_language_model_alone_is_not_servable_with_the_whole_model() -> None:
    text = BY_NAME["Qwen3.5"].config.to_dict()
    whole = AutoConfig.for_model("qwen3_5", text_config=text, architectures=["Qwen3_5ForConditionalGeneration"])
    verdict = plan_method(spec_of({"lora": {}}), modules_of(whole)).servable
    assert not verdict.vllm
    assert "of the language model of a Qwen3_5ForConditionalGeneration alone" in str(verdict.reason)
    assert plan("Gemma 3, vision", {"lora": {}}).servable.vllm


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("Mixtral", {"lora": {"targetModules": ["w1"]}}, "targetParameters: [experts.down_proj, experts.gate_up_proj]"),
        ("DeepSeek-V3", {"lora": {"targetModules": ["gate_proj"]}}, "PEFT reads gate_proj as the experts"),
        ("Llama 3", {"lora": {"targetParameters": ["experts.up"]}}, "it has no experts: remove targetParameters"),
        ("Mixtral", {"lora": {"targetParameters": ["experts.up"]}}, "it has experts.down_proj, experts.gate_up_proj"),
        ("Mamba-2", {"lora": {"targetModules": ["out_proj"]}}, "the layers of a mamba2 bypass it"),
        ("Mamba", {"lora": {"targetModules": ["dt_proj"]}}, "the layers of a mamba bypass it"),
        ("Gemma 3n", {"lora": {"targetModules": ["correction_coefs"]}}, "the layers of a gemma3n_text bypass it"),
        ("DBRX", {"lora": {"targetParameters": ["mlp.w1"]}}, "compute with the weights of experts themselves"),
        ("DeepSeek-V3.2", {"lora": {"targetModules": ["wq_b"]}}, "wq_b is part of the indexer of a deepseek_v32"),
        ("DeepSeek-V4", {"lora": {"targetModules": ["o_a_proj"]}}, "computes groups of outputs from groups of inputs"),
        ("DeepSeek-V4", {"qlora": {}}, "compute with the weights of linear modules themselves"),
        ("Mamba", {"qlora": {}}, "compute with the weights of linear modules themselves"),
        ("Gemma 3n", {"qlora": {}}, "compute with the weights of linear modules themselves"),
        ("Falcon", {"qlora": {}}, "can hold 0% of the weights in the layers of a falcon"),
        ("Mixtral", {"qlora": {}}, "its experts are not linear modules"),
        ("Phi-3, Phi-4", {"ia3": {}}, "targetModules: [qkv_proj, down_proj], feedforwardModules: [down_proj]"),
    ],
)
def test_the_refusal_names_what_works(name: str, method: dict[str, Any], message: str) -> None:
    assert message in refusal(name, method)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("GPT-2", {"lora": {}}),
        ("GPT-2", {"lora": {"dora": True}}),
        ("Mixtral", {"lora": {"targetParameters": ["experts.gate_up_proj", "experts.down_proj"]}}),
        ("DeepSeek-V3", {"lora": {}}),
        ("Gemma 3, vision", {"lora": {}}),
        ("Gemma 3n", {"lora": {}}),
        ("Llama 4, text", {"lora": {}}),
        ("Mamba-2", {"lora": {}}),
    ],
)
def test_the_saved_adapter_is_what_was_trained(
    name: str, method: dict[str, Any], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    family = BY_NAME[name]
    base = make(family, tmp_path_factory.getbasetemp() / "bases" / family.model_type)
    trial = try_method(method, base, tmp_path / "adapter")
    assert trial.losses[-1] < trial.losses[0]
    assert distance(trial.logits, trial.base_logits) > 0
    loaded = base_model.load_model(base, torch.device("cpu"), None, torch.float32)
    again: Any = PeftModel.from_pretrained(loaded, str(tmp_path / "adapter"))
    assert distance(last_logits(again, PROMPTS), trial.logits) < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "stored quantised (gptq)"),
        ({"model_type": "own", "auto_map": {"AutoModelForCausalLM": "own.Own"}}, "needs code of its own"),
    ],
)
def test_a_base_that_must_be_converted_is_refused(
    bench: Workbench, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    base = _copy(bench.base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | change))
    bench.base = base
    ran = bench.run("validate", bench.job())
    assert ran.result.reason == "InvalidSpec"
    assert message in ran.result.message


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("model.safetensors", "pytorch_model.bin", "pytorch_model.bin, a pickle"),
        ("tokenizer.json", "tokenizer.model", "the tokenizer in"),
    ],
)
def test_a_base_with_other_files_is_refused_with_the_command_that_converts_it(
    bench: Workbench, old: str, new: str, message: str, tmp_path: Path
) -> None:
    base = _copy(bench.base, tmp_path / "base")
    (base / old).rename(base / new)
    bench.base = base
    ran = bench.run("validate", bench.job())
    assert ran.result.reason == "BaseModelNotFound"
    assert message in ran.result.message
    assert "save_pretrained('TARGET')" in ran.result.message


def _copy(base: Path, target: Path) -> Path:
    target.mkdir()
    for file in base.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target
