"""Fields of a ServingPool that are related to each other."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tunesmith.api.servingpool import Engine


@pytest.mark.parametrize(
    ("engine", "capacity"),
    [
        ({}, 64),
        ({"maxLoras": 100}, 100),
        ({"maxLoras": 4, "maxAdapters": 512}, 512),
        ({"maxLoras": 4, "maxAdapters": 4}, 4),
    ],
)
def test_the_number_of_adapters_per_pod(engine: dict[str, int], capacity: int) -> None:
    assert Engine.model_validate(engine).adapter_capacity == capacity


def test_fewer_adapters_than_slots_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"engine\.maxAdapters must not be below engine\.maxLoras"):
        Engine.model_validate({"maxLoras": 8, "maxAdapters": 4})
