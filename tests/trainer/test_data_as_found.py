"""Rows as other tools write them: columns, roles and keys of other layouts, and files of other programs."""

from __future__ import annotations

import codecs
import gzip
import itertools
import json
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.trainer.trainer_rig import Workbench, chat_row, chat_rows, write_rows
from tunesmith.api.conditions import FailureReason
from tunesmith.api.dataset import Dataset
from tunesmith.api.finetunejob_status import DropReason, IgnoredKey
from tunesmith.api.objective import ObjectiveName
from tunesmith_trainer.base_model import model
from tunesmith_trainer.data import IGNORED
from tunesmith_trainer.data.formats import DataFile
from tunesmith_trainer.data.forms import FORMS, RowForm
from tunesmith_trainer.data.report import RowReport
from tunesmith_trainer.data.rows import read
from tunesmith_trainer.data.sources import Source
from tunesmith_trainer.errors import DatasetInvalidError, InvalidSpecError
from tunesmith_trainer.manifest import load_job
from tunesmith_trainer.preflight.prepare import prepare
from tunesmith_trainer.store import Stores

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from tests.trainer.trainer_rig import Ran
    from tunesmith.api.finetunejob_status import Preflight

ANY = frozenset(RowForm) - {RowForm.UNPAIRED_PREFERENCE}
SFT, DPO, KTO = (FORMS[name] for name in (ObjectiveName.SFT, ObjectiveName.DPO, ObjectiveName.KTO))
PIRATE = "Answer like a pirate."


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def found(path: Path, *, forms: Collection[RowForm] = ANY, **fields: Any) -> tuple[list[dict[str, Any]], RowReport]:
    """Return the values of a file's rows, and the report."""
    dataset = Dataset.model_validate({"train": [{"uri": "s3://bucket/rows"}], **fields})
    report = RowReport()
    rows = list(read([Source("s3://bucket/rows", [DataFile(path.name, path)])], dataset, report, forms=forms))
    return [row.value for row in rows], report


def values(folder: Path, *rows: Any, forms: Collection[RowForm] = ANY, **fields: Any) -> list[dict[str, Any]]:
    return found(write_rows(folder / "rows.jsonl", list(rows)), forms=forms, **fields)[0]


def dropped(folder: Path, row: Any, *, forms: Collection[RowForm] = SFT) -> tuple[DropReason, str]:
    """Return the reason for dropping a row among usable ones, and the problem."""
    kept, report = found(write_rows(folder / "rows.jsonl", [*chat_rows(2), row]), forms=forms)
    assert len(kept) == 2
    ((reason, examples),) = report.examples.items()
    return reason, examples[0].removeprefix("rows.jsonl line 3: ")


CONTEXT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "system of a chat": (
        {"messages": chat_row("a", "b")["messages"], "system": PIRATE},
        {"messages": [system(PIRATE), user("a"), answer("b")]},
    ),
    "system that the chat has too": (
        {"messages": [system(PIRATE), user("a"), answer("b")], "system": PIRATE},
        {"messages": [system(PIRATE), user("a"), answer("b")]},
    ),
    "system without text": ({"messages": chat_row("a", "b")["messages"], "system": ""}, chat_row("a", "b")),
    "system and history of an instruction": (
        {"instruction": "c", "input": "", "output": "d", "system": PIRATE, "history": [["a", "b"]]},
        {"messages": [system(PIRATE), user("a"), answer("b"), user("c"), answer("d")]},
    ),
    "history as JSON text": (
        {"instruction": "c", "output": "d", "history": '[["a", "b"]]'},
        {"messages": [user("a"), answer("b"), user("c"), answer("d")]},
    ),
    "history as messages": (
        {"instruction": "c", "output": "d", "history": chat_row("a", "b")["messages"]},
        {"messages": [user("a"), answer("b"), user("c"), answer("d")]},
    ),
    "no history": ({"instruction": "c", "output": "d", "system": None, "history": []}, chat_row("c", "d")),
    "system of a prompt": (
        {"prompt": "a", "completion": "b", "system": PIRATE},
        {"prompt": [system(PIRATE), user("a")], "completion": [answer("b")]},
    ),
    "system without text of a prompt": (
        {"prompt": "a", "completion": "b", "system": ""},
        {"prompt": [user("a")], "completion": [answer("b")]},
    ),
    "system of a pair": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "system": PIRATE},
        {"prompt": [system(PIRATE), user("a")], "chosen": [answer("b")], "rejected": [answer("c")]},
    ),
    "system of two whole chats": (
        {
            "chosen": chat_row("a", "b")["messages"],
            "rejected": chat_row("a", "c")["messages"],
            "system": PIRATE,
        },
        {"prompt": [system(PIRATE), user("a")], "chosen": [answer("b")], "rejected": [answer("c")]},
    ),
}


