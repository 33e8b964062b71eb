"""Rows that are both scored and trained on: reported if the user supplied them, impossible if the trainer divides the
rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.trainer.trainer_rig import Workbench, chat_row, chat_rows, write_rows
from tunesmith.api.dataset import Dataset
from tunesmith.api.finetunejob_status import AlsoTrained
from tunesmith.api.objective import ObjectiveName
from tunesmith_trainer.base_model import model
from tunesmith_trainer.data import Encoder
from tunesmith_trainer.data.forms import FORMS
from tunesmith_trainer.data.loading import Rows, load
from tunesmith_trainer.store import Stores

if TYPE_CHECKING:
    from pathlib import Path

ROWS = chat_rows(12)
OTHERS = [chat_row(f"Who keeps light {number}?", "Old Marta.") for number in range(4)]
TOLD = (
    "3 of 5 held-out rows are also trained on, so evaluation.loss overrates the adapter: remove them from"
    " dataset.validation or from dataset.train"
)


def with_validation(bench: Workbench, rows: list[Any], **spec: Any) -> dict[str, Any]:
    held_out = write_rows(bench.folder / "held-out.jsonl", rows)
    job = bench.job(ROWS, **spec)
    job["spec"]["dataset"]["validation"] = [{"uri": f"file://{held_out}"}]
    return job


def test_held_out_rows_in_the_training_data_are_reported(bench: Workbench) -> None:
    job = with_validation(bench, [OTHERS[0], ROWS[7], ROWS[0], OTHERS[1], ROWS[11], ROWS[7]])
    tokens = ("--tokens", f"file://{bench.folder}/tokens")
    found = AlsoTrained(
        rows=3, scored_rows=5, examples=[f"held-out.jsonl line {line}" for line in (2, 3, 5)]
    )  # the fourth is a duplicate
    for _ in range(2):  # the second attempt finds the tokens
        ran = bench.run("validate", job, *tokens)
        assert ran.result.preflight is not None
        assert ran.result.preflight.also_trained == [found]
        assert f"    {TOLD}; the first: held-out.jsonl line 2" in ran.lines
    ran = bench.run("train", job)
    assert ran.code == 0
    card = (bench.output / "artifact/README.md").read_text(encoding="utf-8")
    assert "the loss on 5 held-out rows, 3 of which are also in the training data." in card


def test_the_same_row_is_found_in_other_formats_and_columns(bench: Workbench) -> None:
    """The key depends on a row's content, not on its format."""
    instructions = [{"instruction": "What is the colour of door 3?", "output": "It is blue, as in Brinewick.", "id": 7}]
    counted = bench.run("validate", with_validation(bench, instructions)).result.preflight
    assert counted is not None
    assert counted.also_trained is not None
    assert counted.also_trained[0].sentence.startswith("1 of 1 held-out rows is also trained on")


def test_rows_without_weight_are_not_trained_on(bench: Workbench) -> None:
    job = with_validation(bench, ROWS)
    job["spec"]["dataset"]["train"][0]["weight"] = 0.25
    counted = bench.run("validate", job).result.preflight
    assert counted is not None
    assert counted.also_trained is not None
    assert (counted.rows, counted.also_trained[0].rows, counted.also_trained[0].scored_rows) == (3, 3, 12)


def test_different_rows_are_not_reported(bench: Workbench) -> None:
    job = with_validation(bench, OTHERS)
    counted = bench.run("validate", job).result.preflight
    assert counted is not None
    assert counted.also_trained is None


