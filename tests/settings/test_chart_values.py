"""Every setting declares the chart value that sets it, or the reason for having none."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import jsonschema
import pytest
import yaml

from tunesmith.contracts.settings import ChartValue
from tunesmith.controller.settings import OperatorSettings
from tunesmith.gateway.settings import GatewaySettings
from tunesmith.settings import ProgramSettings, source_of

CHART = Path(__file__).resolve().parents[2] / "charts/tunesmith"
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA = yaml.safe_load((CHART / "values.schema.json").read_text())
FIELDS = [(model, field) for model in (OperatorSettings, GatewaySettings) for field in model.model_fields]


def at(values: dict[str, Any], path: str) -> Any:
    found: Any = values
    for key in path.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return found


@pytest.mark.parametrize(("model", "field"), FIELDS)
def test_a_setting_has_a_source_and_a_description(model: type[ProgramSettings], field: str) -> None:
    assert model.model_fields[field].description, "docs/reference/settings.md and --help show it"
    place = source_of(model, field)
    if isinstance(place, ChartValue):
        assert place.expression or at(SCHEMA["properties"], place.path.replace(".", ".properties."))


@pytest.mark.parametrize(("model", "field"), FIELDS)
def test_the_charts_default_is_the_programs(model: type[ProgramSettings], field: str) -> None:
    """A value that values.yaml does not list, such as those of gateway.limits, is the program's default."""
    place, info = source_of(model, field), model.model_fields[field]
    if not isinstance(place, ChartValue) or place.expression or info.is_required():
        return
    value = at(VALUES, place.path)
    default = list(info.default) if isinstance(info.default, tuple) else info.default
    assert value in (None, default)


def test_the_charts_own_values_match_its_schema() -> None:
    jsonschema.validate(VALUES, SCHEMA)


def test_a_setting_without_a_source_is_refused() -> None:
    class Unplaced(ProgramSettings):
        program: ClassVar[str] = "x"
        one: int = 1

    with pytest.raises(TypeError, match=r"Unplaced\.one has no source: annotate it with ChartValue"):
        source_of(Unplaced, "one")
