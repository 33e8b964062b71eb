from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.trainer.methods_rig import PROMPTS, distance, plan, rows_of, spec_of, try_method
from tests.trainer.trainer_rig import chat_row, chat_rows, write_rows
from tunesmith.api.conditions import FailureReason
from tunesmith.contracts.artifact import ArtifactManifest
from tunesmith.contracts.parity import Parity
from tunesmith_trainer.base_model.layers import layers_of
from tunesmith_trainer.base_model.logits import last_logits
from tunesmith_trainer.base_model.model import load_model
from tunesmith_trainer.errors import InvalidSpecError, NotServableError, SelfCheckError
from tunesmith_trainer.methods.full import unfreeze
from tunesmith_trainer.methods.wrap import wrap

if TYPE_CHECKING:
    from pathlib import Path

    from tests.trainer.trainer_rig import Workbench

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
_UNSERVABLE = {"dora": "the adapter uses DoRA", "lm_head": "remove modulesToSave"}


def reload(base: Path, folder: Path) -> list[torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return last_logits(PeftModel.from_pretrained(model, folder), PROMPTS)


@pytest.mark.parametrize("name", _VARIANTS)
def test_lora_variants_reload_identically_in_plain_peft(base_model: Path, tmp_path: Path, name: str) -> None:
    fields, parameters = _VARIANTS[name]
    trial = try_method({"lora": {"rank": 4, "alpha": 8, **fields}}, base_model, tmp_path / "adapter")
    head = int(AutoModelForCausalLM.from_pretrained(base_model).lm_head.weight.numel()) if name == "lm_head" else 0
    assert trial.planned.parameters == parameters + head
    assert trial.losses[-1] < trial.losses[0]
    assert distance(trial.logits, trial.base_logits) > 1e-2
    assert distance(reload(base_model, tmp_path / "adapter"), trial.logits) < 2e-5
    # Without its adapter the trained model equals the published base, whatever the initialisation did to it.
    with trial.model.disable_adapter():
        assert distance(last_logits(trial.model, PROMPTS), trial.base_logits) < 2e-5
    assert distance(last_logits(trial.model, PROMPTS), trial.logits) == 0
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


@pytest.mark.parametrize("initialization", ["Gaussian", "EVA", "LoftQ"])
def test_qlora_is_initialised_as_requested(base_model: Path, tmp_path: Path, initialization: str) -> None:
    method = {"qlora": {"rank": 4, "alpha": 8, "initialization": initialization}}
    trial = try_method(method, base_model, tmp_path / "adapter")
    assert trial.losses[-1] < trial.losses[0]
    assert trial.servable.vllm


def test_loftq_starts_closer_to_the_base_than_4_bits(base_model: Path, tmp_path: Path) -> None:
    losses = {}
    for initialization in ("Default", "LoftQ"):
        method = {"qlora": {"rank": 16, "initialization": initialization}}
        trial = try_method(method, base_model, tmp_path / initialization, steps=0)
        whole = last_logits(AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32), PROMPTS)
        losses[initialization] = distance(trial.logits, whole)
        # Untrained, it changes nothing on the published base.
        assert distance(reload(base_model, tmp_path / initialization), whole) < 2e-5
    assert losses["LoftQ"] < 0.9 * losses["Default"]
    with pytest.raises(InvalidSpecError, match="fits the published base, not the quantised one: use Original"):
        plan({"qlora": {"initialization": "LoftQ"}}, base_model, output={"merge": "Dequantized"})


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
        "v_proj is held quantised and cannot be trained whole",
    ),
    "odd pattern": (
        {"lora": {"rank": 4, "initialization": "Orthogonal", "rankPattern": {"q_proj": 3}}},
        "Orthogonal needs even ranks",
    ),
    "rank of the base": (
        {"lora": {"rank": 64, "initialization": "PiSSA"}},
        "needs rank 64 of model.layers.0.self_attn.k_proj",
    ),
    "rank of LoRA-GA": ({"lora": {"rank": 20, "initialization": "LoRAGA"}}, "lower rank to at most 16"),
}


