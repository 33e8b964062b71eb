"""Files of every format, forms of rows, and rows that are not used."""

from __future__ import annotations

import csv
import gzip
import io
import json
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset as Table

from tests.trainer.trainer_rig import Workbench, chat_row, chat_rows, write_rows
from tunesmith.api.conditions import FailureReason
from tunesmith.api.dataset import Dataset
from tunesmith.api.objective import ObjectiveName
from tunesmith_trainer.data.formats import DataFile, records
from tunesmith_trainer.data.forms import FORMS as FORMS_OF
from tunesmith_trainer.data.forms import SFT_FORMS, RowForm
from tunesmith_trainer.data.report import RowReport
from tunesmith_trainer.data.rows import Row, read
from tunesmith_trainer.data.sources import Source
from tunesmith_trainer.errors import DatasetInvalidError, InvalidSpecError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

Rows = list[dict[str, Any]]
PAIRS: Rows = [
    {"prompt": "Colour of the “door”?\nSay one.", "completion": "blue, or: green"},
    {"prompt": 'A "quoted" one', "completion": "ü,;\t✓"},
    *({"prompt": f"Question {number}?", "completion": f"Answer {number}."} for number in range(600)),
]


def separated(rows: Rows, delimiter: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet(rows: Rows) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=100)
    return sink.getvalue()


def arrow_file(rows: Rows) -> bytes:
    sink = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def arrow_stream(rows: Rows) -> bytes:
    sink = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=70)
    return sink.getvalue()


def lines(rows: Rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


FORMATS: dict[str, Callable[[Rows], bytes]] = {
    "a.jsonl": lines,
    "b.JSONL": lambda rows: b"\xef\xbb\xbf" + lines(rows).replace(b"\n", b"\r\n\r\n"),
    "c.jsonl.gz": lambda rows: gzip.compress(lines(rows)),
    "d.json": lambda rows: json.dumps(rows, ensure_ascii=False, indent=1).encode(),
    "e.json": lines,
    "f.json.gz": lambda rows: gzip.compress(json.dumps(rows).encode()),
    "g.csv": lambda rows: separated(rows, ","),
    "h.tsv.gz": lambda rows: gzip.compress(separated(rows, "\t")),
    "i.parquet": parquet,
    "j.arrow": arrow_file,
    "k.arrow": arrow_stream,
}


def source(folder: Path, **files: bytes) -> Source:
    """Return a source with these files; `__` in a keyword represents the dot of the file name."""
    made = []
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content)
        made.append(DataFile(path.name, path))
    return Source("s3://bucket/rows", made)


def rows_of(*sources: Source, forms: Collection[RowForm] = SFT_FORMS, **fields: Any) -> tuple[list[Row], RowReport]:
    dataset = Dataset.model_validate({"train": [{"uri": "s3://bucket/rows"}], **fields})
    report = RowReport()
    return list(read(sources, dataset, report, forms=forms)), report


