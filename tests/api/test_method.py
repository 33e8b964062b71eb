from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from tunesmith.api.method import PeftFields


def nested(levels: int) -> Any:
    value: Any = 1
    for number in range(levels):
        value = {"a": value} if number % 2 else [value]
    return value


@pytest.mark.parametrize("config", [{}, {"r": 4, "target_modules": ["a"]}, {"a": nested(7)}, {"a": [1] * 1000}])
def test_a_config_of_the_size_of_pefts_is_accepted(config: dict[str, Any]) -> None:
    assert PeftFields(type="LOHA", config=config).config == config


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"a": nested(8)}, "nested more than 8 levels deep"),
        ({"a": nested(900)}, "nested more than 8 levels deep"),
        ({"a": [[1] * 100] * 100}, "more than 2000 values"),
        ({f"k{number}": 1 for number in range(65)}, "at most 64 items"),
    ],
)
def test_a_config_that_is_deeper_or_larger_is_refused(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        PeftFields(type="LOHA", config=config)