@pytest.mark.parametrize("name", _REFUSED)
def test_specs_that_do_not_fit_the_base_are_refused_without_weights(base_model: Path, name: str) -> None:
    method, expected = _REFUSED[name]
    with pytest.raises(InvalidSpecError) as error:
        plan(method, base_model)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({"lora": {"dora": True, "initialization": "PiSSA"}}, "dora supports initialization Default"),
        ({"lora": {"rank": 3, "initialization": "Orthogonal"}}, "needs an even rank"),
        ({"lora": {"initialization": "LoftQ"}}, "compensates for quantization: use it with method.qlora"),
        (
            {"qlora": {"initialization": "PiSSA"}},
            "the others need unquantized weights: use them with method.lora",
        ),
    ],
)
def test_impossible_combinations_are_refused_by_the_manifest(
    base_model: Path, method: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValidationError, match=expected):
        plan(method, base_model)


def test_servable_required_is_checked_before_training(base_model: Path) -> None:
    with pytest.raises(NotServableError, match="vLLM does not support that: remove dora"):
        plan({"lora": {"dora": True}}, base_model, servable="Required")
    assert not plan({"lora": {"dora": True}}, base_model).servable.vllm
    assert plan({"lora": {"rsLora": True}}, base_model, servable="Required").servable.vllm


_OTHERS: dict[str, tuple[dict[str, Any], int]] = {
    # 2 layers of (rank × (in + out) + rank) in q and v
    "adaLora": (
        {"adaLora": {"initialRank": 6, "targetRank": 3, "targetModules": ["q_proj", "v_proj"]}},
        2 * 6 * (128 + 1 + 96 + 1),
    ),
    # outputs of k and v, inputs of down
    "ia3": ({"ia3": {}}, 2 * (32 + 32 + 128)),
    "ia3 of one module": ({"ia3": {"targetModules": ["q_proj"]}}, 2 * 64),
    # keys and values of 2 layers with 2 heads of 16
    "prefixTuning": ({"prefixTuning": {"virtualTokens": 8}}, 8 * 2 * 2 * 32),
    "promptTuning": ({"promptTuning": {"virtualTokens": 8}}, 8 * 64),
    "promptTuning as text": ({"promptTuning": {"virtualTokens": 8, "initialText": "the colour of doors"}}, 8 * 64),
    "pTuning": ({"pTuning": {"virtualTokens": 8}}, 8 * 64 + 3 * (64 * 64 + 64)),
    "peft VERA": ({"peft": {"type": "VERA", "config": {"r": 16, "target_modules": ["q_proj"]}}}, 2 * (16 + 64)),
    "peft LN_TUNING": ({"peft": {"type": "ln-tuning"}}, 5 * 64),
    "peft SHADOW": ({"peft": {"type": "SHADOW", "config": {"r": 4}}}, 0),
    "qlora's base under IA3": ({"ia3": {"quantization": {}}}, 2 * (32 + 32 + 128)),
}


@pytest.mark.parametrize("name", _OTHERS)
def test_other_methods_train_and_reload(base_model: Path, tmp_path: Path, name: str) -> None:
    method, parameters = _OTHERS[name]
    trial = try_method(method, base_model, tmp_path / "adapter")
    assert parameters in (0, trial.planned.parameters)
    assert trial.losses[-1] < trial.losses[0]
    assert not trial.servable.vllm
    assert "use method.lora" in (trial.servable.reason or "")
    if "quantization" not in str(method):
        assert distance(reload(base_model, tmp_path / "adapter"), trial.logits) < 2e-5
    config = (tmp_path / "adapter/adapter_config.json").read_text()
    assert "the colour of doors" not in config
    assert json.loads(config).get("tokenizer_name_or_path") is None
    with trial.model.disable_adapter():
        assert distance(last_logits(trial.model, PROMPTS), trial.base_logits) < 2e-5