def jsonl(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Source:
    path = write_rows(folder / name, list(rows))
    return Source(f"s3://bucket/{name}", [DataFile(name, path)])


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(FORMATS[name](PAIRS))
    rows, report = rows_of(Source("s3://bucket/rows", [DataFile(name, path)]))
    assert [row.value for row in rows] == PAIRS
    assert {row.form for row in rows} == {RowForm.PROMPT_COMPLETION}
    assert (report.read, report.dropped) == (len(PAIRS), 0)


def test_files_of_the_datasets_library_are_read_without_its_metadata(bench: Workbench) -> None:
    Table.from_list(chat_rows(24)).save_to_disk(bench.folder / "saved")
    (bench.folder / "saved/README.md").write_text("about it")
    job = bench.job()
    job["spec"]["dataset"] = {"train": [{"uri": f"file://{bench.folder}/saved"}]}
    ran = bench.run("validate", job)
    assert ran.code == 0, ran.result.message
    assert ran.result.preflight is not None
    assert (ran.result.preflight.rows, ran.result.preflight.validation_rows) == (22, 2)


PLACES = {
    "a.jsonl": (b'{"text": "one"}\n\n[1]\n', "a.jsonl line 3: is not a JSON object but a list"),
    "a.json": (b'[{"text": "one"},\n7]', "a.json row 2: is not a JSON object but a number"),
    "b.json": (b'[{"text": "one"}, {"text": }]', "b.json row 2 is not JSON: Expecting value; the rows after it"),
    "c.json": (b'[{"text": "one"} {"text": "two"}]', "a comma or the list's end after row 1 is expected, not '{'"),
    "d.json": (b'[{"text": "one"},', "d.json row 2 is not JSON"),
    "e.json": (b'[{"text": "one"}] x', "e.json: there is text after the end of the list"),
    "f.json": (b'[{"text": "\xff"}]', "f.json is not UTF-8"),
    "g.json": (b"[]", "g.json is empty"),
    "a.csv": (b'text\n"one\ntwo"\n', "there are only"),
    "b.csv": (b"title\none\n", "b.csv line 2: has no columns that can be learned from"),
    "c.csv": (
        b"text,text\n1,2\n",
        "c.csv: the first line must contain the names of the columns: the column 'text' appears t",
    ),
    "d.csv": (b"text,\n1,2\n", "must contain the names of the columns: a column has no name"),
    "e.csv": (b'text\nok\n"open\n', "e.csv line 3 is not CSV: unexpected end of data"),
    "a.parquet": (b"no parquet", "a.parquet cannot be read as parquet"),
    "a.arrow": (b"no arrow", "a.arrow cannot be read as arrow"),
    "a.jsonl.gz": (b"no gzip", "a.jsonl.gz is not a complete gzip file"),
    "b.jsonl.gz": (gzip.compress(b'{"text": "one"}\n' * 999)[:-20], "b.jsonl.gz is not a complete gzip file"),
    "rows.txt": (b"one\n", "does not indicate its format: use one of the extensions .jsonl, .json, .csv"),
    "rows.parquet.gz": (b"one\n", "does not indicate its format"),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_damaged_file_is_reported_with_its_location(bench: Workbench, name: str) -> None:
    content, expected = PLACES[name]
    (bench.folder / name).write_bytes(content)
    job = bench.job()
    job["spec"]["dataset"] = {"train": [{"uri": f"file://{bench.folder}/{name}"}]}
    ran = bench.run("validate", job)
    assert expected in ran.result.message
    assert (ran.code, ran.result.reason) == (2, FailureReason.DATASET_INVALID)


def test_a_row_longer_than_the_window_of_a_list_is_read(tmp_path: Path) -> None:
    rows = [{"text": "é" * size} for size in (3, 2_500_000, 5)]
    (tmp_path / "long.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    found = [record.value for record in records(DataFile("long.json", tmp_path / "long.json"))]
    assert found == rows


CALL = {"name": "lookup", "arguments": {"city": "Brinewick"}}
TOOL = {"type": "function", "function": {"name": "lookup", "parameters": {"type": "object"}}}
FORMS: dict[str, tuple[dict[str, Any], RowForm, dict[str, Any]]] = {
    "messages": (chat_row("One?", "Uno."), RowForm.MESSAGES, chat_row("One?", "Uno.")),
    "messages as JSON text": (
        {"messages": json.dumps(chat_row("One?", "Uno.")["messages"]), "id": 7},
        RowForm.MESSAGES,
        chat_row("One?", "Uno."),
    ),
    "from and value": (
        {"messages": [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "Uno.", "weight": None}]},
        RowForm.MESSAGES,
        chat_row("One?", "Uno."),
    ),
    "parts of text": (
        {
            "messages": [
                {"role": "system", "content": ""},
                {"role": "user", "content": [{"type": "text", "text": "One?"}, {"type": "text", "text": "Now."}]},
                {"role": "assistant", "content": "Uno.", "name": None, "weight": 1},
            ],
            "tools": None,
        },
        RowForm.MESSAGES,
        {
            "messages": [
                {"role": "system", "content": ""},
                {"role": "user", "content": [{"type": "text", "text": "One?"}, {"type": "text", "text": "Now."}]},
                {"role": "assistant", "content": "Uno.", "weight": 1},
            ]
        },
    ),
    "tools": (
        {
            "messages": [
                {"role": "user", "content": "Where?", "tool_calls": None},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "1", "function": {"name": "lookup", "arguments": '{"city": "Brinewick"}'}}],
                },
                {"role": "tool", "content": "", "tool_call_id": "1"},
                {"role": "assistant", "content": "There."},
            ],
            "tools": json.dumps([TOOL]),
        },
        RowForm.MESSAGES,
        {
            "messages": [
                {"role": "user", "content": "Where?"},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"id": "1", "type": "function", "function": CALL}],
                },
                {"role": "tool", "content": "", "tool_call_id": "1"},
                {"role": "assistant", "content": "There."},
            ],
            "tools": [TOOL],
        },
    ),
    "prompt and completion": (
        {"prompt": "a", "completion": "b", "label": "news"},
        RowForm.PROMPT_COMPLETION,
        {"prompt": "a", "completion": "b"},
    ),
    "prompt and completion as messages": (
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        RowForm.PROMPT_COMPLETION,
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    ),
    "instruction": (
        {"instruction": "Translate.", "input": "one", "output": "uno"},
        RowForm.INSTRUCTION,
        chat_row("Translate.\n\none", "uno"),
    ),
    "instruction without input": (
        {"instruction": "Hello.", "input": "", "output": "uno"},
        RowForm.INSTRUCTION,
        chat_row("Hello.", "uno"),
    ),
    "text": ({"text": " a "}, RowForm.TEXT, {"text": " a "}),
    "preference": (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        RowForm.PREFERENCE,
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ),
    "preference of whole chats": (
        {"prompt": "a", "chosen": chat_row("a", "b")["messages"], "rejected": chat_row("a", "c")["messages"]},
        RowForm.PREFERENCE,
        {
            "prompt": [{"role": "user", "content": "a"}],
            "chosen": [{"role": "assistant", "content": "b"}],
            "rejected": [{"role": "assistant", "content": "c"}],
        },
    ),
    "label": (
        {"prompt": "a", "completion": "b", "label": False},
        RowForm.UNPAIRED_PREFERENCE,
        {"prompt": "a", "completion": "b", "label": False},
    ),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("named", [False, True], ids=["found", "named"])
