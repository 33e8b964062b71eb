"""Axolotl configurations, each reduced to what tells its kind; names as in axolotl-ai-cloud/axolotl, examples/."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tunesmith.api.finetunejob import FineTuneJob
from tunesmith.api.manifest import parse_manifest
from tunesmith.api.methods.full import FullFields
from tunesmith.api.schema import resolved_schema
from tunesmith.cli.axolotl import translate
from tunesmith.cli.axolotl_keys import axolotl_keys
from tunesmith.cli.main import main
from tunesmith.cli.translation import UntranslatableError

if TYPE_CHECKING:
    from collections.abc import Callable

    Import = Callable[..., tuple[int, str, str]]

PAGE = Path(__file__).resolve().parents[2] / "docs/how-to/import.md"


@dataclass(frozen=True)
class Kind:
    """A configuration, what its FineTuneJob holds at least, and the keys that are told."""

    text: str
    spec: dict[str, Any]
    omitted: frozenset[str] = frozenset()
    changed: frozenset[str] = frozenset()


KINDS = {
    "llama-3/qlora-1b.yml": Kind(
        """
        base_model: org/base-1b
        load_in_8bit: false
        load_in_4bit: true
        datasets:
          - {path: org/instructions, type: alpaca}
        dataset_prepared_path: prepared
        val_set_size: 0.1
        output_dir: ./out
        adapter: qlora
        lora_model_dir:
        sequence_len: 2048
        sample_packing: true
        eval_sample_packing: true
        lora_r: 32
        lora_alpha: 16
        lora_dropout: 0.05
        lora_target_modules: [q_proj, v_proj]
        wandb_project:
        gradient_accumulation_steps: 4
        micro_batch_size: 2
        num_epochs: 1
        optimizer: adamw_bnb_8bit
        lr_scheduler: cosine
        learning_rate: 0.0002
        bf16: auto
        tf32: false
        gradient_checkpointing: true
        logging_steps: 1
        attn_implementation: flash_attention_2
        warmup_ratio: 0.1
        evals_per_epoch: 4
        eval_steps: 25
        weight_decay: 0.0
        special_tokens: {pad_token: "<|end|>"}
        """,
        {
            "baseModel": {"uri": "hf://org/base-1b"},
            "dataset": {
                "train": [{"uri": "hf://datasets/org/instructions", "weight": 1.0}],
                "format": "Instruction",
                "validationFraction": 0.1,
                "maxLength": 2048,
                "packing": True,
                "duplicates": "Keep",
            },
            "method": {"qlora": {"rank": 32, "alpha": 16, "dropout": 0.05, "targetModules": ["q_proj", "v_proj"]}},
            "hyperparameters": {
                "epochs": 1.0,
                "batchSize": 8,
                "microBatchSize": 2,
                "optimizer": "AdamW8bit",
                "scheduler": "Cosine",
                "learningRate": 2e-4,
                "warmupRatio": 0.1,
                "gradientCheckpointing": True,
            },
            "evaluation": {"everySteps": 25},
        },
        omitted=frozenset({"special_tokens", "evals_per_epoch"}),
        changed=frozenset({"datasets[0].type"}),
    ),
    "llama-3/instruct-lora-8b.yml": Kind(
        """
        base_model: org/chat-8b
        load_in_8bit: true
        chat_template: llama3
        datasets:
          - path: org/chats
            type: chat_template
            field_messages: turns
            message_field_role: role
            message_field_content: content
            roles: {user: [user], assistant: [assistant]}
        val_set_size: 0.05
        sequence_len: 4096
        adapter: lora
        lora_r: 32
        lora_alpha: 16
        lora_target_linear: true
        gradient_accumulation_steps: 4
        micro_batch_size: 2
        num_epochs: 4
        optimizer: adamw_torch
        learning_rate: 0.0002
        train_on_inputs: false
        warmup_steps: 10
        deepspeed:
        """,
        {
            "dataset": {
                "train": [{"uri": "hf://datasets/org/chats", "weight": 1.0}],
                "format": "Messages",
                "columns": {"messages": "turns"},
            },
            "method": {"lora": {"rank": 32, "alpha": 16, "targetModules": ["all-linear"]}},
            "hyperparameters": {"epochs": 4.0, "batchSize": 8, "optimizer": "AdamW", "warmupSteps": 10},
        },
        omitted=frozenset({"load_in_8bit", "chat_template"}),
    ),
    "gemma3/gemma-3-1b-qlora.yml": Kind(
        """
        base_model: org/small-it
        load_in_4bit: true
        chat_template: gemma3
        eot_tokens: [<end_of_turn>]
        datasets:
          - path: org/conversations
            type: chat_template
            field_messages: conversations
            message_property_mappings: {role: from, content: value}
        val_set_size: 0.0
        unfrozen_parameters: [^lm_head]
        adapter: qlora
        lora_r: 32
        lora_alpha: 16
        lora_target_linear: true
        micro_batch_size: 1
        gradient_accumulation_steps: 4
        num_epochs: 4
        gradient_checkpointing_kwargs: {use_reentrant: false}
        """,
        {
            "dataset": {
                "format": "Messages",
                "columns": {"messages": "conversations"},
                "validationFraction": 0.001,
                "maxLength": 512,
            },
            "hyperparameters": {"batchSize": 4, "microBatchSize": 1},
        },
        omitted=frozenset({"chat_template", "eot_tokens", "unfrozen_parameters"}),
    ),
    "gemma3/gemma-3-4b-vision-qlora.yml": Kind(
        """
        base_model: org/vision
        processor_type: AutoProcessor
        load_in_4bit: true
        datasets:
          - {path: org/images, type: chat_template, split: "train[:1%]", field_messages: messages}
        val_set_size: 0.01
        adapter: qlora
        lora_r: 32
        lora_alpha: 16
        lora_target_modules: 'layers.[\\d]+.(mlp|self_attn).(up|down)_proj'
        micro_batch_size: 2
        num_epochs: 1
        """,
        {
            "dataset": {
                "train": [{"uri": "hf://datasets/org/images", "weight": 0.01}],
                "format": "Messages",
                "validationFraction": 0.01,
            },
            "method": {"peft": {"config": {"r": 32}, "quantization": {"type": "nf4"}}},
        },
        omitted=frozenset({"processor_type"}),
        changed=frozenset({"datasets[0].split", "lora_target_modules"}),
    ),
    "llama-3/qlora-fsdp-70b.yaml": Kind(
        """
        base_model: org/large
        load_in_4bit: true
        datasets: [{path: org/instructions, type: alpaca}]
        val_set_size: 0.05
        adapter: qlora
        sequence_len: 512
        lora_r: 8
        lora_alpha: 16
        lora_target_linear: true
        gradient_accumulation_steps: 4
        micro_batch_size: 1
        num_epochs: 4
        learning_rate: 0.00001
        fsdp: [full_shard, auto_wrap]
        fsdp_config: {fsdp_offload_params: true}
        """,
        {"dataset": {"maxLength": 512}, "hyperparameters": {"learningRate": 1e-5}},
        omitted=frozenset({"fsdp", "fsdp_config"}),
        changed=frozenset({"datasets[0].type"}),
    ),
    "archived/openllama-3b/lora.yml": Kind(
        """
        base_model: org/open-3b
        load_in_8bit: true
        datasets: [{path: data/rows.jsonl, ds_type: json, type: completion, field: body}]
        val_set_size: 0.02
        adapter: lora
        lora_r: 8
        lora_alpha: 16
        micro_batch_size: 2
        max_steps: 200
        num_epochs: 4
        warmup_steps: 10
        cosine_min_lr_ratio: 0.1
        early_stopping_patience: 4
        bfloat16: false
        fp16: true
        """,
        {
            "dataset": {
                "train": [{"uri": "file://FOLDER/data/rows.jsonl", "weight": 1.0}],
                "format": "Text",
                "columns": {"text": "body"},
            },
            "hyperparameters": {
                "maxSteps": 200,
                "warmupSteps": 10,
                "minLearningRateRatio": 0.1,
                "batchSize": 2,
                "precision": "float16",
            },
            "evaluation": {"earlyStopping": {"patience": 4, "minDelta": 0.0}},
        },
        omitted=frozenset({"load_in_8bit"}),
    ),
    "llama-3/instruct-dpo-lora-8b.yml": Kind(
        """
        base_model: org/chat-8b
        rl: dpo
        dpo_beta: 0.2
        datasets:
          - path: org/pairs
            type: chat_template.default
            field_messages: conversation
            field_chosen: better
            field_rejected: rejected
            message_property_mappings: {role: role, content: content}
            roles: {user: [user]}
        val_set_size: 0.05
        sample_packing: false
        adapter: lora
        lora_r: 32
        lora_alpha: 16
        lora_target_linear: true
        num_epochs: 4
        flash_attention: true
        """,
        {
            "objective": {"dpo": {"beta": 0.2}},
            "dataset": {"format": "Preference", "columns": {"prompt": "conversation", "chosen": "better"}},
        },
        changed=frozenset({"datasets[0].type"}),
    ),
    "llama-3/qlora-1b-kto.yaml": Kind(
        """
        base_model: org/base-1b
        load_in_4bit: true
        rl: kto
        rl_beta: 0.5
        kto_desirable_weight: 0.2
        datasets: [{path: org/marked, type: llama3.ultra, split: train}]
        val_set_size: 0.1
        remove_unused_columns: false
        adapter: qlora
        lora_r: 32
        lora_alpha: 64
        lora_target_linear: true
        micro_batch_size: 2
        num_epochs: 1
        optimizer: adamw_8bit
        """,
        {
            "objective": {"kto": {"beta": 0.5, "desirableWeight": 0.2}},
            "dataset": {"format": "UnpairedPreference"},
            "hyperparameters": {"optimizer": "AdamW8bit"},
        },
        changed=frozenset({"datasets[0].type"}),
    ),
    "gemma2/reward-model.yaml, with trackers": Kind(
        """
        base_model: org/base-2b
        datasets: [{path: org/chats, type: chat_template}]
        val_set_size: 0.05
        adapter: lora
        use_tensorboard: true
        wandb_project: colours
        wandb_name: blue
        wandb_log_model: checkpoint
        use_mlflow: false
        mlflow_experiment_name: colours
        """,
        {"output": {"reporting": ["TensorBoard", "WandB"]}},
        omitted=frozenset({"wandb_log_model"}),
        changed=frozenset({"wandb_project", "wandb_name"}),
    ),
    "mistral/mistral-qlora-orpo.yml": Kind(
        """
        base_model: org/base-7b
        load_in_4bit: true
        rl: orpo
        orpo_alpha: 0.3
        chat_template: chatml
        datasets: [{path: org/pairs, type: orpo.chat_template}]
        val_set_size: 0.1
        adapter: qlora
        lora_r: 32
        lora_alpha: 16
        lora_target_linear: true
        num_epochs: 1
        """,
        {"objective": {"orpo": {"weight": 0.3}}, "dataset": {"format": "Preference"}},
        omitted=frozenset({"chat_template"}),
        changed=frozenset({"datasets[0].type"}),
    ),
    "llama-2/ia3.yml": Kind(
        """
        base_model: org/base-7b
        load_in_8bit: true
        datasets: [{path: org/instructions, type: alpaca}]
        val_set_size: 0.01
        adapter: ia3
        peft_target_modules: [k_proj, v_proj, down_proj]
        peft_feedforward_modules: [down_proj]
        num_epochs: 5
        bf16: true
        """,
        {"method": {"ia3": {"targetModules": ["k_proj", "v_proj", "down_proj"], "feedforwardModules": ["down_proj"]}}},
        omitted=frozenset({"load_in_8bit"}),
        changed=frozenset({"datasets[0].type"}),
    ),
}
CUSTOM = """
base_model: ./models/mine
datasets:
  - path: s3://bucket/one.jsonl
    type: {field_instruction: ask, field_output: answer, format: "Q: {instruction}"}
  - path: json
    data_files: [more/two.jsonl, more/three.jsonl]
    type: {field_instruction: ask, field_output: answer}
