"""Imported adapters in a real vLLM: the same log-probabilities as plain PEFT recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.trainer.foreign_rig import import_adapter, peft_adapter, rename_tensors
from tests.trainer.test_import_layouts import ALL, NAMES, as_mlx, initialized
from tests.trainer.tiny_model import make
from tests.trainer.verify_methods import engines

if TYPE_CHECKING:
    from collections.abc import Callable

ENGINE = Path(__file__).resolve().parents[2] / "server-image/engine-cpu/.venv"
LIMIT = 1e-3


def _mlx(base: Path, folder: Path) -> None:
    peft_adapter(base, folder, target_modules=ALL, lora_alpha=16)
    as_mlx(folder, 4, 4.0)


def _renamed(base: Path, folder: Path) -> None:
    peft_adapter(base, folder)
    rename_tensors(folder, NAMES["FSDP"])


LAYOUTS: dict[str, Callable[[Path, Path], object]] = {
    "PEFT": lambda base, folder: peft_adapter(base, folder, target_modules=ALL, rank_pattern={"v_proj": 2}),
    "PiSSA": lambda base, folder: initialized(base, folder, "pissa"),
    "OLoRA": lambda base, folder: initialized(base, folder, "olora"),
    "MLX LM": _mlx,
    "FSDP": _renamed,
}


@pytest.mark.long
def test_an_engine_computes_what_peft_recorded(tmp_path: Path) -> None:
    base, artifacts = make(tmp_path / "base", hidden=128), {}
    for name, save in LAYOUTS.items():
        work = tmp_path / name
        work.mkdir()
        save(base, work / "adapter")
        imported = import_adapter(work / "adapter", base, work)
        assert imported.code == 0, imported.result.message
        artifacts[name] = str(imported.folder)
    answers = tmp_path / "answers.json"
    request = {
        "base": str(base),
        "artifacts": artifacts,
        "modules": {},
        "answers": str(answers),
        "arguments": {},
    }
    with engines(ENGINE) as ask:
        ask(request)
    found = json.loads(answers.read_text())["adapters"]
    print(found)  # noqa: T201 - the figures of the report
    assert {name: answer["difference"] <= LIMIT and answer["base"] <= LIMIT for name, answer in found.items()} == (
        dict.fromkeys(LAYOUTS, True)
    )
