from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tunesmith.api.finetunejob import FineTuneJob
from tunesmith.api.manifest import parse_manifest
from tunesmith.api.method import METHODS as DECLARED
from tunesmith.api.method import Method
from tunesmith.api.schema import resolved_schema
from tunesmith.cli.main import main
from tunesmith.contracts.adapterconfig import adapter_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Import = Callable[..., tuple[int, str, str]]

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
    ("change", "arguments", "code", "message"),
    [
        ({}, (), 0, ""),
        ({"layers_to_transform": [1, 2]}, (), 0, "layers_to_transform: [1, 2] has no counterpart"),
        ({"layers_to_transform": [1, 2]}, ("--strict",), 1, "1 keys have no counterpart: layers_to_transform"),
        ({"task_type": "SEQ_CLS"}, (), 2, "task_type is SEQ_CLS: a FineTuneJob trains causal language models only"),
        ({"base_model_name_or_path": "bloom"}, (), 2, "bloom, without an organisation: write organisation/bloom"),
        ({"peft_type": None}, (), 2, "peft_type is missing"),
        ({"r": 4096}, (), 1, "spec.method.lora.rank is 4096: it must be at most 512"),
        (
            {"init_lora_weights": False},
            ("--strict",),
            1,
            "not with random weights; method.peft with type LORA accepts init_lora_weights: false",
        ),
        ({"layers_to_transform": 0}, (), 0, "layers_to_transform: 0 has no counterpart"),
        ({"use_qalora": False, "lora_bias": False}, ("--strict",), 0, ""),
    ],
)
def test_import_peft(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(CONFIG | change))
    monkeypatch.setattr(sys, "argv", ["tunesmith", "import", "peft", str(file), "--data", "s3://b/t.jsonl", *arguments])
    with pytest.raises(SystemExit) as exited:
        main()
    printed = capsys.readouterr()
    assert (exited.value.code or 0) == code
    assert message in printed.err
    if code == 0:
        job = parse_manifest(printed.out)
        assert job.spec.base_model.uri == "hf://org/base"
        assert job.spec.method.lora is not None
        assert (job.spec.method.lora.rank, job.spec.method.lora.alpha, job.spec.method.lora.dropout) == (8, 16, 0.1)


MLX = {
    "fine_tune_type": "lora",
    "model": "mlx-community/tiny-4bit",
    "lora_parameters": {"rank": 8, "scale": 2.0, "dropout": 0.1, "keys": ["self_attn.q_proj"]},
}
OLDEST = CONFIG | {"merge_weights": False, "enable_lora": None}


@pytest.mark.parametrize(
    ("config", "arguments", "problem"),
    [
        (MLX, ("--base", "hf://org/base"), ""),
        (MLX, (), "add --base with the model that MLX LM converted"),
        (MLX | {"fine_tune_type": "dora"}, ("--base", "hf://org/base"), "MLX LM trained it with DoRA"),
        (OLDEST, ("--strict",), ""),
        ({**CONFIG, "base_model_name_or_path": None}, ("--base", "hf://org/base"), ""),
    ],
)
def test_import_peft_reads_the_layouts_that_adapters_are_imported_from(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    config: dict[str, Any],
    arguments: tuple[str, ...],
    problem: str,
) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(config))
    monkeypatch.setattr(sys, "argv", ["tunesmith", "import", "peft", str(file), "--data", "s3://b/t.jsonl", *arguments])
    with pytest.raises(SystemExit) as exited:
        main()
    printed = capsys.readouterr()
    assert problem in printed.err
    assert bool(exited.value.code) is bool(problem)
    if problem:
        return
    job = parse_manifest(printed.out)
    assert job.spec.base_model.uri == "hf://org/base"
    assert job.spec.method.lora is not None
    assert (job.spec.method.lora.rank, job.spec.method.lora.alpha, job.spec.method.lora.dropout) == (8, 16, 0.1)


@pytest.mark.parametrize(
    ("pattern", "method"),
    [
        (r".*\.(q|v)_proj", {"lora": {"rank": 8, "targetModules": ["q_proj", "v_proj"]}}),
        (r".*\.c_attn$", {"lora": {"rank": 8, "targetModules": ["c_attn"]}}),
        (
            r".*language_model.*(q|v)_proj",
            {"peft": {"type": "LORA", "config": {"r": 8, "target_modules": r".*language_model.*(q|v)_proj"}}},
        ),
        (r".*_proj", {"peft": {"type": "LORA", "config": {"r": 8, "target_modules": ".*_proj"}}}),
    ],
)
def test_a_pattern_of_modules_is_kept(pattern: str, method: dict[str, Any]) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 8, "target_modules": pattern}
    found = adapter_of(config)
    assert found.omitted == {}
    assert found.method == method