test_datasets:
  - path: org/held-out
    revision: v2
    data_files: rows.parquet
    type: {field_instruction: ask, field_output: answer}
adapter: lora
peft_use_dora: true
peft_init_lora_weights: eva
lora_r: 8
lora_alpha: 16
lora_layers_to_transform: [1, 2]
excess_length_strategy: truncate
dataset_exact_deduplication: true
chat_template: tokenizer_default
optimizer: muon
plugins: [axolotl.integrations.liger.LigerPlugin]
save_steps: 50
save_total_limit: 3
neftune_noise_alpha: 5
torch_compile: true
bf16: false
"""


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Import:
    def run(text: str, *arguments: str) -> tuple[int, str, str]:
        (tmp_path / "My config.yml").write_text(text)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["tunesmith", "import", "axolotl", "My config.yml", *arguments])
        with pytest.raises(SystemExit) as exited:
            main()
        printed = capsys.readouterr()
        return int(exited.value.code or 0), printed.out, printed.err

    return run


def holds(whole: Any, part: Any, folder: Path) -> None:
    if isinstance(part, dict):
        for key, value in part.items():
            holds(whole[key], value, folder)
    elif isinstance(part, list):
        assert len(whole) == len(part)
        for actual, expected in zip(whole, part, strict=True):
            holds(actual, expected, folder)
    else:
        assert whole == (part.replace("FOLDER", str(folder)) if isinstance(part, str) else part)


@pytest.mark.parametrize("name", KINDS)
def test_a_public_example_becomes_a_job_and_all_other_keys_are_reported(
    imported: Import, tmp_path: Path, name: str
) -> None:
    kind = KINDS[name]
    code, out, err = imported(kind.text)
    assert code == 0, err
    job = parse_manifest(out)
    assert job.metadata.name == "my-config"
    holds(job.spec.manifest(), kind.spec, tmp_path)
    lines = err.splitlines()
    assert {line.split(" has no counterpart")[0] for line in lines if "has no counterpart" in line} == kind.omitted
    assert {
        line.split(": ")[0]
        for line in lines
        if re.search(
            "rendered by|the rows must|are chosen|put it into the Secret|the name of the job|regular expression", line
        )
    } == kind.changed
    assert imported(kind.text, "--strict")[0] == (1 if kind.omitted else 0)


def test_sources_columns_variants_and_checkpoints(imported: Import, tmp_path: Path) -> None:
    code, out, err = imported(CUSTOM)
    assert code == 0, err
    spec = parse_manifest(out).spec
    assert spec.base_model.uri == f"file://{tmp_path}/models/mine"
    assert [source.uri for source in spec.dataset.train] == [
        "s3://bucket/one.jsonl",
        f"file://{tmp_path}/more/two.jsonl",
        f"file://{tmp_path}/more/three.jsonl",
    ]
    assert spec.dataset.validation is not None
    assert [source.uri for source in spec.dataset.validation] == ["hf://datasets/org/held-out@v2/rows.parquet"]
    assert spec.dataset.columns is not None
    assert spec.dataset.columns.manifest() == {"instruction": "ask", "output": "answer"}
    assert (spec.dataset.overlong, spec.dataset.duplicates) == ("Truncate", "Drop")
    assert spec.method.lora is not None
    assert (spec.method.lora.dora, spec.method.lora.initialization) == (True, "EVA")
    assert (spec.checkpoint.every_steps, spec.checkpoint.keep) == (50, 3)
    assert (spec.hyperparameters.neftune_noise_alpha, spec.hyperparameters.precision) == (5, "float32")
    assert spec.hyperparameters.torch_compile is True
    assert 'datasets[0].type.format has no counterpart and is omitted: it is "Q: {instruction}"' in err
    assert "optimizer has no counterpart" in err
    assert "lora_layers_to_transform has no counterpart" in err
    assert "plugins" not in err


@pytest.mark.parametrize(
    ("name", "exports", "message"),
    [("org/doors", [{"hub": "org/doors"}], ""), ("doors", None, "hub_model_id has no counterpart")],
)
def test_the_repository_for_the_push(
    imported: Import, name: str, exports: list[dict[str, str]] | None, message: str
) -> None:
    code, out, err = imported(SMALL + f"hub_model_id: {name}\n")
    assert code == 0, err
    output = parse_manifest(out).spec.output
    assert (output.manifest()["exports"] if output else None) == exports
    assert message in err


SMALL = "base_model: org/base\ndatasets: [{path: org/rows, type: chat_template}]\nadapter: lora\n"


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("base_model: a: b", 2, "is not valid YAML"),
        ("adapter: lora", 2, "base_model is missing: name the base model"),
        ("base_model: org/base\nadapter: lora", 2, "datasets is missing: name the rows to train on"),
        (SMALL.replace("org/rows", "http://example.org/rows.jsonl"), 2, "copy the rows to hf://, s3://, gs://, az://"),
        (
            SMALL.replace("org/base", "base"),
            1,
            "has a value that a FineTuneJob does not accept: spec.baseModel.uri: a uri is hf://",
        ),
        (
            SMALL.replace("adapter: lora", "adapter: llama-adapter"),
            2,
            "adapter is llama-adapter: use lora, qlora or ia3",
        ),
        (SMALL + "micro_batch_size: auto", 2, 'micro_batch_size is "auto": write a number'),
        (SMALL + "rl: grpo", 2, "rl is grpo: dpo, orpo, kto can be imported"),
        (SMALL + "lora_r: 4096", 1, "spec.method.lora.rank is 4096: it must be at most 512"),
    ],
)
def test_a_configuration_that_cannot_be_imported_is_refused(
    imported: Import, text: str, code: int, message: str
) -> None:
    exit_code, out, err = imported(text)
    assert (exit_code, out) == (code, "")
    assert message in err


def test_tasks_of_the_harness_become_a_suite(imported: Import) -> None:
    plugin = (
        "plugins: [axolotl.integrations.lm_eval.LMEvalPlugin]\nlm_eval_batch_size: 8\nlm_eval_tasks: [arc_easy, mmlu]\n"
    )
    code, out, err = imported(SMALL + plugin)
    assert code == 0
    assert "lm_eval_tasks" not in err
    assert "plugins" not in err
    evaluation = parse_manifest(out).spec.evaluation
    assert evaluation is not None
    suites = [{"name": "lm-eval", "lmEval": {"tasks": ["arc_easy", "mmlu"]}}]
    assert evaluation.manifest() == {"publish": "Last", "suites": suites}
    code, out, err = imported(SMALL + plugin + "lm_eval_post_train: false\n")
    evaluation = parse_manifest(out).spec.evaluation
    assert evaluation is not None
    assert evaluation.suites is None
    assert "lm_eval_tasks has no counterpart and is omitted: lm_eval_post_train is false" in err


def test_without_an_adapter_all_weights_are_trained(imported: Import) -> None:
    code, out, err = imported(SMALL.replace("adapter: lora", "lora_r: 8"))
    assert code == 0
    assert "lora_r has no counterpart and is omitted: it has no effect without an adapter" in err
    spec = parse_manifest(out).spec
    assert (spec.method.name, spec.method.full) == ("full", FullFields())


DEFAULTS = (
    "sequence_len: absent, so dataset.maxLength is 512, as in Axolotl",
    "gradient_accumulation_steps: absent, so hyperparameters.batchSize is 1, as in Axolotl",
    "micro_batch_size: absent, so hyperparameters.microBatchSize is 1, as in Axolotl",
    "num_epochs: absent, so hyperparameters.epochs is 1.0, as in Axolotl",
)
LEAST = "val_set_size: some rows are always held out, so dataset.validationFraction is 0.001, the minimum"


def test_defaults_of_axolotl_are_written_and_reported(imported: Import, tmp_path: Path) -> None:
    code, out, err = imported(SMALL, "--strict")
    assert code == 0, err
    for line in DEFAULTS:
        assert line in err.splitlines()
    assert LEAST in err
    spec = {
        "dataset": {"maxLength": 512, "validationFraction": 0.001, "packing": False, "duplicates": "Keep"},
        "method": {"lora": {"dropout": 0.0}},
        "hyperparameters": {
            "epochs": 1.0,
            "batchSize": 1,
            "microBatchSize": 1,
            "optimizer": "AdamW",
            "scheduler": "Cosine",
            "weightDecay": 0.0,
        },
    }
    holds(parse_manifest(out).spec.manifest(), spec, tmp_path)


def test_explicit_values_are_not_reported_as_defaults(imported: Import, tmp_path: Path) -> None:
    given = (
        "sequence_len: 1024\nmicro_batch_size: 4\ngradient_accumulation_steps: 2\nnum_epochs: 2\nval_set_size: 0.2\n"
        "load_best_model_at_end: true\n"
    )
    code, out, err = imported(SMALL + given)
    assert (code, err) == (0, "")
    spec = {
        "dataset": {"maxLength": 1024, "validationFraction": 0.2},
        "hyperparameters": {"epochs": 2.0, "batchSize": 8, "microBatchSize": 4},
    }
    holds(parse_manifest(out).spec.manifest(), spec, tmp_path)


def test_steps_replace_the_default_epochs(imported: Import) -> None:
    code, out, err = imported(SMALL + "max_steps: 50\nmicro_batch_size: 3\n")
    assert code == 0, err
    found = parse_manifest(out).spec.hyperparameters
    assert (found.epochs, found.max_steps, found.batch_size) == (None, 50, 3)
    assert "num_epochs" not in err
    assert "gradient_accumulation_steps: absent, so hyperparameters.batchSize is 3, as in Axolotl" in err


@pytest.mark.parametrize(
    ("text", "fraction", "message"),
    [
        ("val_set_size: 0\n", 0.001, LEAST),
        ("val_set_size: 0.0001\n", 0.001, LEAST),
        ("val_set_size: 0.05\n", 0.05, ""),
        ("val_set_size: 200\n", None, "a share of 0.001 to 0.5 of the rows can be held out: set dataset.validation"),
        ("test_datasets: [{path: org/held-out, type: chat_template}]\n", None, ""),
    ],
)
def test_the_share_of_the_rows_held_out(imported: Import, text: str, fraction: float | None, message: str) -> None:
    code, out, err = imported(SMALL + text)
    assert code == 0, err
    assert parse_manifest(out).spec.dataset.validation_fraction == fraction
    assert message in err
    assert ("val_set_size" in err) == bool(message)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("shuffle_merged_datasets", "rows are shuffled by hyperparameters.seed"),
        ("pretrain_multipack_attn", "packed rows do not attend to each other; dataset.packing: false disables packing"),
        ("peft_autocast_adapter_dtype", "trained weights are always in float32"),
        ("tokenizer_use_fast", "the base model's fast tokenizer is used"),
        ("tokenizer_legacy", "the tokenizer uses the settings in the base model's files"),
        ("save_safetensors", "weights are always written as safetensors"),
    ],
)
def test_a_key_that_is_off_but_on_by_default_is_reported(imported: Import, key: str, hint: str) -> None:
    code, out, err = imported(SMALL + f"{key}: false\n", "--strict")
    assert code == 1
    assert f"{key} has no counterpart and is omitted: {hint}" in err
    parse_manifest(out)


def test_a_key_that_is_off_by_default_is_not_reported(imported: Import) -> None:
    off = "load_in_8bit: false\ntf32: false\nstrict: false\ngptq: false\npeft_init_lora_weights: false\n"
    code, _, err = imported(SMALL + off, "--strict")
    assert code == 0, err
    assert "has no counterpart" not in err


@pytest.mark.parametrize(
    ("asked", "method", "initialization", "message"),
    [
        ("mica", "lora", "MiCA", ""),
        ("pissa_niter_4", "lora", "FastPiSSA", "FastPiSSA uses Tunesmith's number of iterations"),
        ("loftq", "qlora", "LoftQ", "method.qlora holds the base in 4 bits"),
    ],
)
def test_initializations_of_an_adapter(
    imported: Import, asked: str, method: str, initialization: str, message: str
) -> None:
    code, out, err = imported(SMALL + f"peft_init_lora_weights: {asked}\n", "--strict")
    assert code == 0, err
    assert parse_manifest(out).spec.method.manifest()[method]["initialization"] == initialization
    assert message in err


def test_axolotls_loftq_configuration_is_reported(imported: Import) -> None:
    code, _, err = imported(SMALL + "peft: {loftq_config: {loftq_bits: 4}}\n")
    assert code == 0
    assert "peft has no counterpart and is omitted: method.qlora with initialization LoftQ replaces loftq_config" in err


def field_at(path: str) -> dict[str, Any]:
    """Schema of a field of the spec."""
    node = resolved_schema(FineTuneJob)["properties"]["spec"]
    for name in path.split("."):
        node = node["properties"][name]
    return node


def test_every_key_is_translated_to_a_field_that_exists() -> None:
    keys = axolotl_keys()
    paths = [*keys.fields.values()]
    paths += [f"method.{method}.{field}" for method, fields in keys.methods.items() for field in fields.values()]
    paths += [f"objective.{name}.{field}" for name, rl in keys.objectives.items() for field in rl.fields.values()]
    assert all(map(field_at, paths))


def test_every_name_is_translated_to_a_value_that_exists() -> None:
    keys = axolotl_keys()
    for named in keys.values.values():
        assert set(named.values.values()) <= set(field_at(named.field)["enum"])
    assert {rl.format for rl in keys.objectives.values()} <= set(field_at("dataset.format")["enum"])


def test_no_key_has_two_meanings() -> None:
    keys = axolotl_keys()
    trackers = [key for tracker in keys.trackers.values() for key in (tracker.switch, *tracker.keys)]
    translated = [*keys.fields, *{key for fields in keys.methods.values() for key in fields}, *keys.values, *trackers]
    assert len(translated) == len(set(translated))
    assert not keys.ignored & set(translated)
    assert not keys.ignored & keys.hints.keys()
    assert all(set(tracker.implied_by) <= set(tracker.keys) for tracker in keys.trackers.values())


def test_a_key_of_lora_is_omitted_with_another_method(imported: Import) -> None:
    code, out, err = imported(SMALL.replace("adapter: lora", "adapter: ia3\nlora_r: 8"))
    assert code == 0, err
    assert "lora_r has no counterpart" in err
    assert parse_manifest(out).spec.method.name == "ia3"


def test_the_documentation_shows_the_messages(imported: Import) -> None:
    block = re.search(r"^\$ tunesmith import axolotl.*?\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert block is not None
    code, _, printed = imported(KINDS["llama-3/qlora-1b.yml"].text)
    assert code == 0
    assert set(block[1].splitlines()[:-1]) <= set(printed.splitlines())


MINIMAL = {"base_model": "org/base", "datasets": [{"path": "org/rows", "type": "alpaca"}], "adapter": "lora"}
PATTERN = r"model.layers.[\d]+.(mlp|self_attn).(up|down|gate|q|k|v|o)_proj"


def test_intervals_that_are_a_share_of_the_run() -> None:
    shares = {"save_steps": 0.25, "eval_steps": 0.1}
    for more in ({}, {"max_steps": 90}):
        found = translate(MINIMAL | shares | more, "/")
        assert found.omitted == {}
        assert found.spec["checkpoint"] == {"everyRatio": 0.25}
        assert found.spec["evaluation"] == {"publish": "Last", "everyRatio": 0.1}
    found = translate(MINIMAL | {"save_steps": 200, "eval_steps": 50.0}, "/")
    assert found.spec["checkpoint"] == {"everySteps": 200}
    assert found.spec["evaluation"] == {"publish": "Last", "everySteps": 50}


@pytest.mark.parametrize(
    ("given", "ratio"),
    [
        ({"evals_per_epoch": 4}, 0.25),
        ({"evals_per_epoch": 4, "num_epochs": 3}, 0.0833333),
        ({"evals_per_epoch": 0}, None),
        ({"evals_per_epoch": 1, "num_epochs": 0.5}, 1.0),
        ({"eval_strategy": "epoch", "num_epochs": 5}, 0.2),
        ({"eval_strategy": "steps", "eval_steps": 0.2}, 0.2),
    ],
)
def test_measurements_per_epoch_are_a_share_of_the_run(given: dict[str, Any], ratio: float | None) -> None:
    found = translate(MINIMAL | given, "/")
    assert found.omitted == {}
    assert found.spec["evaluation"].get("everyRatio") == ratio


def test_a_warmup_that_is_a_share_of_the_run() -> None:
    assert translate(MINIMAL | {"warmup_steps": 0.1}, "/").spec["hyperparameters"]["warmupRatio"] == 0.1
    assert translate(MINIMAL | {"warmup_steps": 10.0}, "/").spec["hyperparameters"]["warmupSteps"] == 10


def test_a_total_batch_size() -> None:
    found = translate(MINIMAL | {"batch_size": 9, "micro_batch_size": 2}, "/")
    assert found.omitted == {}
    assert found.spec["hyperparameters"]["batchSize"] == 8


def test_parameters_of_experts_are_kept() -> None:
    given = {"lora_target_parameters": ["experts.gate_up_proj"], "lora_target_modules": ["q_proj"]}
    assert translate(MINIMAL | given, "/").spec["method"] == {
        "lora": {"targetParameters": ["experts.gate_up_proj"], "targetModules": ["q_proj"]}
    }


@pytest.mark.parametrize("key", ["reward_model", "process_reward_model"])
def test_models_that_score_answers_are_refused(key: str) -> None:
    with pytest.raises(UntranslatableError, match=f"{key} trains a model that scores answers"):
        translate(MINIMAL | {key: True}, "/")


ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a split": (
        {"type": "chat_template", "split": "train_sft"},
        {"train": [{"uri": "hf://datasets/org/rows", "split": "train_sft"}], "format": "Messages"},
    ),
    "a share of a split": (
        {"type": "chat_template", "split": "test[:25%]"},
        {"train": [{"uri": "hf://datasets/org/rows", "split": "test", "weight": 0.25}], "format": "Messages"},
    ),
    "a column of system prompts": (
        {"type": {"field_system": "persona", "field_instruction": "question"}},
        {"format": "Instruction", "columns": {"system": "persona", "instruction": "question"}},
    ),
    "reasoning": (
        {"type": "chat_template", "field_thinking": "thinking", "template_thinking_key": "thinking"},
        {"format": "Messages"},
    ),
    "answers that are learned": (
        {"type": "chat_template", "message_field_training": "train", "roles_to_train": ["assistant"]},
        {"format": "Messages"},
    ),
    "texts that are split": ({"type": "completion"}, {"format": "Text", "overlong": "Chunk"}),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str) -> None:
    entry, expected = ROWS[name]
    found = translate(MINIMAL | {"datasets": [{"path": "org/rows", **entry}]}, "/")
    assert found.omitted == {}
    assert expected.items() <= found.spec["dataset"].items()


def test_a_pattern_of_modules_is_kept() -> None:
    given = {"lora_target_modules": PATTERN, "lora_r": 8, "peft_use_rslora": True, "loraplus_lr_ratio": 16}
    found = translate(MINIMAL | given, "/")
    config = {"r": 8, "use_rslora": True, "target_modules": PATTERN}
    assert found.spec["method"] == {"peft": {"type": "LORA", "config": config}}
    assert set(found.omitted) == {"loraplus_lr_ratio"}
    found = translate(MINIMAL | {"adapter": "qlora", "lora_target_modules": PATTERN}, "/")
    assert found.spec["method"]["peft"]["quantization"] == {}
    found = translate(MINIMAL | {"lora_target_modules": r".*\.(q|v)_proj"}, "/")
    assert found.spec["method"] == {"lora": {"targetModules": ["q_proj", "v_proj"]}}


def test_the_lowest_rate_of_a_cosine_schedule() -> None:
    found = translate(MINIMAL | {"lr_scheduler": "cosine", "cosine_min_lr_ratio": 0.1}, "/")
    assert found.spec["hyperparameters"]["minLearningRateRatio"] == 0.1
    found = translate(MINIMAL | {"lr_scheduler": "cosine", "cosine_min_lr_ratio": 1.0}, "/")
    assert found.spec["hyperparameters"]["scheduler"] == "Constant"
    found = translate(MINIMAL | {"lr_scheduler": "constant", "cosine_min_lr_ratio": 0.1}, "/")
    assert "cosine_min_lr_ratio" in found.omitted


def test_the_published_step_and_early_stopping() -> None:
    given = {"load_best_model_at_end": True, "early_stopping_patience": 4, "metric_for_best_model": "eval_loss"}
    found = translate(MINIMAL | given, "/")
    assert found.omitted == {}
    assert found.spec["evaluation"] == {"publish": "Best", "earlyStopping": {"patience": 4}}
    found = translate(MINIMAL, "/")
    assert found.spec["evaluation"] == {"publish": "Last"}
    assert found.changed["load_best_model_at_end"] == "absent, so evaluation.publish is Last, as in Axolotl"
