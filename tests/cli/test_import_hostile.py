"""Configurations of other tools with values of any kind at any key become a job or a sentence, never a traceback."""

from __future__ import annotations

import copy
import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.cli import test_import_llamafactory as llamafactory
from tests.cli import test_import_openai as openai
from tests.cli.test_import import CONFIG
from tunesmith.cli.main import main

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ODD: list[Any] = [7, "x", [[]], {"a": [1]}, float("inf")]
AXOLOTL = yaml.safe_load("""
base_model: org/model
adapter: lora
datasets:
  - {path: org/data, type: chat_template, split: train, message_property_mappings: {role: role, content: content}}
  - {path: json, data_files: [a.jsonl], type: {field_instruction: question}}
test_datasets: [{path: x/y, type: completion}]
val_set_size: 0.1
lora_target_modules: [q_proj]
micro_batch_size: 2
num_epochs: 3
learning_rate: 0.0002
warmup_steps: 10
save_steps: 0.1
evals_per_epoch: 2
early_stopping_patience: 3
rl: dpo
peft_init_lora_weights: pissa
plugins: [axolotl.integrations.liger.LigerPlugin]
""")
LLAMAFACTORY = {
    **llamafactory.BASE,
    "lora_rank": 8,
    "lora_target": "all",
    "stage": "dpo",
    "eval_dataset": "pairs",
    "num_train_epochs": 3,
    "report_to": "wandb",
    "save_steps": 500,
    "val_size": 0.1,
}
OPENAI = openai.JOB | {
    "integrations": [{"type": "wandb", "wandb": {"project": "p"}}],
    "method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1, "learning_rate_multiplier": 2}}},
}
TOOLS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "peft": (CONFIG | {"rank_pattern": {"q_proj": 4}, "revision": "main"}, ["--data", "s3://bucket/rows.jsonl"]),
    "axolotl": (AXOLOTL, []),
    "llamafactory": (LLAMAFACTORY, ["--dataset-info", "info.json"]),
    "openai": (OPENAI, ["--base", "hf://org/base", "--data", "s3://bucket/rows.jsonl"]),
}


def _with_odd_values(document: Any) -> Iterator[Any]:
    """Yield copies of a document, each with an odd value in place of one of its values."""
    places = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in list(places):
        inner = _with_odd_values(value) if isinstance(value, dict | list) else iter(())
        for changed in [*ODD, *inner]:
            whole = copy.copy(document)
            whole[key] = changed
            yield whole


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "info.json").write_text(json.dumps(llamafactory.INFO))

    def run(tool: str, document: Any, arguments: list[str]) -> int:
        (tmp_path / "config.json").write_text(json.dumps(document))
        monkeypatch.setattr(sys, "argv", ["tunesmith", "import", tool, "config.json", *arguments])
        with pytest.raises(SystemExit) as exited:
            main()
        return int(exited.value.code or 0)

    return run


@pytest.mark.parametrize("tool", TOOLS)
def test_a_value_of_any_kind_is_translated_or_refused(
    imported: Any, tool: str, capsys: pytest.CaptureFixture[str]
) -> None:
    document, arguments = TOOLS[tool]
    assert imported(tool, document, arguments) == 0, capsys.readouterr().err
    for changed in _with_odd_values(document):
        assert imported(tool, changed, arguments) in {0, 1, 2}
        assert "a bug in tunesmith" not in capsys.readouterr().err, changed


def test_a_description_of_data_of_any_kind_is_translated_or_refused(
    imported: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for changed in _with_odd_values({"alpaca": llamafactory.INFO["openai"] | {"split": "train"}}):
        (tmp_path / "info.json").write_text(json.dumps(changed))
        imported("llamafactory", llamafactory.BASE, ["--dataset-info", "info.json"])
        assert "a bug in tunesmith" not in capsys.readouterr().err, changed
