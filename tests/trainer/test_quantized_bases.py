"""Base models that are published quantised: trained over their own 4 or 8 bits, dequantised, or refused."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.trainer import quantized_bases
from tests.trainer.architectures import FAMILIES, make
from tests.trainer.methods_rig import PROMPTS, distance
from tests.trainer.tiny_model import make as make_llama
from tunesmith_trainer.base_model.convertible import quantized_conversion
from tunesmith_trainer.base_model.eight_bits import exact_products
from tunesmith_trainer.base_model.logits import last_logits
from tunesmith_trainer.base_model.stored import load_published, of_settings
from tunesmith_trainer.errors import InvalidSpecError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.trainer.trainer_rig import Ran, Workbench

HYPER = {"maxSteps": 4, "batchSize": 4, "learningRate": 0.002}
BY_TYPE = {family.model_type: family for family in FAMILIES}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that publishes a base."""
    folder = tmp_path_factory.mktemp("quantized")
    makers: dict[str, tuple[str, Callable[[Path, Path], Path]]] = {
        "nf4": ("llama", quantized_bases.in_4_bits),
        "int8": ("llama", quantized_bases.in_8_bits),
        "fp8": ("llama", quantized_bases.in_fp8),
        "mxfp4": ("gpt_oss", quantized_bases.in_mxfp4),
        "fp8 experts": ("qwen3_moe", quantized_bases.in_fp8),
    }

    def publish(kind: str) -> Path:
        model_type, maker = makers.get(kind, (kind, None))
        plain = folder / model_type
        if not plain.exists():
            make_llama(plain, hidden=128) if model_type == "llama" else make(BY_TYPE[model_type], plain)
        if maker is None:
            return plain
        return folder / kind if (folder / kind).exists() else maker(plain, folder / kind)

    return publish


def run(bench: Workbench, base: Path, command: str = "train", **spec: Any) -> Ran:
    bench.base = base
    return bench.run(command, bench.job(**({"hyperparameters": HYPER} | spec)))


