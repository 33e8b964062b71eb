"""The rows and commands shown in the documentation of training data are valid, and what it says is learned of them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from e2e.documentation import REPOSITORY, blocks, commands
from tests.trainer.chat_styles import STYLES
from tests.trainer.test_chat_templates import learned_runs, tokenizer_of
from tests.trainer.trainer_rig import write_rows
from tunesmith.api.dataset import Dataset
from tunesmith_trainer.data.encoding import Encoder
from tunesmith_trainer.data.formats import DataFile
from tunesmith_trainer.data.forms import RowForm
from tunesmith_trainer.data.report import RowReport
from tunesmith_trainer.data.rows import read
from tunesmith_trainer.data.sources import Source

if TYPE_CHECKING:
    from pathlib import Path

ROWS = re.compile(r"^```json\n(.*?)^```", re.MULTILINE | re.DOTALL)
SETTINGS = re.compile(r"^```yaml\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = ROWS.findall((REPOSITORY / "docs/data.md").read_text(encoding="utf-8"))
CONVERT = REPOSITORY / "docs/how-to/convert-data.md"
LEARNED: dict[str, list[str]] = {
    "ShareGPT": ["I am Wren."],
    "Alpaca": ["Vogel", "Vögel"],
    "Exports of OpenAI": ["I am Wren."],
    "Logs of tool calls": ['{"name": "weather", "arguments": {"city": "Brinewick"}}</tool_call>', "It rains."],
    "Reasoning": ["51 is 3 times 17.\n</think>\n\nNo."],
}
"""Ends of the learned answers of a section's rows, without their end token, with a template like Qwen3's."""


def sources_of(path: Path) -> list[Source]:
    return [Source("s3://bucket/rows.jsonl", [DataFile("rows.jsonl", path)])]


@pytest.mark.parametrize(("form", "block"), list(zip(RowForm, BLOCKS, strict=True)))
def test_rows_in_the_documentation_are_valid(tmp_path: Path, form: RowForm, block: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(block, encoding="utf-8")
    dataset = Dataset.model_validate({"train": [{"uri": "s3://bucket/rows.jsonl"}]})
    rows = list(read(sources_of(file), dataset, RowReport(), forms=[form]))
    assert [row.form for row in rows] == [form] * len(block.splitlines())


def learned(path: Path, settings: dict[str, Any], base_model: Path) -> list[str]:
    """Return the text of each learned passage of the rows in a file, without its end token."""
    dataset = Dataset.model_validate({"train": [{"uri": "s3://bucket/rows.jsonl"}], **settings})
    report = RowReport()
    style = STYLES["qwen3"]
    tokenizer, ends = tokenizer_of(base_model, style)
    encoder = Encoder(tokenizer, ends, loss_on=dataset.loss_on)
    rows = list(read(sources_of(path), dataset, report, forms=list(RowForm)))
    assert report.dropped == 0
    return [
        tokenizer.decode(tokens.input_ids[begin:end]).removesuffix(style.ends[0])
        for row in encoder.encode_all(rows)
        for tokens in row.rows
        for begin, end in learned_runs(tokens.labels)
    ]


def sections() -> dict[str, str]:
    _, *parts = re.split(r"^## (.*)\n", CONVERT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_all_rows_of_other_tools_are_tested() -> None:
    assert list(LEARNED) == [title for title, text in sections().items() if ROWS.search(text)]


@pytest.mark.parametrize("title", LEARNED)
def test_rows_of_other_tools_are_learned_as_documented(tmp_path: Path, base_model: Path, title: str) -> None:
    text = sections()[title]
    (block,) = ROWS.findall(text)
    settings = [yaml.safe_load(found)["dataset"] for found in SETTINGS.findall(text)]
    path = tmp_path / "rows.jsonl"
    path.write_text(block, encoding="utf-8")
    found = learned(path, settings[0] if settings else {}, base_model)
    for passage, expected in zip(found, LEARNED[title], strict=True):
        assert passage.endswith(expected)


def call(name: str, city: str) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps({"city": city})}
    return {"role": "assistant", "content": None, "refusal": None, "tool_calls": [{"id": "1", "function": function}]}


def record(messages: list[Any], answer: Any, reason: str = "stop") -> dict[str, Any]:
    return {
        "request": {"model": "m", "messages": messages},
        "response": {"choices": [{"index": 0, "finish_reason": reason, "message": answer}]},
    }


HI, HELLO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello.", "annotations": []}
EXPORTS: dict[str, tuple[list[Any], list[Any]]] = {
    "preferences.jsonl": (
        [{"input": {"messages": [HI], "tools": []}, "preferred_output": [HELLO], "non_preferred_output": [HELLO]}],
        [{"prompt": [HI], "tools": [], "chosen": [HELLO], "rejected": [HELLO]}],
    ),
    "log.jsonl": (
        [
            record([HI], call("weather", "Oslo"), "tool_calls"),
            record([HI], HELLO, "length"),
            record([HI], HELLO),
            {"request": {"messages": [HI]}, "response": {"error": {"message": "overloaded"}}},
        ],
        [{"messages": [HI, call("weather", "Oslo")], "tools": []}, {"messages": [HI, HELLO], "tools": []}],
    ),
}


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
@pytest.mark.parametrize("name", EXPORTS)
def test_exports_are_converted_as_documented(tmp_path: Path, name: str) -> None:
    (command,) = [line for block in blocks(CONVERT) for line in commands(block) if name in line]
    given, expected = EXPORTS[name]
    write_rows(tmp_path / name, given)
    subprocess.run(["/bin/sh", "-c", command], cwd=tmp_path, check=True, timeout=60)
    assert [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()] == expected