@pytest.mark.parametrize("name", CONTEXT)
def test_system_prompts_and_earlier_turns_of_their_own_columns(tmp_path: Path, name: str) -> None:
    row, expected = CONTEXT[name]
    assert values(tmp_path, row) == [expected]


def test_columns_of_system_prompts_and_earlier_turns_can_be_named(tmp_path: Path) -> None:
    row = {"instruction": "c", "output": "d", "role_play": PIRATE, "past": [["a", "b"]]}
    (value,) = values(tmp_path, row, columns={"system": "role_play", "history": "past"})
    assert value == {"messages": [system(PIRATE), user("a"), answer("b"), user("c"), answer("d")]}


SOME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "instruction": (
        {"instruction": "c", "output": "d"},
        {"messages": [user("c"), answer("d")]},
    ),
    "chat": (chat_row("c", "d"), {"messages": [user("c"), answer("d")]}),
    "texts": ({"prompt": "c", "completion": "d"}, {"prompt": [user("c")], "completion": [answer("d")]}),
    "pair": (
        {"prompt": "c", "chosen": "d", "rejected": "e"},
        {"prompt": [user("c")], "chosen": [answer("d")], "rejected": [answer("e")]},
    ),
}
"""Rows without a system prompt and earlier turns, and what they become beside rows with them."""


@pytest.mark.parametrize("extension", ["jsonl", "jsonl.gz", "json", "parquet"])
@pytest.mark.parametrize("name", SOME)
def test_system_prompts_and_earlier_turns_of_some_rows_only(tmp_path: Path, name: str, extension: str) -> None:
    row, expected = SOME[name]
    rows = [row, row | {"system": PIRATE}, row | {"history": [["a", "b"]]}, row]
    file = tmp_path / f"rows.{extension}"
    if extension == "parquet":
        pq.write_table(pa.Table.from_pylist([dict.fromkeys(("system", "history")) | row for row in rows]), file)
    else:
        text = json.dumps(rows) if extension == "json" else "\n".join(map(json.dumps, rows))
        file.write_bytes(gzip.compress(text.encode()) if extension.endswith("gz") else text.encode())
    begin = "messages" if "messages" in expected else "prompt"
    found_values, _ = found(file, forms=DPO if name == "pair" else SFT, duplicates="Keep")
    assert found_values == [
        expected,
        expected | {begin: [system(PIRATE), *expected[begin]]},
        expected | {begin: [user("a"), answer("b"), *expected[begin]]},
        expected,
    ]