def reloaded(bench: Workbench, base: Path) -> float:
    """Return how far the logits of plain PEFT on the published base are from those of the base alone."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, device_map={"": "cpu"})
    before = last_logits(model, PROMPTS)
    return distance(last_logits(PeftModel.from_pretrained(model, str(bench.output / "artifact")), PROMPTS), before)


def test_qlora_on_a_base_in_4_bits_keeps_its_quantisation(bench: Workbench, bases: Callable[[str], Path]) -> None:
    base = bases("nf4")
    ran = run(bench, base, method={"qlora": {"rank": 4}}, output={"merge": "Dequantized"})
    assert ran.code == 0, ran.result.message
    assert ran.result.resolved is not None
    assert ran.result.resolved.quantization == "nf4"
    assert ran.result.preflight is not None
    assert ran.result.preflight.quantized_percent == 100
    assert ran.result.preflight.servable is not None
    assert "pools do not serve base models in 4 bits" in str(ran.result.preflight.servable.reason)
    assert reloaded(bench, base) > 0.01
    merged = json.loads((bench.output / "merged/merged.json").read_text())
    assert merged["relativeLogitError"] < 0.02
    assert "| Precision | float32, the base in nf4 |" in (bench.output / "artifact/README.md").read_text()
    # Two steps of rounding would differ: of the published weights, and of those that were quantised from them.
    model = load_published(base, torch.float32, device_map={"": "cpu"})
    published = load_published(bases("llama"), torch.float32)
    assert 0 < distance(last_logits(model, PROMPTS), last_logits(published, PROMPTS)) < 0.5


def test_a_base_in_fp4_without_double_quantisation_keeps_it(bench: Workbench, bases: Callable[[str], Path]) -> None:
    base = quantized_bases.in_4_bits(
        bases("llama"), bench.folder / "base", bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False
    )
    ran = run(bench, base, "validate", method={"qlora": {"rank": 4}})
    assert ran.code == 0, ran.result.message
    assert ran.result.resolved is not None
    assert ran.result.resolved.quantization == "fp4"


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_lora_on_a_base_in_8_bits_trains_over_them(
    bench: Workbench, bases: Callable[[str], Path], precision: str
) -> None:
    base = bases("int8")
    ran = run(bench, base, method={"lora": {"rank": 4}}, hyperparameters=HYPER | {"precision": precision})
    assert ran.code == 0, ran.result.message
    assert ran.result.resolved is not None
    assert ran.result.resolved.quantization == "int8"
    assert ran.result.evaluation is not None
    assert (ran.result.evaluation.loss_reduction_percent or 0) > 0
    assert reloaded(bench, base) > 0.01


@pytest.mark.parametrize("products", [torch.float16, torch.bfloat16], ids=str)
def test_products_of_8_bits_are_exact_in_mixed_precision(products: torch.dtype) -> None:
    values, weights = (torch.randint(100, 128, (rows, 64), dtype=torch.int8) for rows in (3, 5))
    with torch.autocast("cpu", products):
        found = exact_products(values, weights)
    assert torch.equal(found, values.int() @ weights.int().T)


@pytest.mark.parametrize("method", [{"ia3": {}}, {"promptTuning": {}}, {"prefixTuning": {}}, {"pTuning": {}}], ids=str)
def test_other_methods_on_a_base_in_8_bits(
    bench: Workbench, bases: Callable[[str], Path], method: dict[str, Any]
) -> None:
    ran = run(bench, bases("int8"), method=method)
    assert ran.code == 0, ran.result.message


@pytest.mark.parametrize(
    ("kind", "method", "merge"),
    [
        ("fp8", {"lora": {"rank": 4}}, "Original"),
        ("fp8", {"qlora": {"rank": 4}}, "Dequantized"),
        ("fp8", {"full": {}}, "None"),
        ("fp8 experts", {"lora": {"rank": 4}}, "Original"),
        ("mxfp4", {"lora": {"rank": 4}}, "Original"),
        (
            "mxfp4",
            {"lora": {"rank": 4, "targetParameters": ["experts.gate_up_proj", "experts.down_proj"]}},
            "Original",
        ),
    ],
    ids=str,
)
def test_a_base_in_fp8_or_mxfp4_is_dequantised(
    bench: Workbench, bases: Callable[[str], Path], kind: str, method: dict[str, Any], merge: str
) -> None:
    ran = run(bench, bases(kind), method=method, output={"merge": merge})
    assert ran.code == 0, ran.result.message
    assert ran.result.resolved is not None
    assert ran.result.resolved.quantization == ("nf4" if "qlora" in method else None)
    assert ran.result.evaluation is not None
    assert (ran.result.evaluation.loss_reduction_percent or 0) > 0
    whole = bench.output / ("artifact" if "full" in method else "merged")
    assert "quantization_config" not in json.loads((whole / "config.json").read_text())


@pytest.mark.parametrize(
    ("kind", "missing", "problem"),
    [
        ("nf4", "model.norm.weight", "lack weights: model.norm.weight"),
        ("nf4", "model.layers.0.self_attn.q_proj.weight.nested_absmax", "lack weights: .*nested_absmax"),
        ("nf4", "model.layers.0.self_attn.q_proj.weight.absmax", "quantised weights .* are incomplete or damaged"),
        ("int8", "model.layers.0.self_attn.q_proj.SCB", "quantised weights .* are incomplete or damaged"),
        ("fp8", "model.layers.0.self_attn.q_proj.weight", "lack weights: model.layers.0.self_attn.q_proj.weight"),
        ("fp8", "model.layers.0.self_attn.q_proj.weight_scale_inv", "lack weights: .*weight_scale_inv"),
        ("mxfp4", "model.layers.0.mlp.experts.gate_up_proj_scales", "quantised weights .* are incomplete or damaged"),
    ],
)
def test_a_quantised_base_without_some_weights_is_refused(
    bases: Callable[[str], Path], tmp_path: Path, kind: str, missing: str, problem: str
) -> None:
    base = shutil.copytree(bases(kind), tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    del weights[missing]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidSpecError, match=problem):
        load_published(base, torch.float32, device_map={"": "cpu"})


@pytest.mark.parametrize("kind", ["fp8", "mxfp4", "fp8 experts"])
def test_dequantised_weights_are_near_those_that_were_quantised(bases: Callable[[str], Path], kind: str) -> None:
    plain = {"fp8": "llama", "mxfp4": "gpt_oss", "fp8 experts": "qwen3_moe"}[kind]
    before = dict(load_published(bases(plain), torch.float32).named_parameters())
    for name, found in load_published(bases(kind), torch.float32).named_parameters():
        assert found.dtype is torch.float32
        assert float((found - before[name]).detach().norm()) <= 0.2 * float(before[name].detach().norm()), name


@pytest.mark.parametrize(
    ("kind", "spec", "message"),
    [
        (
            "nf4",
            {"method": {"lora": {}}},
            "so the adapter would be trained over these: use method.qlora, or use the model",
        ),
        ("nf4", {"method": {"ia3": {}}}, "set method.ia3.quantization: {}"),
        ("nf4", {"method": {"full": {}}}, "which cannot be trained: use method.qlora"),
        ("nf4", {"method": {"qlora": {"initialization": "LoftQ"}}}, "LoftQ needs the weights before"),
        ("nf4", {"method": {"qlora": {}}, "output": {"merge": "Original"}}, "use Dequantized, or use the model"),
        ("int8", {"method": {"qlora": {}}}, "is not quantised again: use method.lora, which trains over these 8 bits"),
        ("int8", {"method": {"adaLora": {}}}, "on which adaLora is not supported: use method.lora"),
        ("int8", {"method": {"full": {}}}, "which cannot be trained: use method.lora"),
        ("int8", {"method": {"lora": {"dora": True}}}, "on which PEFT has no DoRA: remove dora"),
        ("int8", {"method": {"lora": {"initialization": "PiSSA"}}}, "PiSSA needs the weights before"),
        ("int8", {"method": {"lora": {}}, "output": {"merge": "Original"}}, "remove output.merge, or use the model"),
        ("fp8", {"method": {"qlora": {"initialization": "LoftQ"}}}, "LoftQ needs the weights before"),
    ],
    ids=str,
)
def test_what_a_quantised_base_does_not_allow_is_refused(
    bench: Workbench, bases: Callable[[str], Path], kind: str, spec: dict[str, Any], message: str
) -> None:
    ran = run(bench, bases(kind), "validate", **spec)
    assert (ran.code, ran.result.reason) == (2, "InvalidSpec")
    assert message in ran.result.message


def test_memory_follows_the_bits_of_the_base(bench: Workbench, bases: Callable[[str], Path]) -> None:
    def weights(kind: str, method: str) -> int:
        spec = {"method": {method: {}}, "resources": {"gpus": 1}, "hyperparameters": HYPER}
        ran = run(bench, bases(kind), "validate", **spec)
        assert ran.code == 0, ran.result.message
        assert ran.result.preflight is not None
        assert ran.result.preflight.peak_parts is not None
        return ran.result.preflight.peak_parts.weights_bytes

    assert weights("nf4", "qlora") == weights("llama", "qlora")
    linear = (weights("llama", "lora") - weights("nf4", "qlora")) / (2 - 0.516)
    assert weights("int8", "lora") == pytest.approx(weights("llama", "lora") - linear, rel=1e-6)
    assert weights("fp8", "lora") == weights("llama", "lora")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
        ({"load_in_4bit": True}, "fp4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"),
        ({"quant_method": "bitsandbytes"}, None),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "gptq", "bits": 4}, None),
        ({"quant_method": "awq"}, None),
        ({"quant_method": "compressed-tensors"}, None),
        ({"quant_method": "fbgemm_fp8"}, None),
        ({"quant_method": ["fp8"]}, None),
    ],
    ids=str,
)
def test_the_quantisation_of_a_config(settings: dict[str, Any], expected: str | None) -> None:
    found = of_settings(settings)
    assert (None if found is None else found.type) == expected


@pytest.mark.parametrize(
    ("card", "remedy"),
    [
        ("---\nlicense: mit\nbase_model: Qwen/Qwen2.5-7B-Instruct\n---\n", "use Qwen/Qwen2.5-7B-Instruct, from which"),
        ("---\nbase_model:\n- Qwen/Qwen3-8B\nbase_model_relation: quantized\n---\n", "use Qwen/Qwen3-8B, from which"),
        ("", "use the model that it was quantised from"),
        ("base_model: ../../etc", "use the model that it was quantised from"),
    ],
)
def test_the_refusal_names_the_model_to_use(card: str, remedy: str) -> None:
    assert remedy in quantized_conversion({"quant_method": "gptq"}, "hf://some/model", card)
