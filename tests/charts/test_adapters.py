"""The chart `adapters`: specs pass through unchanged, invalid values are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    Helm = Callable[..., subprocess.CompletedProcess[str]]
    Template = Callable[..., list[dict[str, Any]]]

REPOSITORY = Path(__file__).resolve().parents[2]
POOL = {"modelName": "base", "baseModel": {"uri": "s3://bucket/base"}}
ADAPTER = {"adapterFrom": {"fineTuneJob": {"name": "job"}}}


def test_specs_pass_through_and_replicas_stay_unset(template: Template) -> None:
    documents = template(
        "adapters", {"pools": {"shared": POOL}, "adapters": {"first": ADAPTER, "second": ADAPTER | {"replicas": 2}}}
    )
    assert {(document["kind"], document["metadata"]["name"]): document["spec"] for document in documents} == {
        ("ServingPool", "shared"): POOL,
        ("AdapterDeployment", "first"): ADAPTER,
        ("AdapterDeployment", "second"): ADAPTER | {"replicas": 2},
    }


def test_no_values_render_nothing(template: Template) -> None:
    assert template("adapters") == []


def test_values_of_the_demo(template: Template) -> None:
    values = yaml.safe_load((REPOSITORY / "examples/values-demo.yaml").read_text())
    assert {document["kind"] for document in template("adapters", values)} == {"ServingPool", "AdapterDeployment"}


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"pools": {"shared": {"modelName": "base"}}}, "baseModel"),
        ({"pools": {"shared": POOL | {"replicas": -1}}}, "replicas"),
        ({"pools": {"shared": POOL | {"engine": {"maxLoraRank": 17}}}}, "maxLoraRank"),
        ({"pools": {"Shared": POOL}}, "Shared"),
        ({"adapters": {"first": ADAPTER | {"replica": 2}}}, "replica"),
        ({"adapters": {"first": {}}}, "adapterFrom"),
        ({"adapter": {}}, "adapter"),
    ],
)
def test_invalid_values_are_refused_by_name(rendered: Helm, values: dict[str, Any], field: str) -> None:
    done = rendered("adapters", values)
    assert done.returncode != 0
    assert field in done.stderr