def test_suite_rows_in_the_training_data_are_reported(bench: Workbench) -> None:
    file = write_rows(bench.folder / "suite.jsonl", [*OTHERS[:2], ROWS[5], ROWS[5]])
    suites = [
        {"name": "doors", "generation": {"dataset": {"uri": f"file://{file}"}, "maxNewTokens": 4}},
        {"name": "lights", "generation": {"dataset": {"uri": f"file://{file}"}, "maxNewTokens": 4, "limit": 2}},
    ]
    job = with_validation(bench, OTHERS, evaluation={"suites": suites})
    ran = bench.run("train", job)
    assert ran.result.preflight is not None
    assert ran.result.preflight.also_trained == [
        AlsoTrained(suite="doors", rows=2, scored_rows=4, examples=["suite.jsonl line 3", "suite.jsonl line 4"])
    ]
    card = (bench.output / "artifact/README.md").read_text(encoding="utf-8")
    assert (
        "none of which are in the training data; 2 of the 4 rows of suite doors are also in the training data." in card
    )


def test_locations_too_long_for_the_status_are_shortened(bench: Workbench) -> None:
    """In a folder or a glob, the file names of rows include all parent folders."""
    path = "/".join([letter * 90 for letter in "abc"])
    for name, rows in (("train", [*ROWS, ROWS[0]]), ("held-out", ROWS[3:]), ("suite", ROWS[4:])):
        write_rows(bench.folder / name / path / "rows.jsonl", rows)
    uris = {name: f"file://{bench.folder}/{name}" for name in ("train", "held-out", "suite")}
    suite = {"name": "doors", "generation": {"dataset": {"uri": uris["suite"]}, "maxNewTokens": 4}}
    job = bench.job(evaluation={"suites": [suite]})
    job["spec"]["dataset"] = {"train": [{"uri": uris["train"]}], "validation": [{"uri": uris["held-out"]}]}
    ran = bench.run("validate", job)
    assert ran.code == 0, ran.result.message
    counted = ran.result.preflight
    assert counted is not None
    assert counted.also_trained is not None
    (dropped,) = counted.dropped or []
    for shown, line in [(dropped, 13), *((overlap, 1) for overlap in counted.also_trained)]:
        (first, *_) = shown.examples or []
        assert first.startswith("aaa")
        assert first.endswith(f"c/rows.jsonl line {line}")
        assert len(first) < 256


def divided(folder: Path, base: Path, rows: list[dict[str, Any]], objective: ObjectiveName, **fields: Any) -> Rows:
    file = write_rows(folder / "train.jsonl", rows)
    dataset = Dataset.model_validate({"train": [{"uri": f"file://{file}"}], "validationFraction": 0.3, **fields})
    tokenizer = model.load_tokenizer(base, "the tiny model")
    return load(
        dataset,
        Stores(secrets=folder, allow_file=True),
        folder,
        Encoder(tokenizer, [tokenizer.eos_token_id]),
        forms=FORMS[objective],
        tokenizer="tiny",
        seed=3,
        context=None,
    )


@pytest.mark.parametrize("packing", [False, True])
def test_a_repeated_row_is_on_one_side_of_the_split(tmp_path: Path, base_model: Path, *, packing: bool) -> None:
    rows = divided(tmp_path, base_model, ROWS * 3, ObjectiveName.SFT, duplicates="Keep", packing=packing)
    assert (rows.counted.rows, rows.counted.validation_rows) == (27, 9)
    assert rows.counted.also_trained is None
    if not packing:
        assert {tuple(row) for row in rows.train["input_ids"]}.isdisjoint(map(tuple, rows.validation["input_ids"]))


def test_both_answers_of_a_pair_are_on_one_side_of_the_split(tmp_path: Path, base_model: Path) -> None:
    pairs = [{"prompt": f"Door {number}?", "chosen": " green", "rejected": " blue"} for number in range(20)]
    rows = divided(tmp_path, base_model, pairs, ObjectiveName.KTO)
    assert (rows.counted.rows, rows.counted.validation_rows) == (28, 12)
    assert (sum(rows.train["desirable"]), sum(rows.validation["desirable"])) == (14, 6)
    tokenizer = model.load_tokenizer(base_model, "the tiny model")
    prompts = [
        {tokenizer.decode(ids).split("?")[0] for ids in part["input_ids"]} for part in (rows.train, rows.validation)
    ]
    assert (len(prompts[0]), len(prompts[1]), prompts[0] & prompts[1]) == (14, 6, set())
