"""`tunesmith import llamafactory`; names of keys as in LLaMA-Factory's examples and data/README.md."""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tunesmith.api.finetunejob import FineTuneJob
from tunesmith.api.schema import resolved_schema
from tunesmith.cli.llamafactory import llamafactory_keys, translate
from tunesmith.cli.main import main
from tunesmith.cli.translation import UntranslatableError

if TYPE_CHECKING:
    from pathlib import Path

INFO: dict[str, Any] = {
    "alpaca": {"file_name": "alpaca.json"},
    "renamed": {"hf_hub_url": "org/rows", "columns": {"prompt": "question", "response": "answer"}},
    "chats": {"file_name": "chats.json", "formatting": "sharegpt", "columns": {"messages": "conversations"}},
    "openai": {
        "file_name": "chats.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
    "pairs": {
        "file_name": "pairs.json",
        "ranking": True,
        "columns": {"prompt": "question", "chosen": "good", "rejected": "bad"},
    },
    "thumbs": {"file_name": "thumbs.json", "columns": {"kto_tag": "liked"}},
    "turns": {"file_name": "turns.json", "columns": {"system": "persona", "history": "earlier"}},
    "called": {
        "file_name": "called.json",
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "system": "persona", "tools": "functions"},
    },
    "shared": {"hf_hub_url": "org/rows", "split": "train_prefs"},
    "ranged": {"hf_hub_url": "org/rows", "split": "train[:5%]"},
    "stored": {"cloud_file_name": "s3://bucket/rows.jsonl"},
    "mirrored": {"ms_hub_url": "org/rows"},
}
BASE = {"model_name_or_path": "org/base", "dataset": "alpaca"}


def spec(**given: Any) -> dict[str, Any]:
    return translate(BASE | given, INFO, "/work", "/work/data").spec


def test_a_configuration_of_the_examples() -> None:
    found = translate(
        {
            **BASE,
            "trust_remote_code": True,
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_rank": 8,
            "lora_target": "all",
            "dataset": "alpaca",
            "template": "qwen3_nothink",
            "cutoff_len": 2048,
            "max_samples": 1000,
            "preprocessing_num_workers": 16,
            "output_dir": "saves/base/lora/sft",
            "logging_steps": 10,
            "save_steps": 500,
            "plot_loss": True,
            "overwrite_output_dir": True,
            "report_to": "none",
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 8,
            "learning_rate": 1.0e-4,
            "num_train_epochs": 3.0,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.1,
            "bf16": True,
            "resume_from_checkpoint": None,
        },
        INFO,
        "/work",
        "/work/data",
    )
    assert found.spec == {
        "baseModel": {"uri": "hf://org/base"},
        "dataset": {
            "train": [{"uri": "file:///work/data/alpaca.json"}],
            "format": "Instruction",
            "validationFraction": 0.001,
            "maxLength": 2048,
            "overlong": "Truncate",
            "duplicates": "Keep",
        },
        "method": {"lora": {"rank": 8, "alpha": 16, "targetModules": ["all-linear"]}},
        "hyperparameters": {
            "batchSize": 8,
            "microBatchSize": 1,
            "epochs": 3.0,
            "learningRate": 0.0001,
            "warmupRatio": 0.1,
            "scheduler": "Cosine",
        },
        "evaluation": {"publish": "Last"},
        "checkpoint": {"everySteps": 500},
    }
    assert set(found.omitted) == {"trust_remote_code", "max_samples"}
    assert set(found.changed) == {"load_best_model_at_end", "lora_alpha", "template", "val_size"}


def test_half_precision() -> None:
    assert spec(fp16=True)["hyperparameters"]["precision"] == "float16"
    assert "precision" not in spec(bf16=True)["hyperparameters"]