_PEFT_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown method": ({"type": "VERRA"}, "PEFT has no method VERRA; did you mean VERA?"),
    "a method with fields": ({"type": "IA3"}, "use method.ia3"),
    "adapters in folders": ({"type": "XLORA"}, "it combines adapters in folders"),
    "several tasks": ({"type": "POLY"}, "the rows of a data set do not name their task"),
    "unknown key": ({"type": "VERA", "config": {"rr": 4}}, "VeraConfig has no field rr; did you mean r?"),
    "wrong type": ({"type": "VERA", "config": {"r": "4"}}, 'config.r is "4": input should be a valid integer'),
    "wrong value": ({"type": "OFT", "config": {"r": 4, "oft_block_size": 8}}, "method.peft.config: "),
    "a value for another base": (
        {"type": "C3A", "config": {"block_size": 7, "target_modules": ["q_proj"]}},
        "method peft C3A does not fit the base model: ",
    ),
    "unknown module": (
        {"type": "VERA", "config": {"target_modules": ["q_proj", "v_prj"]}},
        "no module named v_prj; did you mean v_proj?",
    ),
    "expression": (
        {"type": "VERA", "config": {"target_modules": ".*nothing"}},
        "no module of the base model has a name that matches",
    ),
    "a path": (
        {"type": "LORA", "config": {"corda_config": {"cache_file": "/etc/passwd"}}},
        "method.peft.config.corda_config.cache_file names files or code, which a job cannot use",
    ),
    "a core": ({"type": "LORA", "config": {"megatron_core": "os"}}, "megatron_core names files or code"),
    "a mapping": ({"type": "VERA", "config": {"auto_mapping": {"base_model_class": "x"}}}, "auto_mapping names files"),
    "another base": ({"type": "VERA", "config": {"base_model_name_or_path": "/x"}}, "base_model_name_or_path names"),
    "task": ({"type": "VERA", "config": {"task_type": "SEQ_CLS"}}, "task_type cannot be set, it is always CAUSAL_LM"),
    "LoRA that has a field": ({"type": "LORA", "config": {"use_dora": True}}, "use method.lora.dora"),
    "a beginning": (
        {"type": "LORA", "config": {"init_lora_weights": "pissa_niter_4"}},
        "for 'pissa_niter_4' use method.lora.initialization: FastPiSSA",
    ),
    "no effect": ({"type": "LORA", "config": {"use_qalora": True}}, "it has no effect on a base"),
    "base cut for good": (
        {"type": "LORA", "config": {"kasa_config": {}}},
        "KaSA truncates the base's weights permanently",
    ),
    "not in 4 bits": (
        {"type": "LOHA", "quantization": {}},
        "LOHA cannot be trained on a base in 4 bits, it works on the weights themselves",
    ),
    "silently ignored in 4 bits": (
        {"type": "LORA", "config": {"use_bdlora": {"nblocks": 2}}, "quantization": {}},
        "config.use_bdlora cannot be used on a base in 4 bits, PEFT silently ignores it",
    ),
    "no gradient in 4 bits": ({"type": "UNILORA", "quantization": {}}, "no gradient reaches it"),
}


@pytest.mark.parametrize("name", _PEFT_REFUSED)
def test_a_peft_configuration_is_checked_without_weights(base_model: Path, name: str) -> None:
    fields, expected = _PEFT_REFUSED[name]
    with pytest.raises(InvalidSpecError) as error:
        plan({"peft": fields}, base_model)
    assert expected in str(error.value)


def test_merging_an_adapter_that_cannot_be_merged_is_refused(base_model: Path) -> None:
    with pytest.raises(InvalidSpecError, match="an adapter of promptTuning cannot be merged into the base's weights"):
        plan({"promptTuning": {}}, base_model, output={"merge": "Original"})
    assert plan({"adaLora": {}}, base_model, output={"merge": "Original"}).parameters