def test_texts_that_mention_a_system_prompt_stay_texts(tmp_path: Path) -> None:
    row = {"prompt": 'The key is "system":', "completion": "yes"}
    assert values(tmp_path, row, forms=SFT) == [row]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"system": "sytem"},
            "dataset.columns.system is 'sytem', a column that no row has: did you mean system?",
        ),
        ({"tools": "functions"}, "dataset.columns.tools is 'functions', a column that no row has: The first row has"),
        ({"text": "body"}, "dataset.columns.text is 'body', a column that no row has"),
    ],
)
@pytest.mark.parametrize("extension", ["jsonl", "parquet"])
def test_a_mistyped_optional_column_is_refused(
    bench: Workbench, columns: dict[str, str], message: str, extension: str
) -> None:
    rows = [{**row, "system": PIRATE, "id": number} for number, row in enumerate(chat_rows(4))]
    file = bench.folder / f"rows.{extension}"
    if extension == "jsonl":
        write_rows(file, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    ran = validated(bench, {"train": [{"uri": f"file://{file}"}], "columns": columns})
    assert ran.result.reason is FailureReason.INVALID_SPEC
    assert message in ran.result.message


def test_an_optional_column_may_be_in_some_of_the_rows_only(bench: Workbench) -> None:
    rows = chat_rows(5)
    rows[3]["functions"] = "[]"
    file = write_rows(bench.folder / "rows.jsonl", rows)
    held = write_rows(bench.folder / "held.jsonl", [chat_row("a", "b")])
    dataset = {"train": [{"uri": f"file://{file}"}], "columns": {"tools": "functions"}}
    counted(validated(bench, dataset | {"validation": [{"uri": f"file://{held}"}]}))


IMAGES: dict[str, tuple[Any, list[bool]]] = {
    "image": ([None, {"bytes": b"x" * 100, "path": None}, None, None], [True, False, True, True]),
    "images": ([[], [{"bytes": b"x" * 100, "path": "a.png"}], None, []], [True, False, True, True]),
    "video": ([None, "a.mp4", "", None], [True, False, True, True]),
}


@pytest.mark.parametrize("extension", ["parquet", "arrow", "jsonl"])
@pytest.mark.parametrize("name", IMAGES)
def test_rows_with_images_are_counted(tmp_path: Path, name: str, extension: str) -> None:
    given, used = IMAGES[name]
    rows = [row | {name: value} for row, value in zip(chat_rows(4), given, strict=True)]
    file = tmp_path / f"rows.{extension}"
    if extension == "jsonl":
        write_rows(file, json.loads(json.dumps(rows, default=repr)))
    elif extension == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(str(file), table.schema) as writer:
            writer.write_table(table)
    kept, report = found(file)
    assert kept == [row for row, use in zip(chat_rows(4), used, strict=True) if use]
    where = "line" if extension == "jsonl" else "row"
    assert report.examples == {
        DropReason.NOT_RENDERED: [
            f"rows.{extension} {where} 2: has '{name}', and only text can be learned: remove that column"
        ]
    }


def test_rows_with_parts_that_are_not_text_are_counted(tmp_path: Path) -> None:
    part = {"type": "image_url", "image_url": {"url": "https://host/a.png"}}
    given, text = dropped(tmp_path, {"messages": [{**user("a"), "content": [part]}, answer("b")]})
    assert (given, text) == (
        DropReason.NOT_RENDERED,
        "message 1 (user): 'content' has a part that is not text, and only text can be learned: remove it",
    )
    given, text = dropped(tmp_path, {"messages": [{**user("a"), "images": ["a.png"]}, answer("b")]})
    assert (given, text) == (
        DropReason.NOT_RENDERED,
        "message 1: has 'images', and only text can be learned: remove it",
    )


def call(name: str, arguments: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**more, "type": "function", "function": {"name": name, "arguments": arguments}}


MESSAGES: dict[str, tuple[list[Any], list[dict[str, Any]]]] = {
    "developer": (
        [{"role": "developer", "content": "Be brief.", "name": None}, user("a"), answer("b")],
        [{"role": "developer", "content": "Be brief."}],
    ),
    "prompter": ([{"role": "prompter", "text": "a"}, {"role": "assistant", "text": "b"}], []),
    "capitals": ([{"role": "Human", "content": "a"}, {"role": "Model", "content": "b"}], []),
    "human and gpt": ([{"from": "human", "value": "a", "id": 7}, {"from": "gpt", "value": "b"}], []),
    "user and bot": ([{"from": "user", "value": "a"}, {"from": "bot", "value": "b", "annotations": []}], []),
}


PARTS: dict[str, tuple[Any, Any]] = {
    "one part": ([{"type": "text", "text": "a"}], "a"),
    "a text": (["a"], "a"),
    "a part of another interface": ([{"type": "input_text", "text": "a"}], "a"),
    "several parts": (
        ["a", {"type": "text", "text": "b", "name": None}],
        [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_content_in_parts(tmp_path: Path, name: str) -> None:
    given, expected = PARTS[name]
    (value,) = values(tmp_path, {"messages": [{"role": "user", "content": given}, answer("b")]})
    assert value["messages"][0]["content"] == expected


def test_properties_of_parts_are_counted(tmp_path: Path) -> None:
    part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    rows, report = found(
        write_rows(tmp_path / "rows.jsonl", [{"messages": [{**user(""), "content": [part]}, answer("b")]}])
    )
    assert rows == [chat_row("a", "b")]
    assert report.ignored() == [IgnoredKey(key="cache_control", messages=1)]


@pytest.mark.parametrize("name", MESSAGES)
def test_roles_and_keys_of_other_layouts(tmp_path: Path, name: str) -> None:
    given, before = MESSAGES[name]
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": given}])
    rows, report = found(path)
    assert rows == [{"messages": [*before, user("a"), answer("b")]}]
    assert report.ignored() is None


CALLS: dict[str, list[dict[str, Any]]] = {
    "function_call and observation": [
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": null}}'},
        {"from": "observation", "value": "rain"},
    ],
    "function_call and function of OpenAI": [
        {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city": null}'}},
        {"role": "function", "content": "rain"},
    ],
    "call without an envelope": [
        {"role": "assistant", "content": "", "tool_calls": [{"name": "weather", "arguments": {"city": None}}]},
        {"role": "tool_response", "content": "rain"},
    ],
    "calls as JSON text": [
        {"role": "assistant", "tool_calls": '[{"function": {"name": "weather", "arguments": {"city": null}}}]'},
        {"role": "ipython", "content": "rain"},
    ],
}


@pytest.mark.parametrize("name", CALLS)
def test_tool_calls_of_other_layouts_keep_the_nulls_of_json(tmp_path: Path, name: str) -> None:
    (value,) = values(tmp_path, {"messages": [user("Weather?"), *CALLS[name], answer("It rains.")]})
    assert value["messages"][1] == answer("", tool_calls=[call("weather", {"city": None})])
    assert value["messages"][2] == {"role": "tool", "content": "rain"}


def test_a_result_of_a_tool_may_be_an_object(tmp_path: Path) -> None:
    calls = [call("weather", {})]
    chat = [user("Weather?"), answer("", tool_calls=calls), {"role": "tool", "content": {"sky": "é"}}, answer("Rain.")]
    assert values(tmp_path, {"messages": chat})[0]["messages"][2]["content"] == '{"sky": "é"}'


BARE = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"default": None}}}}
TOOL = {"type": "function", "function": BARE}
TOOLS: dict[str, tuple[Any, list[Any]]] = {
    "empty text": ("", []),
    "blank text": (" ", []),
    "null": (None, []),
    "null as JSON text": ("null", []),
    "an empty list as JSON text": ("[]", []),
    "JSON text": (json.dumps([TOOL]), [TOOL]),
    "a list of JSON texts": ([json.dumps(TOOL)], [TOOL]),
    "a function without an envelope": ([BARE], [TOOL]),
    "one tool": (TOOL, [TOOL]),
    "a function of another interface": ([{"type": "function", **BARE}], [TOOL]),
    "a schema by another name": ([{"name": "weather", "input_schema": BARE["parameters"]}], [TOOL]),
}


@pytest.mark.parametrize("name", TOOLS)
def test_tools_of_other_layouts(tmp_path: Path, name: str) -> None:
    given, expected = TOOLS[name]
    (value,) = values(tmp_path, {**chat_row("a", "b"), "tools": given})
    assert value.get("tools", []) == expected


def test_functions_beside_messages_are_tools(tmp_path: Path) -> None:
    function = {"name": "weather", "parameters": {"type": "object", "properties": {}}}
    row = {"messages": [user("a"), answer("b")], "functions": [function]}
    tools = [{"type": "function", "function": function}]
    assert values(tmp_path, row)[0]["tools"] == tools
    other = {"name": "other", "parameters": {"type": "object", "properties": {}}}
    assert values(tmp_path, row | {"tools": [other]})[0]["tools"] == [{"type": "function", "function": other}]
    assert "tools" not in values(tmp_path, row | {"functions": ["it tells the weather"]})[0]
    named = values(tmp_path, row | {"mine": [other]}, columns={"tools": "mine"})
    assert named[0]["tools"] == [{"type": "function", "function": other}]


def test_keys_of_functions_that_no_template_receives_are_counted(tmp_path: Path) -> None:
    row = {**chat_row("a", "b"), "tools": [{**TOOL, "function": {**BARE, "returns": {"type": "string"}}}]}
    _, report = found(write_rows(tmp_path / "rows.jsonl", [row]))
    assert report.ignored() == [IgnoredKey(key="tools.returns", messages=1)]


def test_tools_that_are_not_functions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetInvalidError, match="'tools' has an entry without 'function' and its 'name'"):
        values(tmp_path, {**chat_row("a", "b"), "tools": [{"type": "code_interpreter"}]})


