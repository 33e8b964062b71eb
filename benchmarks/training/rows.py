"""Rows of real text with lengths that vary like those of instruction data: docstrings of the standard library."""

from __future__ import annotations

import importlib
import inspect
import json
import random
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_MODULES = (
    "argparse", "ast", "asyncio", "base64", "calendar", "collections", "configparser", "contextlib", "csv",
    "dataclasses", "datetime", "decimal", "difflib", "email.message", "enum", "fractions", "functools",
    "heapq", "html", "http.client", "inspect", "ipaddress", "itertools", "json", "logging", "mailbox", "math",
    "os", "pathlib", "pickle", "random", "re", "shutil", "socket", "sqlite3", "statistics", "string",
    "subprocess", "tempfile", "textwrap", "threading", "tokenize", "traceback", "types", "typing", "unittest",
    "urllib.parse", "uuid", "zipfile",
)  # fmt: skip
LONGEST = 512
"""Maximum tokens of a row; longer ones are dropped, and the notebook pads to it."""
_SEED = 4
_MIN_CHARACTERS = 40


def write(folder: Path, train: int, validation: int) -> tuple[Path, Path]:
    """Write chat rows to `train.jsonl` and `validation.jsonl`, the same in every run with one Python version."""
    rows = _rows()
    if train + validation > len(rows):
        sys.exit(f"there are {len(rows)} rows of text, not {train + validation}: lower --rows")
    random.Random(_SEED).shuffle(rows)  # noqa: S311 - reproducible on purpose
    paths = folder / "train.jsonl", folder / "validation.jsonl"
    for path, part in zip(paths, (rows[validation : validation + train], rows[:validation]), strict=True):
        path.write_text("".join(f"{json.dumps({'messages': row})}\n" for row in part), encoding="utf-8")
    return paths


def _rows() -> list[list[dict[str, str]]]:
    texts: dict[str, str] = {}
    for name in _MODULES:
        module = importlib.import_module(name)
        for attribute, value in sorted(vars(module).items()):
            if attribute.startswith("_") or not (inspect.isroutine(value) or inspect.isclass(value)):
                continue
            doc = value.__doc__
            text = inspect.cleandoc(doc) if isinstance(doc, str) else ""
            if len(text) >= _MIN_CHARACTERS:
                texts.setdefault(text, f"{name}.{attribute}")
    return [
        [{"role": "user", "content": f"What does {name} do?"}, {"role": "assistant", "content": text}]
        for text, name in texts.items()
    ]