@pytest.mark.parametrize(
    ("given", "part", "expected"),
    [
        ({"finetuning_type": "full"}, "method", {"full": {}}),
        (
            {"quantization_bit": 4, "lora_target": "q_proj, v_proj", "lora_rank": 4, "additional_target": "lm_head"},
            "method",
            {
                "qlora": {
                    "rank": 4,
                    "alpha": 8,
                    "targetModules": ["q_proj", "v_proj"],
                    "modulesToSave": ["lm_head"],
                }
            },
        ),
        (
            {"pissa_init": True, "use_rslora": True, "loraplus_lr_ratio": 16.0},
            "method",
            {
                "lora": {
                    "rank": 8,
                    "alpha": 16,
                    "targetModules": ["all-linear"],
                    "initialization": "FastPiSSA",
                    "rsLora": True,
                    "loraPlusRatio": 16.0,
                }
            },
        ),
        ({"stage": "dpo", "dataset": "pairs", "pref_beta": 0.2}, "objective", {"dpo": {"beta": 0.2}}),
        ({"stage": "dpo", "dataset": "pairs", "pref_loss": "orpo"}, "objective", {"orpo": {}}),
        (
            {"stage": "kto", "dataset": "thumbs", "kto_chosen_weight": 2.0},
            "objective",
            {"kto": {"desirableWeight": 2.0}},
        ),
        ({"report_to": "wandb"}, "output", {"reporting": ["WandB"]}),
        ({"eval_steps": 0.1, "max_steps": 50}, "evaluation", {"publish": "Last", "everyRatio": 0.1}),
        ({"save_steps": 0.25}, "checkpoint", {"everyRatio": 0.25}),
        ({"eval_strategy": "epoch", "num_train_epochs": 4.0}, "evaluation", {"publish": "Last", "everyRatio": 0.25}),
        (
            {"early_stopping_steps": 3, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"},
            "evaluation",
            {"publish": "Best", "earlyStopping": {"patience": 3}},
        ),
    ],
)
def test_parts_of_a_configuration(given: dict[str, Any], part: str, expected: dict[str, Any]) -> None:
    assert spec(**given)[part] == expected


@pytest.mark.parametrize(
    ("given", "uri", "form", "columns"),
    [
        (
            {"dataset": "renamed"},
            "hf://datasets/org/rows",
            "Instruction",
            {"instruction": "question", "output": "answer"},
        ),
        ({"dataset": "chats"}, "file:///work/data/chats.json", "Messages", {"messages": "conversations"}),
        ({"dataset": "openai"}, "file:///work/data/chats.json", "Messages", None),
        ({"dataset": "stored"}, "s3://bucket/rows.jsonl", "Instruction", None),
        ({"dataset": "stored", "stage": "pt"}, "s3://bucket/rows.jsonl", "Text", {"text": "instruction"}),
        (
            {"dataset": "turns"},
            "file:///work/data/turns.json",
            "Instruction",
            {"system": "persona", "history": "earlier"},
        ),
        (
            {"dataset": "called"},
            "file:///work/data/called.json",
            "Messages",
            {"messages": "conversations", "system": "persona", "tools": "functions"},
        ),
        (
            {"dataset": "turns", "stage": "kto"},
            "file:///work/data/turns.json",
            "UnpairedPreference",
            {"prompt": "instruction", "completion": "output", "system": "persona", "history": "earlier"},
        ),
        (
            {"dataset": "pairs", "stage": "dpo"},
            "file:///work/data/pairs.json",
            "Preference",
            {"prompt": "question", "chosen": "good", "rejected": "bad"},
        ),
        (
            {"dataset": "thumbs", "stage": "kto"},
            "file:///work/data/thumbs.json",
            "UnpairedPreference",
            {"prompt": "instruction", "completion": "output", "label": "liked"},
        ),
    ],
)
def test_data_sets(given: dict[str, Any], uri: str, form: str, columns: dict[str, str] | None) -> None:
    found = translate(BASE | given, INFO, "/work", "/work/data")
    assert found.spec["dataset"]["train"] == [{"uri": uri}]
    assert found.spec["dataset"]["format"] == form
    assert found.spec["dataset"].get("columns") == columns
    assert found.omitted == {}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"stage": "ppo"}, "stage is ppo: pt, sft, dpo, kto can be imported"),
        ({"finetuning_type": "freeze"}, "finetuning_type is freeze: lora and full can be imported"),
        ({"stage": "dpo", "pref_loss": "simpo"}, "pref_loss is simpo: sigmoid (DPO) and orpo can be imported"),
        ({"dataset": "absent"}, "dataset names absent, which dataset_info.json does not define"),
        ({"dataset": "mirrored"}, 'the rows of mirrored are in "org/rows": copy them to a file'),
        ({"dataset": ""}, "dataset is missing"),
    ],
)
def test_what_has_no_equivalent_is_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UntranslatableError, match=re.escape(sentence)):
        translate(BASE | given, INFO, "/work", "/work/data")


