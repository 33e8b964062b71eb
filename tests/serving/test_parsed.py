from __future__ import annotations

from typing import Any

from tunesmith.api.adapterdeployment import AdapterDeployment
from tunesmith.api.finetunejob import FineTuneJob
from tunesmith.api.servingpool import ServingPool
from tunesmith.controller.cache import Cache
from tunesmith.controller.parsed import Parsed


def manifest(kind: str, spec: dict[str, Any], status: object = None) -> dict[str, Any]:
    metadata = {"name": "x", "namespace": "team", "uid": "u", "generation": 7, "resourceVersion": "5"}
    return {"kind": kind, "metadata": metadata, "spec": spec} | ({} if status is None else {"status": status})


def test_an_unreadable_status_is_recomputed() -> None:
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


def test_an_unreadable_record_is_not_recomputed() -> None:
    """A job whose attempts are unknown would be trained again."""
    cache = Cache("FineTuneJob")
    spec = {
        "baseModel": {"uri": "s3://m/smol"},
        "dataset": {"train": [{"uri": "s3://d/rows.jsonl"}]},
        "method": {"lora": {}},
    }
    item = manifest("FineTuneJob", spec, {"attempts": [{"name": "x-1", "outcome": "Paused"}]})
    cache.put(item)
    parsed = Parsed(cache, FineTuneJob, is_status_kept=True)
    assert parsed.get("team", "x") is None
    assert parsed.error(item).startswith("status.attempts.0.outcome does not fit the schema of this release: ")


def test_each_version_is_parsed_once() -> None:
    cache = Cache("ServingPool")
    cache.put(manifest("ServingPool", {"modelName": "smol", "baseModel": {"uri": "s3://m/smol"}}))
    parsed = Parsed(cache, ServingPool)
    assert parsed.get("team", "x") is parsed.get("team", "x")
    assert parsed.list() == [parsed.get("team", "x")]
