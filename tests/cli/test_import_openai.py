"""`tunesmith import openai`: jobs as in the reference of OpenAI's API."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tunesmith.api.manifest import parse_manifest
from tunesmith.cli.main import main
from tunesmith.cli.openai_job import translate
from tunesmith.cli.translation import UntranslatableError

if TYPE_CHECKING:
    from pathlib import Path

BASE, DATA = "hf://org/base", "s3://bucket/train.jsonl"
JOB: dict[str, Any] = {
    "object": "fine_tuning.job",
    "id": "ftjob-abc123",
    "model": "gpt-4o-mini-2024-07-18",
    "created_at": 1721764800,
    "finished_at": None,
    "fine_tuned_model": None,
    "organization_id": "org-123",
    "result_files": [],
    "status": "queued",
    "validation_file": None,
    "training_file": "file-abc123",
    "hyperparameters": {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"},
    "trained_tokens": None,
    "error": {},
    "user_provided_suffix": None,
    "seed": 950189191,
    "estimated_finish": None,
    "integrations": [],
    "metadata": None,
    "usage_metrics": None,
    "shared_with_openai": False,
    "method": {
        "type": "supervised",
        "supervised": {
            "hyperparameters": {"batch_size": "auto", "learning_rate_multiplier": "auto", "n_epochs": "auto"}
        },
    },
}


def test_a_job_with_automatic_hyperparameters() -> None:
    found = translate(JOB, BASE, DATA, None)
    assert found.spec == {
        "baseModel": {"uri": BASE},
        "dataset": {"train": [{"uri": DATA}], "format": "Messages"},
        "method": {"lora": {}},
        "hyperparameters": {"seed": 950189191},
    }
    assert found.omitted == {}
    assert found.ignored == ["created_at", "id", "object", "organization_id", "status"]


@pytest.mark.parametrize("where", ["hyperparameters", "method"])
def test_hyperparameters(where: str) -> None:
    values = {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5}
    method = {"type": "supervised", "supervised": {"hyperparameters": values}}
    given = {"method": method} if where == "method" else {"hyperparameters": values, "method": None}
    found = translate(JOB | given | {"seed": None}, BASE, DATA, "s3://bucket/held-out.jsonl")
    assert found.spec["hyperparameters"] == {"epochs": 2, "batchSize": 4, "learningRate": 0.0001}
    assert "default of 0.0002" in found.changed["learning_rate_multiplier"]
    assert found.spec["dataset"]["validation"] == [{"uri": "s3://bucket/held-out.jsonl"}]


def test_preferences() -> None:
    values = {"beta": 0.2, "n_epochs": "auto", "learning_rate_multiplier": 2}
    found = translate(JOB | {"method": {"type": "dpo", "dpo": {"hyperparameters": values}}}, BASE, DATA, None)
    assert found.spec["objective"] == {"dpo": {"beta": 0.2}}
    assert found.spec["dataset"]["format"] == "Preference"
    assert found.spec["hyperparameters"]["learningRate"] == 4e-5
    assert "convert them with jq" in found.changed["training_file"]


def test_every_other_key_is_reported() -> None:
    found = translate(JOB | {"metadata": {"a": "b"}, "novel": 1, "validation_file": "file-v"}, BASE, DATA, None)
    assert set(found.omitted) == {"metadata", "novel", "validation_file"}
    nested = {"type": "supervised", "supervised": {"hyperparameters": {"novel": 1}, "grader": {}}}
    found = translate(JOB | {"method": nested}, BASE, DATA, None)
    assert set(found.omitted) == {"hyperparameters.novel", "method.supervised.grader"}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"method": {"type": "reinforcement"}}, "method.type is reinforcement: supervised and dpo can be imported"),
        ({"object": "list"}, "it is not a fine-tuning job"),
        ({"training_file": None}, "it is not a fine-tuning job"),
    ],
)
def test_what_has_no_equivalent_is_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UntranslatableError, match=sentence):
        translate(JOB | given, BASE, DATA, None)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "job.json"
    integrations = [{"type": "wandb", "wandb": {"project": "p"}}]
    file.write_text(json.dumps(JOB | {"user_provided_suffix": "My Tone", "integrations": integrations}))
    arguments = ["import", "openai", str(file), "--base", BASE, "--data", DATA, "--strict"]
    monkeypatch.setattr(sys, "argv", ["tunesmith", *arguments])
    with pytest.raises(SystemExit) as exited:
        main()
    printed = capsys.readouterr()
    assert not exited.value.code, printed.err
    job = parse_manifest(printed.out)
    assert job.metadata.name == "my-tone"
    assert job.spec.output is not None
    assert job.spec.output.reporting == ["WandB"]


@pytest.mark.parametrize(
    ("base", "uri"),
    [
        ("./models/base", "file://{folder}/models/base"),
        ("org/base", "hf://org/base"),
        ("hf://org/base", "hf://org/base"),
    ],
)
def test_paths_and_names_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], base: str, uri: str
) -> None:
    (tmp_path / "job.json").write_text(json.dumps(JOB))
    monkeypatch.chdir(tmp_path)
    rows = ["--data", "data/train.jsonl", "--validation", "/rows/held-out.jsonl"]
    monkeypatch.setattr(sys, "argv", ["tunesmith", "import", "openai", "job.json", "--base", base, *rows])
    with pytest.raises(SystemExit) as exited:
        main()
    printed = capsys.readouterr()
    assert not exited.value.code, printed.err
    spec = parse_manifest(printed.out).spec
    assert spec.base_model.uri == uri.format(folder=tmp_path)
    assert [source.uri for source in spec.dataset.train] == [f"file://{tmp_path}/data/train.jsonl"]
    assert [source.uri for source in spec.dataset.validation or []] == ["file:///rows/held-out.jsonl"]