def test_default_learning_rates_depend_on_the_method(bench: Workbench) -> None:
    rates = {}
    for method in ({"lora": {}}, {"promptTuning": {}}, {"peft": {"type": "VERA"}}, {"peft": {"type": "BOFT"}}):
        ran = bench.run("validate", bench.job(method=method, hyperparameters={"maxSteps": 1}))
        assert ran.result.resolved is not None
        rates[str(method)] = ran.result.resolved.learning_rate
    assert list(rates.values()) == [2e-4, 1e-3, 1e-3, 1e-4]


def test_lora_plus_raises_the_learning_rate_of_b(bench: Workbench) -> None:
    moved = {}
    for ratio in (1.0, 16.0):
        method = {"lora": {"rank": 4, "alpha": 8, "loraPlusRatio": ratio, "targetModules": ["q_proj"]}}
        hyper = {"maxSteps": 1, "batchSize": 4, "learningRate": 1e-4, "warmupRatio": 0.0, "scheduler": "Constant"}
        output = bench.folder / f"ratio-{ratio:g}"
        ran = bench.run("train", bench.job(method=method, hyperparameters=hyper), output=str(output))
        assert ran.code == 0, ran.result.message
        tensors = load_file(output / "artifact/adapter_model.safetensors")
        # AdamW's first step equals the learning rate, and B begins at zero.
        moved[ratio] = max(float(tensor.abs().max()) for name, tensor in tensors.items() if ".lora_B." in name)
    assert moved[1.0] == pytest.approx(1e-4, rel=1e-2)
    assert moved[16.0] == pytest.approx(16e-4, rel=1e-2)


def test_ada_lora_removes_ranks_and_resumes(bench: Workbench) -> None:
    job = bench.job(
        method={"adaLora": {"initialRank": 6, "targetRank": 3, "targetModules": ["q_proj", "v_proj"]}},
        hyperparameters={"maxSteps": 8, "batchSize": 4},
    )
    job["spec"]["checkpoint"] = {"everySteps": 3}
    whole = bench.run("train", job)
    assert whole.code == 0, whole.result.message
    config = json.loads((bench.output / "artifact/adapter_config.json").read_text())
    kept = [sum(ranks) for ranks in config["rank_pattern"].values()]
    assert sum(kept) == 3 * 4, "the mean rank of 2 modules in 2 layers"

    again = bench.folder / "again"
    shutil.copytree(bench.output / "checkpoints", again / "checkpoints")
    newest = max((again / "checkpoints").iterdir(), key=lambda folder: int(folder.name.rsplit("-", 1)[-1]))
    shutil.rmtree(newest)
    resumed = bench.run("train", job, output=str(again))
    assert resumed.code == 0, resumed.result.message
    assert resumed.result.resumed_from_step == 6
    assert resumed.result.artifact is not None
    assert whole.result.artifact is not None
    assert resumed.result.artifact.digest == whole.result.artifact.digest


