"""The FineTuneJobs that the documentation shows are valid, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tunesmith.api.finetunejob import FineTuneJob
from tunesmith.api.manifest import parse_manifest
from tunesmith.api.schema import resolved_schema

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL))
    if "kind: FineTuneJob" in block
]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_job_in_the_documentation_is_valid(block: str) -> None:
    assert parse_manifest(block, allow_file=True).kind == "FineTuneJob"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page: Path) -> None:
    targets = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in link]
    assert [target for target in targets if target and not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_json_path_leads_to_a_field(page: Path) -> None:
    for path in re.findall(r"ftj [A-Z].*?jsonpath='\{\.([\w.]+)", page.read_text()):
        node = resolved_schema(FineTuneJob)
        for name in path.split("."):
            assert name in node.get("properties", {}), path
            node = node["properties"][name]