def test_every_other_key_is_reported() -> None:
    found = translate(BASE | {"use_badam": True, "deepspeed": "ds_z3.json", "val_size": 200}, INFO, "/", "/data")
    assert set(found.omitted) == {"use_badam", "deepspeed", "val_size"}
    entry = INFO | {
        "alpaca": {"file_name": "a.json", "subset": "x", "tags": {"user_tag": "me"}, "columns": {"images": "i"}}
    }
    found = translate(BASE, entry, "/", "/data")
    assert set(found.omitted) == {"alpaca.subset", "alpaca.tags.user_tag", "alpaca.columns.images"}


def test_columns_of_several_data_sets() -> None:
    found = translate(BASE | {"dataset": "alpaca,chats"}, INFO, "/", "/data")
    assert found.spec["dataset"]["columns"] == {"messages": "conversations"}
    assert "format" not in found.spec["dataset"]
    assert found.omitted == {}
    found = translate(BASE | {"dataset": "alpaca", "eval_dataset": "renamed"}, INFO, "/", "/data")
    assert "columns" not in found.spec["dataset"]
    assert (
        'they differ (renamed {"instruction": "question", "output": "answer"})'
        in (found.omitted["dataset_info.columns"])
    )


def test_rated_chats_are_to_be_divided() -> None:
    columns = {"messages": "messages", "kto_tag": "liked", "system": "persona"}
    info = {"chats": {"file_name": "chats.json", "formatting": "sharegpt", "columns": columns}}
    found = translate(BASE | {"stage": "kto", "dataset": "chats"}, info, "/", "/data")
    assert found.spec["dataset"]["columns"] == {"system": "persona"}
    assert (
        "jq -c '.[] | {prompt: .messages[:-1], completion: .messages[-1:], label: .liked, persona}'"
        in found.changed["chats.columns"]
    )


def test_splits() -> None:
    found = translate(BASE | {"dataset": "shared", "eval_dataset": "ranged"}, INFO, "/", "/data")
    assert found.spec["dataset"]["train"] == [{"uri": "hf://datasets/org/rows", "split": "train_prefs"}]
    assert found.spec["dataset"]["validation"] == [{"uri": "hf://datasets/org/rows"}]
    assert set(found.omitted) == {"ranged.split"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"stage": "pt"}, {"overlong": "Chunk", "packing": True}),
        ({"stage": "pt", "packing": False}, {"overlong": "Truncate", "packing": False}),
        ({}, {"overlong": "Truncate"}),
    ],
)
def test_texts_of_pretraining_are_split(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert expected.items() <= spec(**given)["dataset"].items()


def test_a_warmup_that_is_a_share_of_the_run() -> None:
    assert spec(warmup_steps=0.1)["hyperparameters"]["warmupRatio"] == 0.1


def test_steps_of_warmup_override_a_share() -> None:
    found = translate(BASE | {"warmup_steps": 20, "warmup_ratio": 0.1}, INFO, "/", "/data")
    assert found.spec["hyperparameters"]["warmupSteps"] == 20
    assert "warmupRatio" not in found.spec["hyperparameters"]
    assert found.changed["warmup_ratio"] == "warmup_steps overrides it, as in LLaMA-Factory"


def test_fields_of_the_table_exist() -> None:
    keys = llamafactory_keys()
    properties = resolved_schema(FineTuneJob)["properties"]["spec"]["properties"]
    for path in (*keys.fields.values(), *(named.field for named in keys.values.values())):
        part, name = path.split(".")
        assert name in properties[part]["properties"], path
    for name in keys.lora.values():
        assert name in properties["method"]["properties"]["lora"]["properties"]
    for form in keys.columns.values():
        assert set(form.values()) <= set(properties["dataset"]["properties"]["columns"]["properties"])


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(INFO))
    (tmp_path / "qwen3_lora_sft.yaml").write_text("model_name_or_path: org/base\ndataset: alpaca\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tunesmith", "import", "llamafactory", "qwen3_lora_sft.yaml"])
    with pytest.raises(SystemExit) as exited:
        main()
    printed = capsys.readouterr()
    assert not exited.value.code
    assert "name: qwen3-lora-sft" in printed.out
    assert f"file://{tmp_path}/data/alpaca.json" in printed.out
    assert "learning_rate: absent, so hyperparameters.learningRate is 5e-05, as in LLaMA-Factory" in printed.err