def test_full_fine_tuning_produces_a_model(bench: Workbench, base_model: Path) -> None:
    job = bench.job(method={"full": {}}, hyperparameters={"maxSteps": 4, "batchSize": 4, "learningRate": 1e-3})
    ran = bench.run("train", job)
    assert ran.code == 0, ran.result.message
    base = AutoModelForCausalLM.from_pretrained(base_model)
    assert ran.result.preflight is not None
    assert ran.result.preflight.trainable_parameters == base.num_parameters()
    evaluation, artifact = ran.result.evaluation, ran.result.artifact
    assert evaluation is not None
    assert evaluation.base_loss is not None
    assert evaluation.loss is not None
    assert evaluation.loss < evaluation.base_loss
    assert artifact is not None
    assert not artifact.servable.vllm
    assert "baseModel of a ServingPool" in (artifact.servable.reason or "")
    folder = bench.output / "artifact"
    assert not (folder / "adapter_config.json").exists()
    trained = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    parity = Parity.model_validate_json((folder / "parity.json").read_text())
    probe = parity.probes[0]
    ids = torch.tensor([[*probe.prompt_token_ids, *probe.answer_token_ids]])
    for model, positions in ((base, probe.base), (trained, probe.adapter)):
        with torch.no_grad():
            scores = torch.log_softmax(model(input_ids=ids).logits[0, len(probe.prompt_token_ids) - 1 : -1], dim=-1)
        for row, token, position in zip(scores, probe.answer_token_ids, positions, strict=True):
            assert position.chosen == pytest.approx(float(row[token]), abs=1e-4)


def test_full_fine_tuning_starts_from_the_stored_weights(base_model: Path) -> None:
    """If they were first rounded to the type of the products, they would differ from those of sharded training."""
    base = load_model(base_model, torch.device("cpu"), None, torch.bfloat16, as_stored=True)
    assert base.config.dtype is torch.bfloat16
    stored = load_file(base_model / "model.safetensors")
    begun = dict(unfreeze(base).named_parameters())
    assert all(torch.equal(begun[name], tensor) for name, tensor in stored.items() if name in begun)
    assert {parameter.dtype for parameter in begun.values()} == {torch.float32}


def test_no_copies_are_kept_of_sharded_weights(base_model: Path) -> None:
    """In bfloat16 the products use copies of the weights, which must be freed with the gathered weights."""
    spec = spec_of({"full": {}})
    base = load_model(base_model, torch.device("cpu"), None, torch.bfloat16, as_stored=True)
    wrap(base, plan({"full": {}}, base_model), rows_of(base.config.vocab_size), spec.method, 1, lambda: None)
    head = base.get_output_embeddings()
    copies: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() == head.weight.numel():
            copies.append(tensor)
        return tensor

    try:
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            for _ in range(2):
                head(torch.ones(1, 64, requires_grad=True))
    finally:
        torch.set_autocast_cache_enabled(True)
    first, second = copies
    assert first.dtype is torch.bfloat16
    assert first.data_ptr() != second.data_ptr()


def test_full_fine_tuning_scores_the_original_base(bench: Workbench) -> None:
    """The base's generated answers are requested after training."""
    generation = {"dataset": {"uri": f"file://{write_rows(bench.folder / 'asked.jsonl', chat_rows(4))}"}}
    suites = [{"name": "doors", "generation": {**generation, "metric": "ChrF", "maxNewTokens": 8}}]
    scores = {}
    for name, method in (("full", {"full": {}}), ("lora", {"lora": {"rank": 4}})):
        hyper = {"maxSteps": 3, "batchSize": 4, "learningRate": 1e-3}
        job = bench.job(method=method, hyperparameters=hyper, evaluation={"suites": suites})
        ran = bench.run("train", job, output=str(bench.folder / name))
        assert ran.code == 0, ran.result.message
        assert ran.result.evaluation is not None
        scores[name] = next(score.base for score in ran.result.evaluation.scores or [] if score.suite == "doors")
    assert scores["full"] == scores["lora"]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"output": {"merge": "Original"}}, "makes no adapter to merge"),
        ({"objective": {"dpo": {}}}, "method.full supports the objectives sft and orpo only"),
        ({"servable": "Required"}, "serve its folder as the baseModel of a ServingPool"),
    ],
)
def test_full_fine_tuning_refuses_incompatible_settings(base_model: Path, spec: dict[str, Any], expected: str) -> None:
    with pytest.raises((InvalidSpecError, NotServableError, ValidationError), match=expected):
        plan({"full": {}}, base_model, **spec)


