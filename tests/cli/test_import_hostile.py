"""Configurations of other tools with values of any kind at any key become a job or a sentence, never a traceback."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import typer
import yaml

from tests.cli import test_import_llamafactory as llamafactory
from tests.cli import test_import_openai as openai
from tests.cli.test_import import CONFIG
from tunesmith.cli.errors import CliError
from tunesmith.cli.importing import app

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ODD: list[Any] = [7, "x", [[]], {"a": [1]}]
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


Import = Callable[[str, Any, list[str]], str]


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Import:
    """Run an importer; return its error, or an empty text."""
    command = typer.main.get_command(app)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "info.json").write_text(json.dumps(llamafactory.INFO))

    def run(tool: str, document: Any, arguments: list[str]) -> str:
        (tmp_path / "config.json").write_text(json.dumps(document))
        try:
            command.main([tool, "config.json", *arguments], standalone_mode=False)
        except CliError as error:
            return str(error)
        return ""

    return run


@pytest.mark.parametrize("tool", TOOLS)
def test_a_value_of_any_kind_is_translated_or_refused(imported: Import, tool: str) -> None:
    document, arguments = TOOLS[tool]
    assert imported(tool, document, arguments) == ""
    for changed in _with_odd_values(document):
        error = imported(tool, changed, arguments)
        assert error == "" or "config.json" in error


def test_a_description_of_data_of_any_kind_is_translated_or_refused(imported: Import, tmp_path: Path) -> None:
    for changed in _with_odd_values({"alpaca": llamafactory.INFO["openai"] | {"split": "train"}}):
        (tmp_path / "info.json").write_text(json.dumps(changed))
        error = imported("llamafactory", llamafactory.BASE, ["--dataset-info", "info.json"])
        assert error == "" or ".json" in error


def test_what_is_wrong_is_named(imported: Import) -> None:
    error = imported("openai", OPENAI | {"method": "dpo"}, TOOLS["openai"][1])
    assert error.startswith("config.json has a value of a kind that its tool does not accept there (AttributeError: ")
