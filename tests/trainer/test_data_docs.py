"""The rows shown in the documentation are valid."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tunesmith.api.dataset import Dataset
from tunesmith_trainer.data.formats import DataFile
from tunesmith_trainer.data.forms import RowForm
from tunesmith_trainer.data.report import RowReport
from tunesmith_trainer.data.rows import read
from tunesmith_trainer.data.sources import Source

PAGE = Path(__file__).resolve().parents[2] / "docs/data.md"
BLOCKS = re.findall(r"^```json\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("form", "block"), list(zip(RowForm, BLOCKS, strict=True)))
def test_rows_in_the_documentation_are_valid(tmp_path: Path, form: RowForm, block: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(block, encoding="utf-8")
    dataset = Dataset.model_validate({"train": [{"uri": "s3://bucket/rows.jsonl"}]})
    source = Source("s3://bucket/rows.jsonl", [DataFile("rows.jsonl", file)])
    rows = list(read([source], dataset, RowReport(), forms=[form]))
    assert [row.form for row in rows] == [form] * len(block.splitlines())