def test_servable_required_fails_the_validation(bench: Workbench) -> None:
    ran = bench.run("validate", bench.job(method={"lora": {"dora": True}}, servable="Required"))
    assert (ran.code, ran.result.reason) == (2, FailureReason.NOT_SERVABLE)
    preflight = bench.run("validate", bench.job(method={"lora": {"dora": True}})).result.preflight
    assert preflight is not None
    assert preflight.servable is not None
    assert not preflight.servable.vllm


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"parameters": 1}, "trainable parameters where 1 are expected"),
        ({"ranks": 5}, "has rank 4 and scale 2 where 5 and 1.6 are expected"),
        ({"init_lora_weights": False}, "the untrained adapter changes the base's loss"),
    ],
)
def test_an_adapter_that_differs_from_the_plan_fails_the_job(
    base_model: Path, change: dict[str, Any], expected: str
) -> None:
    method = {"lora": {"rank": 4, "alpha": 8}}
    planned = plan(method, base_model)
    if "parameters" in change:
        planned = replace(planned, parameters=change["parameters"])
    elif "ranks" in change:
        planned = replace(planned, ranks=dict.fromkeys(planned.ranks, change["ranks"]))
    else:
        config = copy.deepcopy(planned.config)
        for name, value in change.items():
            setattr(config, name, value)
        planned = replace(planned, config=config)
    base = load_model(base_model, torch.device("cpu"), None, torch.float32)
    torch.manual_seed(0)
    with pytest.raises(SelfCheckError, match=expected):
        wrap(base, planned, rows_of(base.config.vocab_size), spec_of(method).method, 3)


@pytest.fixture(scope="module")
def half_base(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> Path:
    """Create a base in bfloat16, like most published ones."""
    folder = tmp_path_factory.mktemp("half") / "base"
    shutil.copytree(base_model, folder)
    AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "method",
    [
        {"lora": {"rank": 4, "initialization": "PiSSA"}},
        {"lora": {"rank": 4, "modulesToSave": ["lm_head"]}},
        {"adaLora": {}},
        {"peft": {"type": "LN_TUNING"}},
        {"full": {}},
    ],
    ids=lambda method: next(iter(method)),
)
def test_a_base_in_bfloat16(bench: Workbench, half_base: Path, method: dict[str, Any]) -> None:
    """Trained weights are in float32, frozen ones are not."""
    hyper = {"maxSteps": 3, "batchSize": 4, "precision": "bfloat16"}
    ran = bench.run("train", bench.job(method=method, hyperparameters=hyper, baseModel={"uri": f"file://{half_base}"}))
    assert ran.code == 0, ran.result.message
    manifest = ArtifactManifest.model_validate_json((bench.output / "artifact/tunesmith.json").read_bytes())
    assert manifest.adapter.relative_logit_error is not None
    assert manifest.adapter.relative_logit_error < 0.02


@pytest.mark.parametrize(
    "method",
    [
        {"qlora": {"rank": 4, "modulesToSave": ["lm_head"]}},
        pytest.param({"qlora": {"rank": 4, "dora": True, "dropout": 0.1}}, marks=pytest.mark.long),
        pytest.param(
            {"peft": {"type": "TRAINABLE_TOKENS", "config": {"token_indices": [1]}, "quantization": {}}},
            marks=pytest.mark.long,
        ),
    ],
    ids=str,
)
def test_a_base_in_4_bits_and_bfloat16_is_trained_and_resumes(
    bench: Workbench, half_base: Path, method: dict[str, Any]
) -> None:
    hyper = {"maxSteps": 4, "batchSize": 4, "precision": "bfloat16", "learningRate": 0.01}
    job = bench.job(method=method, hyperparameters=hyper, baseModel={"uri": f"file://{half_base}"})
    job["spec"]["checkpoint"] = {"everySteps": 2}
    whole = bench.run("train", job)
    assert whole.code == 0, whole.result.message
    assert whole.result.evaluation is not None
    assert (whole.result.evaluation.loss_reduction_percent or 0) > 0
    again = bench.folder / "again"
    shutil.copytree(bench.output / "checkpoints", again / "checkpoints")
    newest = max((again / "checkpoints").iterdir(), key=lambda folder: int(folder.name.rsplit("-", 1)[-1]))
    shutil.rmtree(newest)
    resumed = bench.run("train", job, output=str(again))
    assert (resumed.code, resumed.result.resumed_from_step) == (0, 2)
    assert resumed.result.artifact is not None
    assert whole.result.artifact is not None
    assert resumed.result.artifact.digest == whole.result.artifact.digest


