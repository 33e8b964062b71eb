"""The manifests, links, fields, values and metrics of the documentation exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tunesmith.api.adapterdeployment import AdapterDeployment
from tunesmith.api.finetunejob import FineTuneJob
from tunesmith.api.manifest import parse_manifest
from tunesmith.api.schema import resolved_schema
from tunesmith.api.servingpool import ServingPool

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
GUIDES = [page for page in PAGES if page.parent.name != "reference" and page.name != "CHANGELOG.md"]
METRICS = (ROOT / "docs/reference/metrics.md").read_text()
MODELS = {model.__name__: model for model in (FineTuneJob, ServingPool, AdapterDeployment)}
SCHEMAS = [resolved_schema(model) for model in MODELS.values()]
VALUES = yaml.safe_load((ROOT / "charts/tunesmith/values.yaml").read_text())
FILES = (".jsonl", ".csv", ".json", ".yaml")

FENCED = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
MANIFESTS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, block in enumerate(
        re.findall(r"(apiVersion: tunesmith\.dev/.*?)^(?:```|END$)", page.read_text(), re.MULTILINE | re.DOTALL)
    )
]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_a_manifest_is_valid(manifest: str) -> None:
    document = yaml.safe_load(manifest)
    if document["kind"] == "FineTuneJob":
        parse_manifest(manifest)
    else:
        MODELS[document["kind"]].model_validate_json(json.dumps(document), strict=True, by_alias=True, by_name=False)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    assert [link for link in links(page) if not exists(page, link)] == []


def test_a_broken_link_is_found() -> None:
    page = ROOT / "docs/serve.md"
    assert exists(page, "#a-whole-model")
    assert not exists(page, "#no-such-heading")
    assert not exists(page, "no-such-page.md")
    assert not exists(page, "install.md#no-such-heading")


def links(page: Path) -> list[str]:
    """Return the relative links of a page."""
    found = re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", page.read_text()))
    return [link for link in found if "://" not in link]


def exists(page: Path, link: str) -> bool:
    """Return true if the file of a link exists and has the heading."""
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    return target.exists() and (not anchor or anchor in anchors(target))


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_fields_and_values_exist(page: Path) -> None:
    assert [path for path in paths(page) if not (is_field(path) or is_value(path))] == []


def test_a_field_that_does_not_exist_is_found() -> None:
    assert is_field("status.evaluation.gates")
    assert is_field("evaluation.suites[].lmEval")
    assert is_value("gateway.externalUrl")
    assert not is_field("status.noSuchField")
    assert not is_value("gateway.noSuchValue")


def paths(page: Path) -> Iterator[str]:
    """Yield the dotted names in code of a page that begin like a field of a resource or a value of the chart."""
    roots = {"spec", "status", *VALUES} | {
        name for schema in SCHEMAS for name in schema["properties"]["spec"]["properties"]
    }
    text = page.read_text()
    for path in re.findall(r"`([a-z]\w*(?:\[\w*\])?(?:\.[a-z]\w*(?:\[\w*\])?)+)", FENCED.sub("", text)):
        if path.partition(".")[0].partition("[")[0] in roots and not path.endswith(FILES):
            yield path
    yield from re.findall(r"jsonpath='\{\.((?:spec|status)\.[\w.]+)", text)


def is_field(path: str) -> bool:
    """Return true if a field of any kind has this path, in full or without `spec`."""
    names = re.sub(r"\[\w*\]", "", path).split(".")
    return any(has_field(schema, names) or has_field(schema, ["spec", *names]) for schema in SCHEMAS)


def has_field(schema: dict[str, Any], names: list[str]) -> bool:
    """Return true if a schema has the field with this path; any name is in an object without declared fields."""
    for name in names:
        schema = schema.get("items", schema)
        if name not in schema.get("properties", {}):
            return "properties" not in schema and schema.get("type") == "object"
        schema = schema["properties"][name]
    return True


def is_value(path: str) -> bool:
    """Return true if the chart has the value."""
    node: Any = VALUES
    for name in path.split("."):
        if not isinstance(node, dict) or name not in node:
            return isinstance(node, dict) and not node
        node = node[name]
    return True


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_metrics_exist(page: Path) -> None:
    found = re.findall(r"tunesmith_(?:operator|gateway|agent|trainer)_\w+", page.read_text())
    named = [name.removesuffix("_bucket") for name in found]  # a series of a histogram
    assert [name for name in named if f"`{name}`" not in METRICS] == []
