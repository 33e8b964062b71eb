"""Names of metrics: one prefix for each component, units and suffixes as Prometheus recommends them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tunesmith.gateway.comparison import AnswerFacts
from tunesmith.gateway.demand import Demand
from tunesmith.gateway.metrics import Metrics
from tunesmith.gateway.usage import TokenCounts

PROGRAM = Path(__file__).resolve().parents[2] / "docs/metrics.py"


@pytest.fixture(scope="module")
def components() -> dict[str, list[Any]]:
    """The rows of docs/reference/metrics.md by component."""
    specification = importlib.util.spec_from_file_location("metrics_page", PROGRAM)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return {component.lower(): rows for component, (_, rows) in module.components().items()}


def test_each_component_has_one_prefix(components: dict[str, list[Any]]) -> None:
    for component, rows in components.items():
        assert rows
        assert [row.name for row in rows if not row.name.startswith(f"tunesmith_{component}_")] == []


def test_counters_and_histograms_follow_prometheus_naming(components: dict[str, list[Any]]) -> None:
    for row in (row for rows in components.values() for row in rows):
        assert row.name.endswith("_total") == (row.type == "counter"), row.name
        assert row.type != "histogram" or row.name.endswith(("_seconds", "_bytes")), row.name
        assert row.meaning.endswith("."), row.name


def test_the_page_lists_what_the_gateway_exposes(components: dict[str, list[Any]]) -> None:
    demand = Demand()
    demand.add_running("team/a", "team/a@1", 1)
    demand.add_waiting("team/a", 1)
    facts = AnswerFacts(tokens=5, is_refusal=False, logprob=-0.5)
    demand.comparisons.add("team/a@2", facts, facts)
    metrics = Metrics(demand, lambda _: True)
    metrics.finished("team/a", 200, 0.1)
    metrics.streamed("team/a@1", 0.1, 0.01)
    metrics.generated("team/a@1", TokenCounts(1, 1, 2))
    metrics.not_started("draining")
    exposed = {
        family.name + ("_total" if family.type == "counter" else ""): {
            label for sample in family.samples for label in sample.labels if label != "le"
        }
        for family in text_string_to_metric_families(b"".join(metrics.exposition()).decode())
        if not family.name.endswith("_created")
    }
    listed = {row.name: set(row.labels) for row in components["gateway"]}
    assert set(exposed) == set(listed)
    assert {name: labels for name, labels in exposed.items() if labels} == {
        name: labels for name, labels in listed.items() if exposed[name]
    }
