from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.api.bad_manifests import BAD_MANIFESTS
from tests.trainer.trainer_rig import Workbench, chat_row, chat_rows, write_rows
from tunesmith.api.conditions import FailureReason
from tunesmith_trainer.errors import InvalidSpecError
from tunesmith_trainer.main import run
from tunesmith_trainer.manifest import load_job

if TYPE_CHECKING:
    from pathlib import Path

GOOD = chat_row("Who?", "Marta.")


def message(role: object, content: object, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


def messages(*turns: object) -> dict[str, object]:
    return {"messages": list(turns)}


BAD_ROWS: dict[str, tuple[list[Any], str]] = {
    "no rows": ([], "train.jsonl is empty"),
    "blank lines only": (["", "  "], "train.jsonl is empty"),
    "messages missing": ([GOOD] * 16 + [{"text": "x"}], "train.jsonl line 17: 'messages' is missing"),
    "first row unknown": (
        [{"title": "x"}],
        "line 1: has no columns that can be learned from: a row needs 'messages', or 'prompt' and 'completion'",
    ),
    "blank lines count": ([GOOD, "", "{}"], "train.jsonl line 3: 'messages' is missing"),
    "not JSON": ([GOOD, '{"messages": [}'], "train.jsonl line 2: is not JSON: Expecting value at column 15"),
    "not an object": ([GOOD, "[1, 2]"], "train.jsonl line 2: is not a JSON object but a list"),
    "a JSON array file": (
        ["[", json.dumps(GOOD) + ",", json.dumps(GOOD), "]"],
        "line 1: is not JSON: Expecting value at column 2; a list of rows needs a file whose name ends with",
    ),
    "rows over several lines": (
        [json.dumps(GOOD, indent=1)],
        "column 2; each row must be on one line, or in a list in a .json file",
    ),
    "not UTF-8": ([GOOD, b'{"messages": "\xff"}'], "train.jsonl line 2: is not UTF-8 at byte 15"),
    "nested too deeply": ([GOOD, "[" * 100_000], "train.jsonl line 2: is JSON that cannot be read"),
    "null messages": ([{"messages": None}], "train.jsonl line 1: 'messages' is null, not a list"),
    "empty messages": ([{"messages": []}], "train.jsonl line 1: 'messages' is empty"),
    "message is a string": ([messages("hello")], "message 1 is a string, not an object"),
    "no role": ([messages({"content": "hello"})], "message 1: 'role' is missing"),
    "no content": ([messages(message("user", "a"), {"role": "assistant"})], "message 2: 'content' is missing"),
    "unknown role": (
        [messages(message("moderator", "a"), message("assistant", "b"))],
        "message 1: unknown role 'moderator', expected one of system, developer, user, assistant",
    ),
    "null content": (
        [messages(message("user", "a"), message("assistant", None))],
        "message 2 (assistant): 'content' is null, not a string",
    ),
    "boolean content": (
        [messages({"role": "user", "content": True}, message("assistant", "b"))],
        "message 1 (user): 'content' is a boolean, not a string",
    ),
    "empty content": (
        [messages(message("user", "a"), message("assistant", " "))],
        "message 2 (assistant): 'content' is empty",
    ),
    "another name for messages": (
        [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}],
        "it has 'conversations'; did you mean dataset.columns {messages: conversations}?",
    ),
    "other names for prompt and completion": (
        [{"question": "a", "answer": "b"}],
        "did you mean dataset.columns {prompt: question, completion: answer}?",
    ),
    "images beside the text": (
        [messages(message("user", "a", images=["a.png"]), message("assistant", "b"))],
        "message 1: has 'images', and only text can be learned",
    ),
    "a question that is to be learned": (
        [messages(message("user", "a", train=True), message("assistant", "b"))],
        "message 1 (user): 'train' is True; only the assistant's messages are learned",
    ),
    "two system prompts": (
        [{**messages(message("system", "a"), *GOOD["messages"]), "system": "b"}],
        "has a system message, and another text in 'system': remove one of them",
    ),
    "a history of texts": (
        [{**GOOD, "history": ["a"]}],
        "message 1 is a string, not an object",
    ),
    "tools for a text": (
        [{"prompt": "a", "completion": "b", "tools": [{"name": "lookup"}]}],
        "has tools, but 'prompt' is a text: write it as messages",
    ),
    "a call without a name": (
        [messages(message("user", "a"), message("assistant", None, tool_calls=[{"id": "1"}]))],
        "message 2: 'tool_calls' has a call without 'function' and its 'name'",
    ),
    "an image": (
        [messages(message("user", [{"type": "image", "url": "x"}]), message("assistant", "b"))],
        "message 1 (user): 'content' has a part that is not text",
    ),
    "tools that are no list": ([{**GOOD, "tools": 7}], "train.jsonl line 1: 'tools' is not a list of objects"),
    "a weight of a half": (
        [messages(message("user", "a"), message("assistant", "b", weight=0.5))],
        "message 2 (assistant): 'weight' is 0.5; only the assistant's messages may have one, 0 or 1",
    ),
    "ends with the user": (
        [messages(message("user", "a"))],
        "the last message has the role user: it must be the assistant's",
    ),
    "starts with the assistant": ([messages(message("assistant", "a"))], "the first message is the assistant's"),
    "completion missing": ([{"prompt": "a"}], "train.jsonl line 1: 'completion' is missing"),
    "prompt missing": ([{"completion": "a"}], "train.jsonl line 1: 'prompt' is missing"),
    "null prompt": ([{"prompt": None, "completion": "b"}], "'prompt' is null, not a string"),
    "both forms": (
        [{**GOOD, "prompt": "a", "completion": "b"}],
        "line 1: has the columns of Messages and PromptCompletion: select one of them with dataset.format",
    ),
    "mixed forms": (
        [GOOD, {"prompt": "a", "completion": "b"}],
        "train.jsonl line 2: 'messages' is missing (the rows from train.jsonl line 1 on have it)",
    ),
    "one row, nothing to hold out": ([GOOD], "the training rows need at least 2 rows: there are only 1"),
    "preferences": (
        [{"prompt": "a", "chosen": "b", "rejected": "c"}],
        "has the dataset.format Preference, which this objective cannot learn from; it learns from Messages",
    ),
    "several": ([GOOD, "x", GOOD, "y", "z", "{}", "{}"], "train.jsonl line 2: is not JSON"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_with_file_line_and_reason(bench: Workbench, name: str) -> None:
    rows, expected = BAD_ROWS[name]
    ran = bench.run("validate", bench.job(rows))
    assert expected in ran.result.message
    assert ran.result.reason is FailureReason.DATASET_INVALID
    assert ran.code == 2


def test_rows_of_another_objective_name_it(bench: Workbench) -> None:
    ran = bench.run("validate", bench.job([{"prompt": "a", "chosen": "b", "rejected": "c"}]))
    assert "choose another objective (objective.dpo, objective.orpo, objective.kto), or set" in ran.result.message


def test_the_columns_that_an_objective_needs_are_named(bench: Workbench) -> None:
    job = bench.job([{"input": "a", "preferred_output": "b"}])
    ran = bench.run("validate", job | {"spec": job["spec"] | {"objective": {"kto": {}}}})
    assert (
        "a row needs 'chosen' and 'rejected', or 'prompt' and 'completion' and 'label'; it has 'input'"
        in ran.result.message
    )


def test_further_bad_rows_are_counted(bench: Workbench) -> None:
    ran = bench.run("validate", bench.job([GOOD, "x", "y", "z", "{}", "{}"]))
    assert ran.result.message.count("train.jsonl line") - ran.result.message.count("from train.jsonl line") == 3
    assert "and 2 more rows with errors" in ran.result.message


def test_rows_that_are_all_too_long_are_reported_with_the_longest(bench: Workbench) -> None:
    job = bench.job()
    job["spec"]["dataset"]["maxLength"] = 16
    ran = bench.run("validate", job)
    assert ran.result.reason is FailureReason.DATASET_INVALID
    assert "24 of 24 rows have more than maxLength 16 tokens (the longest has " in ran.result.message
    assert "raise dataset.maxLength, or set dataset.overlong to Truncate" in ran.result.message


def test_rows_beyond_the_models_context_are_refused(bench: Workbench) -> None:
    ran = bench.run("validate", bench.job([*chat_rows(3), chat_row("Why?", "blue " * 600)]))
    assert (ran.code, ran.result.reason) == (2, FailureReason.INVALID_SPEC)
    assert "the base model's context of 512: set dataset.maxLength to at most 512" in ran.result.message


SPECS: dict[str, tuple[dict[str, Any], FailureReason, str]] = {
    "no method": ({"method": {}}, FailureReason.INVALID_SPEC, "method must have exactly one of lora, qlora, adaLora"),
    "two methods": (
        {"method": {"lora": {}, "qlora": {}}},
        FailureReason.INVALID_SPEC,
        "method must have exactly one of lora, qlora, adaLora",
    ),
    "rank 0": ({"method": {"lora": {"rank": 0}}}, FailureReason.INVALID_SPEC, "spec.method.lora.rank"),
    "rank -4": ({"method": {"lora": {"rank": -4}}}, FailureReason.INVALID_SPEC, "rank is -4: it must be at least 1"),
    "unknown field": ({"method": {"lora": {"rnak": 4}}}, FailureReason.INVALID_SPEC, "spec.method.lora.rnak"),
    "unknown module": (
        {"method": {"lora": {"targetModules": ["q_prj"]}}},
        FailureReason.INVALID_SPEC,
        "the base model has no module named q_prj; did you mean q_proj?",
    ),
    "far off module": (
        {"method": {"lora": {"targetModules": ["zzz"]}}},
        FailureReason.INVALID_SPEC,
        "it has down_proj, gate_proj",
    ),
    "not linear": (
        {"method": {"lora": {"targetModules": ["embed_tokens"]}}},
        FailureReason.INVALID_SPEC,
        "embed_tokens is not a linear module",
    ),
    "output layer": (
        {"method": {"lora": {"targetModules": ["lm_head"]}}},
        FailureReason.INVALID_SPEC,
        "lm_head is the output layer",
    ),
    "all-linear and a name": (
        {"method": {"lora": {"targetModules": ["all-linear", "q_proj"]}}},
        FailureReason.INVALID_SPEC,
        "all-linear includes all",
    ),
    "micro batch": (
        {"hyperparameters": {"batchSize": 8, "microBatchSize": 3}},
        FailureReason.INVALID_SPEC,
        "microBatchSize must divide",
    ),
    "epochs and steps": (
        {"hyperparameters": {"epochs": 1, "maxSteps": 3}},
        FailureReason.INVALID_SPEC,
        "mutually exclusive",
    ),
    "more GPUs than sequences": (
        {"resources": {"gpus": 16}},
        FailureReason.INVALID_SPEC,
        "must be at least resources.nodes",
    ),
    "no base": (
        {"baseModel": {"uri": "file:///nowhere/model"}},
        FailureReason.BASE_MODEL_NOT_FOUND,
        "file:///nowhere/model does not exist",
    ),
    "odd scheme": (
        {"dataset": {"train": [{"uri": "http://example.org/a.jsonl"}]}},
        FailureReason.INVALID_SPEC,
        "spec.dataset.train[0].uri",
    ),
    "no data": (
        {"dataset": {"train": [{"uri": "file:///nowhere/rows.jsonl"}]}},
        FailureReason.DATASET_NOT_FOUND,
        "file:///nowhere/rows.jsonl does not exist",
    ),
    "climbing uri": (
        {"dataset": {"train": [{"uri": "file:///tmp/../etc/x.jsonl"}]}},
        FailureReason.INVALID_SPEC,
        "must not contain '..'",
    ),
    "no secret": (
        {"dataset": {"train": [{"uri": "s3://bucket/rows.jsonl", "secretRef": {"name": "absent"}}]}},
        FailureReason.SECRET_NOT_FOUND,
        "the Secret absent does not exist, is empty or has no known key",
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_bad_spec_is_refused_on_the_cpu(bench: Workbench, name: str) -> None:
    spec, reason, expected = SPECS[name]
    ran = bench.run("validate", bench.job(**spec))
    assert expected in ran.result.message
    assert ran.result.reason is reason
    assert ran.code == 2


@pytest.mark.parametrize("name", BAD_MANIFESTS)
def test_a_bad_manifest_is_refused(tmp_path: Path, name: str) -> None:
    text, sentence = BAD_MANIFESTS[name]
    manifest = tmp_path / "job.yaml"
    manifest.write_text(text)
    with pytest.raises(InvalidSpecError) as refused:
        load_job(manifest)
    assert sentence in str(refused.value)
    assert str(refused.value).startswith(f"{manifest}: ")


def test_a_bad_manifest_is_a_result(bench: Workbench) -> None:
    ran = bench.run("validate", BAD_MANIFESTS["PEFT's r"][0])
    assert "did you mean rank?" in ran.result.message
    assert (ran.code, ran.result.reason) == (2, FailureReason.INVALID_SPEC)


def test_a_missing_manifest_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["validate", "--job", str(tmp_path / "none.yaml"), "--progress-port", "0"]) == 2
    assert "cannot read the manifest" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["validate", "train"])
def test_local_files_are_refused_in_a_cluster(bench: Workbench, command: str) -> None:
    ran = bench.run(command, bench.job(), allow_file=False, output=f"file://{bench.folder}/artifact")
    assert (ran.code, ran.result.reason) == (2, FailureReason.INVALID_SPEC)
    assert "file:// is allowed only in runs without a cluster" in ran.result.message


def test_a_folder_without_a_model_is_refused(bench: Workbench, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").touch()
    ran = bench.run("validate", bench.job(baseModel={"uri": f"file://{tmp_path}/empty"}))
    assert (ran.code, ran.result.reason) == (2, FailureReason.BASE_MODEL_NOT_FOUND)
    assert "it needs config.json, tokenizer.json and *.safetensors, and contains notes.txt" in ran.result.message


def test_a_missing_gpu_is_reported(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    ran = bench.run("train", bench.job(resources={"gpus": 1}))
    assert (ran.code, ran.result.reason) == (2, FailureReason.INVALID_SPEC)
    assert "this machine has no visible GPU: set it to 0" in ran.result.message


def test_data_that_changed_since_validation_is_refused(bench: Workbench) -> None:
    job = bench.job()
    validated = bench.run("validate", job).result
    job["status"] = {"resolved": validated.resolved.manifest() if validated.resolved else None}
    assert bench.run("validate", job).code == 0
    write_rows(bench.folder / "train.jsonl", chat_rows(25))
    ran = bench.run("train", job)
    assert (ran.code, ran.result.reason) == (2, FailureReason.INVALID_SPEC)
    assert "the data set changed since the job was validated" in ran.result.message