def test_nulls_that_only_fill_up_the_structs_of_a_columnar_file_are_removed(tmp_path: Path) -> None:
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {"properties": {key: {"type": "string"}}}}}
        for name, key in (("weather", "city"), ("stock", "ticker"))
    ]
    rows = [
        {
            "messages": [user("a"), answer("", tool_calls=[call(name, {key: "x"})]), answer("b")],
            "tools": [tools[number]],
        }
        for number, (name, key) in enumerate((("weather", "city"), ("stock", "ticker")))
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    unified = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert unified[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"city": "x", "ticker": None}
    assert found(tmp_path / "rows.parquet")[0] == rows
    texts = [{**row, "tools": json.dumps([TOOL]), "messages": json.dumps(row["messages"])} for row in rows]
    pq.write_table(pa.Table.from_pylist(texts), tmp_path / "texts.parquet")
    assert [row["tools"] for row in found(tmp_path / "texts.parquet")[0]] == [[TOOL], [TOOL]]


def test_messages_stored_as_lists_of_their_values(tmp_path: Path) -> None:
    rows = [{"messages": {"from": ["human", "gpt"], "value": ["a", "b"]}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert found(tmp_path / "rows.parquet")[0] == [chat_row("a", "b")]


WEIGHTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "loss false": ({"loss": False}, {"weight": 0}),
    "loss true": ({"loss": True}, {}),
    "loss null": ({"loss": None}, {}),
    "train false": ({"train": False}, {"weight": 0}),
    "train 0": ({"train": 0}, {"weight": 0}),
    "weight 0.0": ({"weight": 0.0}, {"weight": 0}),
    "weight 1": ({"weight": 1}, {"weight": 1}),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_answers_that_are_not_learned(tmp_path: Path, name: str) -> None:
    given, expected = WEIGHTS[name]
    (value,) = values(tmp_path, {"messages": [{**user("a"), "loss": None, "train": False}, answer("b", **given)]})
    assert value == {"messages": [user("a"), answer("b", **expected)]}


def test_unknown_keys_of_messages_are_counted(bench: Workbench) -> None:
    rows = [
        {"messages": [{**user(f"a{number}"), "mood": "calm"}, answer("b", mood="glad", pace=2)]} for number in range(4)
    ]
    ran = bench.run("validate", bench.job(rows))
    assert ran.result.preflight is not None, ran.result.message
    assert ran.result.preflight.ignored_keys == [IgnoredKey(key="mood", messages=8), IgnoredKey(key="pace", messages=4)]
    assert "    keys of messages that are not used: mood (8), pace (4)" in ran.lines


INCOMPLETE: dict[str, tuple[Any, DropReason, str]] = {
    "ends with the user": (
        {"messages": [user("a"), answer("b"), user("c")]},
        DropReason.INCOMPLETE,
        "the last message has the role user",
    ),
    "begins with the assistant": (
        {"messages": [answer("a"), user("b"), answer("c")]},
        DropReason.INCOMPLETE,
        "the first message is the assistant's",
    ),
    "only a system message": (
        {"messages": [system("a")]},
        DropReason.INCOMPLETE,
        "the last message has the role system",
    ),
    "half of a surrogate pair": (
        '{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "b"}]}',
        DropReason.UNDECODABLE,
        "contains \\ud83d, half of a surrogate pair",
    ),
    "half of a surrogate pair in JSON text": (
        {"messages": json.dumps([user("\ud83d"), answer("b")])},
        DropReason.UNDECODABLE,
        "contains \\ud83d, half of a surrogate pair",
    ),
    "arguments that are a list": (
        {"messages": [user("a"), {"role": "function_call", "content": '{"name": "x", "arguments": [1]}'}]},
        DropReason.UNDECODABLE,
        "'arguments' is a list, not an object",
    ),
    "not a number": ({"messages": [user("a"), answer("b") | {"content": float("nan")}]}, DropReason.NULL, "message 2"),
}


@pytest.mark.parametrize("name", INCOMPLETE)
def test_a_row_without_anything_to_learn_is_dropped_and_counted(tmp_path: Path, name: str) -> None:
    row, reason, problem = INCOMPLETE[name]
    given, text = dropped(tmp_path, row)
    assert given is reason
    assert problem in text


def test_whole_surrogate_pairs_are_characters(tmp_path: Path) -> None:
    line = '{"prompt": "\\ud83d\\ude00 \\\\ud83d", "completion": "\\ud55c"}'
    assert values(tmp_path, line) == [{"prompt": "😀 \\ud83d", "completion": "한"}]


def test_incomplete_chats_are_an_error_if_they_are_half_of_the_rows(tmp_path: Path) -> None:
    with pytest.raises(DatasetInvalidError, match="line 2: the last message has the role user"):
        values(tmp_path, chat_row("a", "b"), {"messages": [user("c")]})
    with pytest.raises(DatasetInvalidError, match="line 4: the last message has the role user"):
        values(tmp_path, *chat_rows(3), {"messages": [user("c")]}, unusable="Error")


LABELS = [True, 1, 1.0, "True", "1", "1.0", " true"]


@pytest.mark.parametrize("label", [False, "False", "false", 0, 0.0, "0", "0.0"])
def test_an_answer_that_is_rated_as_bad_is_not_learned_as_a_good_one(tmp_path: Path, label: object) -> None:
    rows = [{"prompt": "a", "completion": "good", "label": True}, {"prompt": "a", "completion": "bad", "label": label}]
    with pytest.raises(DatasetInvalidError, match=r"rated as bad and would be learned .* set objective\.kto"):
        values(tmp_path, *rows, forms=SFT)


@pytest.mark.parametrize("label", LABELS)
def test_labels(tmp_path: Path, label: Any) -> None:
    rows = [{"prompt": "a", "completion": "b", "label": label}]
    assert values(tmp_path, *rows, forms=KTO) == [{"prompt": "a", "completion": "b", "label": True}]


def test_numbers_are_texts(tmp_path: Path) -> None:
    assert values(tmp_path, {"instruction": "Add.", "input": 1, "output": 2.5}) == [chat_row("Add.\n\n1", "2.5")]
    assert values(tmp_path, chat_row("a", "b"), {"messages": [user("c"), answer("d") | {"content": 7}]})[1] == chat_row(
        "c", "7"
    )


PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "prompt as text, answers as messages": (
        {"prompt": "a", "chosen": [answer("b")], "rejected": [answer("c")]},
        {"prompt": [user("a")], "chosen": [answer("b")], "rejected": [answer("c")]},
    ),
    "prompt as messages, answers as texts": (
        {"prompt": [user("a")], "chosen": "b", "rejected": "c"},
        {"prompt": [user("a")], "chosen": [answer("b")], "rejected": [answer("c")]},
    ),
    "prompt as messages, whole chats": (
        {"prompt": [user("a")], "chosen": [user("a"), answer("b")], "rejected": [user("a"), answer("c")]},
        {"prompt": [user("a")], "chosen": [answer("b")], "rejected": [answer("c")]},
    ),
    "answers that are one message, of LLaMA-Factory": (
        {
            "prompt": [{"from": "human", "value": "a"}],
            "chosen": {"from": "gpt", "value": "b"},
            "rejected": {"from": "gpt", "value": "c"},
        },
        {"prompt": [user("a")], "chosen": [answer("b")], "rejected": [answer("c")]},
    ),
    "prompt as text, answers that are one message": (
        {"prompt": "a", "chosen": answer("b"), "rejected": answer("c")},
        {"prompt": [user("a")], "chosen": [answer("b")], "rejected": [answer("c")]},
    ),
    "dialogues as texts": (
        {"chosen": "\n\nHuman: a\n\nAssistant: by a", "rejected": "\n\nHuman: a\n\nAssistant: by b"},
        {"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": " by a", "rejected": " by b"},
    ),
    "texts": (
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " black."},
    ),
    "one text continues the other": (
        {"chosen": "The sky is blue", "rejected": "The sky is"},
        {"prompt": "The sky", "chosen": " is blue", "rejected": " is"},
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_other_layouts(tmp_path: Path, name: str) -> None:
    row, expected = PAIRS[name]
    assert values(tmp_path, row, forms=DPO) == [expected]


def test_a_completion_is_a_text_after_messages_or_messages_after_a_text(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": [answer("b")]}, {"prompt": [user("c")], "completion": "d"}]
    assert values(tmp_path, *rows) == [
        {"prompt": [user("a")], "completion": [answer("b")]},
        {"prompt": [user("c")], "completion": [answer("d")]},
    ]


def test_pairs_without_a_common_prompt_are_dropped(tmp_path: Path) -> None:
    rows = [{"chosen": f"Why {number}? a", "rejected": f"Why {number}? b"} for number in range(3)]
    path = write_rows(tmp_path / "rows.jsonl", [*rows, {"chosen": "one", "rejected": "two"}])
    kept, report = found(path, forms=DPO)
    assert len(kept) == 3
    assert report.examples == {
        DropReason.INCOMPLETE: ["rows.jsonl line 4: 'chosen' and 'rejected' have no common prompt: add 'prompt'"]
    }


def test_the_form_that_the_objective_learns_from_is_chosen(tmp_path: Path) -> None:
    chats = chat_row("a", "b")["messages"], chat_row("a", "c")["messages"]
    row = {"prompt": "a", "prompt_id": "1", "messages": chats[0], "chosen": chats[0], "rejected": chats[1]}
    assert set(values(tmp_path, row, forms=DPO)[0]) == {"prompt", "chosen", "rejected"}
    assert set(values(tmp_path, row, forms=SFT)[0]) == {"messages"}


TEXT = '{"prompt": "a", "completion": "é"}\n{"prompt": "b\u2028", "completion": "d"}\n'
EXPECTED = [{"prompt": "a", "completion": "é"}, {"prompt": "b\u2028", "completion": "d"}]
FILES: dict[str, tuple[str, bytes]] = {
    "UTF-16": ("rows.jsonl", TEXT.encode("utf-16")),
    "UTF-16 BE": ("rows.jsonl", codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be")),
    "UTF-32": ("rows.jsonl", TEXT.encode("utf-32")),
    "list in UTF-16": ("rows.json", json.dumps(EXPECTED).encode("utf-16")),
    "table in UTF-16": ("rows.tsv", "prompt\tcompletion\na\té\nb\u2028\td\n".encode("utf-16")),
    "semicolons": ("rows.csv", "prompt;completion\na;é\nb\u2028;d\n".encode()),
    "semicolons named for Excel": ("rows.csv", "sep=;\r\nprompt;completion\r\na;é\r\nb\u2028;d\r\n".encode()),
    "tabs": ("rows.csv", "prompt\tcompletion\na\té\nb\u2028\td\n".encode()),
    "an index": ("rows.csv", ",prompt,completion\n0,a,é\n1,b\u2028,d\n".encode()),
    "a named index": ("rows.csv", "Unnamed: 0,prompt,completion,index\n0,a,é,7\n1,b\u2028,d,8\n".encode()),
    "below a key": ("rows.json", json.dumps({"data": EXPECTED}).encode()),
    "below a key after others": (
        "rows.json",
        json.dumps(
            {"version": "1.0", "tags": ["x"], "meta": {"a": []}, "data": EXPECTED, "end": None}, indent=1
        ).encode(),
    ),
    "one row per line": ("rows.json", TEXT.encode()),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_other_programs(tmp_path: Path, name: str) -> None:
    file, content = FILES[name]
    (tmp_path / file).write_bytes(content)
    assert found(tmp_path / file)[0] == EXPECTED


REFUSED: dict[str, tuple[str, bytes, str]] = {
    "LFS pointer": (
        "rows.parquet",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 1\n",
        "is a pointer of Git LFS, not the data: run `git lfs pull`",
    ),
    "git-annex pointer": ("rows.csv", b"/annex/objects/SHA256E-s1--aa.csv\n", "run `git annex get`"),
    "UTF-16 without a mark": ("rows.jsonl", TEXT.encode("utf-16-le"), "seems to be UTF-16: save it as UTF-8"),
    "damaged UTF-16": ("rows.jsonl", TEXT.encode("utf-16")[:-1], "is not valid UTF-16: save it as UTF-8"),
    "two lists": (
        "rows.json",
        json.dumps({"train": EXPECTED, "test": EXPECTED}).encode(),
        "has rows below several keys, 'train' and 'test': save each list as a file",
    ),
    "text after the object": ("rows.json", json.dumps({"data": EXPECTED}).encode() + b" x", "text after the end"),
    "a damaged list": ("rows.json", b'{"data": [{"prompt": "a", "completion": }]}', "rows.json row 1 is not JSON"),
    "no list": ("rows.json", b'{\n"a": 1}', "line 1: is not JSON"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_cannot_be_read_are_refused_with_the_fix(tmp_path: Path, name: str) -> None:
    file, content, message = REFUSED[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DatasetInvalidError) as error:
        found(tmp_path / file)
    assert message in str(error.value)


def test_a_suggestion_names_optional_columns_too(tmp_path: Path) -> None:
    with pytest.raises(DatasetInvalidError, match=r"did you mean dataset.columns \{output: response, input: context\}"):
        values(tmp_path, {"instruction": "a", "context": "b", "response": "c", "category": "d"})


def validated(bench: Workbench, dataset: dict[str, Any]) -> Ran:
    return bench.run("validate", bench.job(dataset=dataset))


def counted(ran: Ran) -> Preflight:
    assert ran.code == 0, ran.result.message
    assert ran.result.preflight is not None
    return ran.result.preflight


SPLITS: dict[str, tuple[dict[str, int], str | None, list[str] | None, int]] = {
    "files": ({"train.jsonl": 8, "test.jsonl": 4}, "train", ["test"], 8),
    "folders": ({"train/a.jsonl": 8, "validation/a.jsonl": 4, "test/a.jsonl": 4}, "train", ["test", "validation"], 8),
    "shards of the Hub": (
        {
            "data/train-00000-of-00002.jsonl": 4,
            "data/train-00001-of-00002.jsonl": 4,
            "data/test-00000-of-00001.jsonl": 4,
            "data/unsupervised-00000-of-00001.jsonl": 4,
        },
        "train",
        ["test", "unsupervised"],
        8,
    ),
    "several training splits": (
        {"data/train_sft-00000-of-00001.jsonl": 4, "data/train_gen-00000-of-00001.jsonl": 4, "dev.jsonl": 2},
        "train_gen, train_sft",
        ["dev"],
        8,
    ),
    "names with more words": ({"chats-train.jsonl": 8, "chats_eval.jsonl": 4}, "chats-train", ["chats_eval"], 8),
    "a file beside its test": ({"rows.jsonl": 8, "test.jsonl": 4}, None, ["test"], 8),
    "a file beside the training split": ({"train.jsonl": 4, "more.jsonl": 4, "val.jsonl": 4}, "train", ["val"], 8),
    "only a test": ({"test.jsonl": 8}, None, None, 8),
    "names that only contain the word": ({"unit-test.jsonl": 4, "contest.jsonl": 4}, None, None, 8),
}


@pytest.mark.parametrize("name", SPLITS)
def test_only_the_training_split_is_trained_on(bench: Workbench, name: str) -> None:
    files, split, skipped, rows = SPLITS[name]
    start = 0
    for path, count in files.items():
        write_rows(bench.folder / "set" / path, chat_rows(start + count)[start:])
        start += count
    preflight = counted(validated(bench, {"train": [{"uri": f"file://{bench.folder}/set"}]}))
    (source,) = preflight.sources or []
    assert (source.split, source.skipped_splits, source.rows) == (split, skipped, rows)
    assert (preflight.rows or 0) + (preflight.validation_rows or 0) == rows
    assert (preflight.files or 0) + (preflight.skipped_files or 0) == len(files)


@pytest.fixture
def saved(bench: Workbench) -> str:
    """Return the uri of a data set with splits, as `datasets` saves it."""
    folder = bench.folder / "set"
    for name, rows in {"train": chat_rows(8), "held": chat_rows(12)[8:]}.items():
        write_rows(folder / name / "rows.jsonl", rows)
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "held"]}')
    return f"file://{folder}"


def test_splits_of_a_saved_data_set(bench: Workbench, saved: str) -> None:
    ran = validated(bench, {"train": [{"uri": saved}]})
    (source,) = counted(ran).sources or []
    assert (source.split, source.skipped_splits, source.names) == ("train", ["held"], ["train/rows.jsonl"])
    assert f"    {saved}: read train, not held" in ran.lines


def test_a_split_can_be_named(bench: Workbench, saved: str) -> None:
    dataset = {"train": [{"uri": saved}], "validation": [{"uri": saved, "split": "held"}]}
    preflight = counted(validated(bench, dataset))
    assert [(source.split, source.rows) for source in preflight.sources or []] == [("train", 8), ("held", 4)]
    assert (preflight.rows, preflight.validation_rows) == (8, 4)
    ran = validated(bench, {"train": [{"uri": saved, "split": "tset"}]})
    assert ran.result.reason is FailureReason.DATASET_INVALID
    assert "has no split tset: it has held, train" in ran.result.message
    ran = validated(bench, {"train": [{"uri": f"{saved}/train/rows.jsonl", "split": "train"}]})
    assert "is one file, so it has no split train: remove split" in ran.result.message


def test_splits_without_one_for_training_are_refused(bench: Workbench) -> None:
    for name in ("prefs", "held"):
        write_rows(bench.folder / "set" / name / "rows.jsonl", chat_rows(4))
    (bench.folder / "set/dataset_dict.json").write_text("{}")
    ran = validated(bench, {"train": [{"uri": f"file://{bench.folder}/set"}]})
    assert "has the splits held, prefs: choose one of them with split" in ran.result.message


def test_held_out_rows_are_those_of_the_validation_split(bench: Workbench) -> None:
    for number, name in enumerate(("train", "validation", "test")):
        write_rows(bench.folder / "set" / f"{name}.jsonl", chat_rows(8 * number + 8)[8 * number :])
    uri = f"file://{bench.folder}/set"
    preflight = counted(validated(bench, {"train": [{"uri": uri}], "validation": [{"uri": uri}]}))
    assert [source.split for source in preflight.sources or []] == ["train", "validation"]
    (bench.folder / "set/validation.jsonl").unlink()
    preflight = counted(validated(bench, {"train": [{"uri": uri}], "validation": [{"uri": uri}]}))
    assert [source.split for source in preflight.sources or []] == ["train", "test"]


def test_long_texts_are_split_on_request(bench: Workbench, tmp_path: Path) -> None:
    long = "".join(f"The lighthouse of Brinewick has {number} steps. " for number in range(40))
    texts = [long, "A door.", "A boat."]
    write_rows(bench.folder / "texts.jsonl", [{"text": text} for text in texts])
    held = write_rows(bench.folder / "held.jsonl", [{"text": "A house."}])
    dataset = {
        "train": [{"uri": f"file://{bench.folder}/texts.jsonl"}],
        "validation": [{"uri": f"file://{held}"}],
        "maxLength": 64,
    }
    assert counted(validated(bench, dataset | {"overlong": "Drop"})).chunked_rows is None
    preflight = counted(validated(bench, dataset | {"overlong": "Chunk"}))
    assert (preflight.chunked_rows, preflight.dropped) == (1, None)
    stores = Stores(secrets=bench.folder, allow_file=True)
    rows = prepare(load_job(bench.folder / "job.yaml"), stores, tmp_path / "work", weights=False).train
    tokenizer = model.load_tokenizer(bench.base, "the tiny model")
    whole = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    parts = [list(row["input_ids"]) for row in rows]
    assert [*itertools.chain(*parts)] == [*itertools.chain(*whole)]
    count = -(-len(whole[0]) // 64)
    assert len(parts) == count + 2 == preflight.rows
    sizes = [len(part) for part in parts[:count]]
    assert max(sizes) <= 64
    assert max(sizes) - min(sizes) <= 1
    # Of every part all tokens are learned but the first, which nothing precedes.
    assert [list(row["labels"]) for row in rows] == [[IGNORED, *part[1:]] for part in parts]


def test_rows_with_an_answer_are_not_split(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpecError, match=r"dataset.overlong Chunk splits only texts"):
        values(tmp_path, chat_row("a", "b"), overlong="Chunk")
    with pytest.raises(ValueError, match=r"needs dataset.format Text"):
        Dataset.model_validate({"train": [{"uri": "s3://bucket/rows"}], "format": "Messages", "overlong": "Chunk"})