def test_forms_of_rows(tmp_path: Path, name: str, *, named: bool) -> None:
    row, form, value = FORMS[name]
    rows, _ = rows_of(jsonl(tmp_path, row), forms=[form], format=form.value if named else "Auto")
    assert [(found.form, found.value) for found in rows] == [(form, value)]


def test_columns_with_other_names(tmp_path: Path) -> None:
    rows, _ = rows_of(
        jsonl(tmp_path, {"question": "a", "answer": "b", "text": "c"}, {"question": "d", "answer": "e"}),
        format="PromptCompletion",
        columns={"prompt": "question", "completion": "answer"},
    )
    assert [row.value for row in rows] == [{"prompt": "a", "completion": "b"}, {"prompt": "d", "completion": "e"}]
    with pytest.raises(DatasetInvalidError, match=r"line 1: 'q' is missing \(dataset.format is PromptCompletion\)"):
        rows_of(jsonl(tmp_path, {"question": "a"}), format="PromptCompletion", columns={"prompt": "q"})
    with pytest.raises(InvalidSpecError, match=r"columns.text does not belong to dataset.format Messages"):
        rows_of(jsonl(tmp_path, chat_row("a", "b")), format="Messages", columns={"text": "body"})


def test_sources_may_have_different_forms(tmp_path: Path) -> None:
    chats = jsonl(tmp_path, chat_row("a", "b"), name="chats.jsonl")
    pairs = jsonl(tmp_path, {"prompt": "a", "completion": "b"}, name="pairs.jsonl")
    rows, _ = rows_of(chats, pairs)
    assert [(row.form, row.source) for row in rows] == [(RowForm.MESSAGES, 0), (RowForm.PROMPT_COMPLETION, 1)]
    choices = jsonl(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"}, name="choices.jsonl")
    with pytest.raises(DatasetInvalidError, match=r"choices.jsonl line 1: has the dataset.format Preference"):
        rows_of(chats, choices)


KTO_FORMS = FORMS_OF[ObjectiveName.KTO]


def test_a_pair_is_a_good_and_a_bad_answer_where_single_answers_are_learned(tmp_path: Path) -> None:
    pairs = jsonl(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"}, name="pairs.jsonl")
    judged = jsonl(tmp_path, {"prompt": "d", "completion": "e", "label": False}, name="judged.jsonl")
    rows, report = rows_of(pairs, judged, forms=KTO_FORMS)
    assert {(row.form, row.where) for row in rows[:2]} == {(RowForm.UNPAIRED_PREFERENCE, "pairs.jsonl line 1")}
    assert [row.value for row in rows] == [
        {"prompt": "a", "completion": "b", "label": True},
        {"prompt": "a", "completion": "c", "label": False},
        {"prompt": "d", "completion": "e", "label": False},
    ]
    assert report.read == 3
    chats = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    whole = jsonl(tmp_path, {"chosen": chats, "rejected": [chats[0], {"role": "assistant", "content": "c"}]})
    good, bad = (row.value for row in rows_of(whole, forms=KTO_FORMS)[0])
    assert (good["prompt"], good["completion"], good["label"]) == (chats[:1], chats[1:], True)
    assert (bad["prompt"], bad["completion"][0]["content"], bad["label"]) == (chats[:1], "c", False)


def test_a_pair_is_one_row_where_pairs_are_learned(tmp_path: Path) -> None:
    pairs = jsonl(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"})
    assert [row.form for row in rows_of(pairs, forms=FORMS_OF[ObjectiveName.DPO])[0]] == [RowForm.PREFERENCE]


def test_half_of_the_rows_is_counted_in_rows_not_in_examples(tmp_path: Path) -> None:
    """Two of four pairs are unusable: the examples made from the other two do not hide that."""
    pairs = [{"prompt": f"a{number}", "chosen": "b", "rejected": "c"} for number in range(2)]
    with pytest.raises(DatasetInvalidError, match="is not JSON"):
        rows_of(jsonl(tmp_path, *pairs, "{", "{"), forms=KTO_FORMS)


FAULTY = [
    *chat_rows(12),
    "{not JSON",
    b'{"messages": "\xff"}',
    "null",
    {"messages": None},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]},
    {"messages": []},
    {"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": "b"}]},
    chat_rows(1)[0],
    chat_rows(2)[1],
]


