from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from tunesmith.api.adapterdeployment import AdapterDeployment
from tunesmith.api.servingpool import ServingPool
from tunesmith.controller.cache import Cache
from tunesmith.controller.serving.state import Parsed
from tunesmith.serving.unreadable import unreadable_status

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def manifest(kind: str, spec: dict[str, Any], status: object = None) -> dict[str, Any]:
    metadata = {"name": "x", "namespace": "team", "uid": "u", "generation": 7, "resourceVersion": "5"}
    return {"kind": kind, "metadata": metadata, "spec": spec} | ({} if status is None else {"status": status})


@pytest.mark.parametrize(
    "status", [None, {}, "text", [1], {"conditions": 5}, {"conditions": [{"type": "Degraded"}, 3]}, {"replicas": 2}]
)
def test_a_spec_that_cannot_be_read_has_a_condition_and_the_status_stays(status: object) -> None:
    found = unreadable_status(manifest("ServingPool", {}, status), "spec.replicas is not a number\x1b[0m\n", NOW)
    conditions = {condition["type"]: condition for condition in found["conditions"]}
    assert conditions["Degraded"]["status"] == "True"
    assert conditions["Available"]["status"] == "Unknown"
    assert {condition["reason"] for condition in conditions.values()} == {"InvalidSpec"}
    assert conditions["Degraded"]["message"] == "spec.replicas is not a number"
    assert conditions["Degraded"]["observedGeneration"] == 7
    assert found.get("replicas") == (2 if status == {"replicas": 2} else None)


def test_an_adapter_that_cannot_be_read_is_not_ready() -> None:
    found = unreadable_status(manifest("AdapterDeployment", {}), "x", NOW)
    assert {condition["type"]: condition["status"] for condition in found["conditions"]} == {
        "Resolved": "False",
        "Ready": "False",
    }


def test_a_status_that_cannot_be_read_is_observed_again() -> None:
    cache = Cache("AdapterDeployment")
    cache.put(manifest("AdapterDeployment", {"adapterFrom": {"fineTuneJob": {"name": "job"}}}, {"revisions": 3}))
    found = Parsed(cache, AdapterDeployment).get("team", "x")
    assert found is not None
    assert found.status.revisions == []


def test_the_sentence_names_the_field() -> None:
    cache = Cache("ServingPool")
    item = manifest("ServingPool", {"modelName": "smol", "baseModel": {"uri": "s3://m/smol"}, "replicas": "many"})
    cache.put(item)
    parsed = Parsed(cache, ServingPool)
    assert parsed.get("team", "x") is None
    assert parsed.error(item).startswith("spec.replicas does not fit the schema of this release: ")