@pytest.fixture(scope="module")
def tied_base(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> Path:
    """Create a base whose embedding is also its output layer."""
    folder = tmp_path_factory.mktemp("tied") / "base"
    shutil.copytree(base_model, folder)
    config = AutoConfig.from_pretrained(base_model, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("fields", "precision", "expected"),
    [
        ({}, torch.bfloat16, torch.bfloat16),
        ({"dropout": 0.1}, torch.bfloat16, torch.bfloat16),
        ({"dora": True}, torch.bfloat16, torch.bfloat16),
        ({"initialization": "LoftQ"}, torch.bfloat16, torch.bfloat16),
        ({"modulesToSave": ["lm_head"]}, torch.bfloat16, torch.bfloat16),
        ({}, torch.float32, torch.float32),
        ({"quantization": {"computeType": "float32"}}, torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_unquantised_weights_of_a_4_bit_base_have_the_type_of_the_products(
    tied_base: Path, fields: dict[str, Any], precision: torch.dtype, expected: torch.dtype
) -> None:
    """Embedding, output layer and norms, and the outputs of the layers."""
    method = {"qlora": {"rank": 4, **fields}}
    spec = spec_of(method)
    base = load_model(tied_base, torch.device("cpu"), spec.method.quantization, precision)
    model = wrap(base, plan(method, tied_base), rows_of(base.config.vocab_size), spec.method, 3)
    passed = []
    for layer in layers_of(base):
        layer.register_forward_hook(lambda _, __, states: passed.append(states.dtype))
    last_logits(model, PROMPTS[:1])
    assert passed == [expected, expected]
    floating = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    assert {parameter.dtype for parameter in floating if not parameter.requires_grad} == {expected}
    assert {parameter.dtype for parameter in floating if parameter.requires_grad} == {torch.float32}
    embedding, output = base.get_input_embeddings(), base.get_output_embeddings()
    assert getattr(output, "original_module", output).weight is embedding.weight


def test_a_token_in_one_row_is_learned_and_one_in_none_is_refused(bench: Workbench) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bench.base)
    rare, absent = tokenizer.convert_tokens_to_ids("Z"), tokenizer.convert_tokens_to_ids("X")

    def job(*tokens: int) -> dict[str, Any]:
        method = {"peft": {"type": "TRAINABLE_TOKENS", "config": {"token_indices": list(tokens)}}}
        hyper = {"epochs": 1, "batchSize": 4, "warmupRatio": 0.0, "scheduler": "Constant"}
        # The longest rows come first, so the first step does not contain the rare token.
        return bench.job([*chat_rows(23), chat_row("Z", "It")], method=method, hyperparameters=hyper)

    refused = bench.run("validate", job(rare, absent))
    assert refused.code == 2
    assert refused.result.message == (
        f"method.peft.config.token_indices has {absent}, which no training row contains: remove these token ids, or "
        "add rows that contain them"
    )
    ran = bench.run("train", job(rare))
    assert ran.code == 0, ran.result.message
    base = AutoModelForCausalLM.from_pretrained(bench.base).get_input_embeddings().weight[rare]
    (learned,) = load_file(bench.output / "artifact/adapter_model.safetensors").values()
    assert learned.shape == (1, 64)
    assert distance([learned[0]], [base]) > 0.01