def test_unusable_rows_are_counted_with_examples(bench: Workbench) -> None:
    long = {"messages": chat_row("Why? " * 60, "blue")["messages"]}
    silent = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}
    job = bench.job([*FAULTY, long, silent])
    job["spec"]["dataset"] |= {"maxLength": 128}
    ran = bench.run("validate", job)
    counted = ran.result.preflight
    assert counted is not None, ran.result.message
    assert (counted.rows, counted.validation_rows, counted.dropped_rows) == (11, 1, 11)
    dropped = {rows.reason: (rows.rows, rows.examples) for rows in counted.dropped or []}
    assert dropped["Undecodable"] == (
        2,
        [
            "train.jsonl line 13: is not JSON: Expecting property name enclosed in double quotes at column 2",
            "train.jsonl line 14: is not UTF-8 at byte 15",
        ],
    )
    assert dropped["Null"][0] == 3
    assert dropped["Null"][1] == [
        "train.jsonl line 15: is null, not an object with the columns of a row",
        "train.jsonl line 16: 'messages' is null, not a list",
        "train.jsonl line 17: message 2 (assistant): 'content' is null, not a string",
    ]
    assert dropped["Empty"][0] == 2
    assert dropped["Duplicate"] == (2, ["train.jsonl line 20", "train.jsonl line 21"])
    assert dropped["Overlong"][0] == 1
    assert dropped["NoTarget"] == (1, ["train.jsonl line 23: none of its tokens is learned"])
    assert "  11 rows, " in ran.lines[1]
    assert "    2 Duplicate, the first: train.jsonl line 20" in ran.lines


def test_unusable_rows_can_be_an_error(bench: Workbench) -> None:
    job = bench.job(FAULTY)
    job["spec"]["dataset"]["unusable"] = "Error"
    ran = bench.run("validate", job)
    assert (ran.code, ran.result.reason) == (2, FailureReason.DATASET_INVALID)
    assert "train.jsonl line 13: is not JSON" in ran.result.message
    assert "and 4 more rows with errors" in ran.result.message


def test_duplicates_can_be_kept(tmp_path: Path) -> None:
    twice = jsonl(tmp_path, {"text": "a"}, {"text": "a", "id": 2})
    assert [row.where for row in rows_of(twice)[0]] == ["rows.jsonl line 1"]
    assert len(rows_of(twice, duplicates="Keep")[0]) == 2
    assert [
        row.source for row in rows_of(twice, jsonl(tmp_path, {"text": "a"}, {"text": "b"}, name="more.jsonl"))[0]
    ] == [
        0,
        1,
    ]


def test_cells_that_cannot_be_decoded_are_counted(tmp_path: Path) -> None:
    content = b"text\nfine\n\xff\ntoo,many\n\n\xc3\xa9\nlast\n"
    rows, report = rows_of(source(tmp_path, rows__csv=content))
    assert [row.value["text"] for row in rows] == ["fine", "é", "last"]
    assert report.unusable_examples() == [
        "rows.csv line 3: is not UTF-8",
        "rows.csv line 4: has 2 cells, but the first line names 1 columns",
    ]


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_other_columns_of_columnar_files_are_not_read(tmp_path: Path, name: str) -> None:
    make = parquet if name.endswith("parquet") else arrow_stream
    (tmp_path / name).write_bytes(make([{"prompt": "a", "completion": "b", "vector": [1.0, 2.0]}]))
    file = DataFile(name, tmp_path / name)
    assert [record.value for record in records(file, {"prompt", "completion"})] == [{"prompt": "a", "completion": "b"}]
    assert [set(record.value) for record in records(file, {"text"})] == [{"prompt", "completion", "vector"}]