def test_names_from_before_the_hub_had_organisations() -> None:
    config = {"peft_type": "PREFIX_TUNING", "base_model_name_or_path": "gpt2", "task_type": "CAUSAL_LM"}
    found = adapter_of(config)
    assert found.base == {"uri": "hf://openai-community/gpt2"}
    assert found.changed == {"base_model_name_or_path": "the model gpt2 is now openai-community/gpt2"}


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
    "LoRA that begins as MiCA": (
        {"peft_type": "LORA", "init_lora_weights": "mica"},
        {"lora": {"initialization": "MiCA"}},
    ),
    "LoRA that begins as FastPiSSA": (
        {"peft_type": "LORA", "init_lora_weights": "pissa_niter_4"},
        {"lora": {"initialization": "FastPiSSA"}},
    ),
    "LoRA that begins as LoftQ": (
        {"peft_type": "LORA", "init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 5}, "r": 8},
        {"qlora": {"rank": 8, "initialization": "LoftQ"}},
    ),
    "AdaLoRA": (
        {"peft_type": "ADALORA", "init_r": 12, "target_r": 8, "lora_alpha": 32, "deltaT": 10, "rank_pattern": {"a": 1}}
        | {"tinit": 0, "tfinal": 0},
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
    "any other, with what is on by default switched off": (
        {"peft_type": "VERA", "init_weights": False, "save_projection": False, "fan_in_fan_out": False},
        {"peft": {"type": "VERA", "config": {"init_weights": False, "save_projection": False}}},
    ),
    "any other, with a zero": (
        {"peft_type": "SHADOW", "shadow_dropout": 0.0},
        {"peft": {"type": "SHADOW", "config": {"shadow_dropout": 0.0}}},
    ),
}


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Import:
    def run(config: dict[str, Any], *arguments: str) -> tuple[int, str, str]:
        file = tmp_path / "adapter_config.json"
        file.write_text(json.dumps({"base_model_name_or_path": "org/base", "inference_mode": True} | config))
        command = ["tunesmith", "import", "peft", str(file), "--data", "s3://b/t.jsonl", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as exited:
            main()
        printed = capsys.readouterr()
        return int(exited.value.code or 0), printed.out, printed.err

    return run


@pytest.mark.parametrize("name", METHODS)
def test_every_kind_of_adapter_becomes_a_method(imported: Import, name: str) -> None:
    config, expected = METHODS[name]
    code, out, err = imported(config, "--strict")
    assert code == 0, err
    assert parse_manifest(out).spec.method.manifest() == Method.model_validate(expected).manifest()


IMPORTED = [
    name
    for name, fields in DECLARED.items()
    if fields.declared is not None and fields.declared.peft_type is not None and name != "qlora"
]


def other_than_default(schema: dict[str, Any]) -> Any:
    """A value of a field that is not its default."""
    if "enum" in schema:
        return next(value for value in schema["enum"] if value != schema.get("default"))
    match schema["type"]:
        case "array":
            return ["a_proj", "b_proj"]
        case "object":
            return {"a_proj": 7}
        case "integer":
            return schema.get("default", 1) + 1
        case "number":
            return schema.get("default", 0.0) + 0.125
        case "boolean":
            return not schema.get("default", False)
        case _:
            return "a text"


@pytest.mark.parametrize("name", IMPORTED)
def test_every_field_of_every_method_is_imported_from_pefts_key(name: str) -> None:
    model = DECLARED[name]
    assert model.declared is not None
    properties = resolved_schema(FineTuneJob)["properties"]["spec"]["properties"]["method"]["properties"][name][
        "properties"
    ]
    aliases = {attribute: str(model.model_fields[attribute].alias) for attribute in model.peft_names}
    fields = {alias: other_than_default(properties[alias]) for alias in aliases.values()}
    config: dict[str, Any] = {"peft_type": model.declared.peft_type, "base_model_name_or_path": "org/base"}
    for attribute, peft in model.peft_names.items():
        config[peft.key] = peft.peft_value(fields[aliases[attribute]])
    found = adapter_of(config)
    assert found.method == {name: fields}
    assert found.omitted == {}


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (
            {"init_lora_weights": "pissa_niter_4"},
            0,
            "init_lora_weights: initialization FastPiSSA uses Tunesmith's number of iterations\n",
        ),
        (
            {"init_lora_weights": "loftq"},
            0,
            "init_lora_weights: method.qlora holds the base in 4 bits, and LoftQ compensates for the quant",
        ),
        ({"init_lora_weights": "mica"}, 0, ""),
        ({"init_lora_weights": "mica", "use_dora": True}, 1, "dora supports initialization Default, Gaussian"),
        (
            {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 8}},
            0,
            '{"loftq_bits": 8} has no counterpart and is omitted: method.qlora holds the base in 4 bits, not in 8\n',
        ),
        (
            {"peft_type": "IA3", "init_ia3_weights": False},
            0,
            "init_ia3_weights: false has no counterpart and is omitted: a new adapter starts without an effect",
        ),
        (
            {"peft_type": "ADALORA", "init_lora_weights": "gaussian"},
            0,
            'init_lora_weights: "gaussian" has no counterpart and is omitted\n',
        ),
        ({"init_lora_weights": "of my own"}, 0, 'init_lora_weights: "of my own" has no counterpart and is omitted\n'),
    ],
)
def test_initializations_of_an_adapter(imported: Import, change: dict[str, Any], code: int, message: str) -> None:
    exit_code, out, err = imported({"peft_type": "LORA"} | change)
    assert exit_code == code
    assert message in err
    assert bool(err) == bool(message)
    assert bool(out) == (code == 0)


@pytest.mark.parametrize("kind", ["LORA", "VERA"])
def test_the_revision_of_the_base(imported: Import, kind: str) -> None:
    code, out, err = imported({"peft_type": kind, "revision": "v2"}, "--strict")
    assert (code, err) == (0, "")
    spec = parse_manifest(out).spec
    assert (spec.base_model.uri, spec.base_model.revision) == ("hf://org/base", "v2")
    assert spec.method.peft is None or spec.method.peft.config == {}


def test_a_folder_has_no_revision(imported: Import) -> None:
    code, out, err = imported({"peft_type": "LORA", "base_model_name_or_path": "/models/mine", "revision": "v2"})
    assert code == 0
    base = parse_manifest(out).spec.base_model
    assert (base.uri, base.revision) == ("file:///models/mine", None)
    assert (
        'revision: "v2" has no counterpart and is omitted: a folder has no revisions; set baseModel.uri to an hf://'
        in err
    )
