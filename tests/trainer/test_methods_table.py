"""docs/methods.md agrees with the CPU stage about each method; `make verify-methods` measures the rest.

The methods' declarations list exactly what the installed PEFT has.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from pydantic import ValidationError

from tests.trainer.methods_cases import CASES, Case
from tests.trainer.methods_rig import plan
from tunesmith.api.method import METHODS
from tunesmith.api.methods.peft import OTHER_METHODS
from tunesmith_trainer.errors import InvalidSpecError
from tunesmith_trainer.methods.generic import config_class

TABLE = Path(__file__).resolve().parents[2] / "docs" / "methods.md"
TRAINS, TRAINS_IN_4_BITS, VLLM = 3, 6, 9


@pytest.fixture(scope="module")
def table() -> dict[str, list[str]]:
    """Return the first word of each cell, by method."""
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.split("|")] for line in lines[1:]]
    return {row[1]: [cell.split(" ")[0] for cell in row] for row in cells}


def verdict(method: dict[str, Any] | None, base: Path) -> tuple[str, str | None]:
    """Return whether the method would be trained, and whether vLLM would load the result, as in the table."""
    if method is None:
        return "–", None
    try:
        planned = plan(method, base)
    except (InvalidSpecError, ValidationError):
        return "refused", None
    return "yes", "yes" if planned.servable.vllm else "no"


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_the_table_agrees_with_the_validation(case: Case, table: dict[str, list[str]], base_model: Path) -> None:
    trains, vllm = verdict(case.method, base_model)
    in_4_bits, vllm_in_4_bits = verdict(case.quantized, base_model)
    row = table[case.name]
    assert (row[TRAINS], row[TRAINS_IN_4_BITS]) == (trains, in_4_bits)
    assert row[VLLM] == (vllm or vllm_in_4_bits or "–")


def test_the_table_has_no_other_methods(table: dict[str, list[str]]) -> None:
    assert list(table) == [case.name for case in CASES]


TYPED = {name: fields for name, fields in METHODS.items() if fields.declared and fields.declared.peft_type}


def test_every_type_of_peft_is_declared() -> None:
    typed = {str(fields.declared.peft_type) for fields in TYPED.values() if fields.declared}
    assert typed | OTHER_METHODS.keys() == {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}


@pytest.mark.parametrize("name", TYPED)
def test_every_declared_name_is_a_field_of_pefts_configuration(name: str) -> None:
    declared = TYPED[name].declared
    assert declared is not None
    keys = {field.name for field in dataclasses.fields(config_class(str(declared.peft_type)))}
    assert {peft.key for peft in TYPED[name].peft_names.values()} <= keys
    assert declared.decided_by_training <= keys
