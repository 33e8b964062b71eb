from __future__ import annotations

import json
from typing import Any

import pytest

from tunesmith.cluster.keep import kept
from tunesmith.controller.cache import Cache


def pod(name: str = "p", version: int = 1, **metadata: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": "team",
            "uid": f"uid-{name}",
            "resourceVersion": str(version),
            **metadata,
        },
        "spec": {"nodeName": "n1", "containers": [{"name": "c", "args": ["x" * 1000]}]},
        "status": {"phase": "Running", "podIP": "10.0.0.1", "conditions": [{"type": "Ready", "status": "True"}]},
    }


def test_fields_that_are_never_read_are_not_cached() -> None:
    large = {f"note-{number}": "x" * 4096 for number in range(64)}
    item = pod(
        annotations={**large, "controller.kubernetes.io/pod-deletion-cost": "-1000"},
        labels={"tunesmith.dev/pool": "base", **{f"tunesmith.dev/l{number}": "x" for number in range(900)}},
        managedFields=[{"manager": "kubectl"}],
        finalizers=["x/y"] * 1000,
    )
    item["status"]["containerStatuses"] = [
        {"name": "c", "imageID": "y" * 999, "state": {"terminated": {"exitCode": 1, "message": "z" * 100_000}}}
    ] * 99
    found = kept(item)
    assert found["metadata"]["annotations"] == {"controller.kubernetes.io/pod-deletion-cost": "-1000"}
    assert found["metadata"]["labels"]["tunesmith.dev/pool"] == "base"
    assert found["spec"] == {"nodeName": "n1"}
    assert found["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 1
    assert len(json.dumps(found)) < 160_000
    assert len(item["metadata"]["annotations"]) == 65, "the given object is not changed"
    assert kept(found) == found


def test_a_custom_resource_keeps_spec_and_status_but_no_foreign_annotations() -> None:
    metadata = {"name": "a", "namespace": "team", "uid": "u", "resourceVersion": "1", "generation": 3}
    item = {
        "kind": "AdapterDeployment",
        "metadata": {**metadata, "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "x" * 250_000}},
        "spec": {"modelName": "m"},
        "status": {"phase": "Ready"},
    }
    assert kept(item) == {
        "kind": "AdapterDeployment", "metadata": metadata, "spec": {"modelName": "m"}, "status": {"phase": "Ready"},
    }  # fmt: skip


def test_a_secret_is_not_changed() -> None:
    secret = {"kind": "Secret", "metadata": {"name": "s", "annotations": {"any": "thing"}}, "data": {"k": "v"}}
    assert kept(secret) is secret


def name_of_node(item: dict[str, Any]) -> list[str]:
    return [item["metadata"]["labels"]["tunesmith.dev/node"]]


def names(cache: Cache, value: str) -> list[str]:
    return [item["metadata"]["name"] for item in cache.find("node", value)]


def test_an_index_follows_every_change() -> None:
    cache = Cache("Pod")
    cache.put(pod("early", labels={"tunesmith.dev/node": "a"}))
    cache.index("node", name_of_node)
    assert names(cache, "a") == ["early"]
    before = cache.revision("node", "a")
    cache.put(pod("other", labels={"tunesmith.dev/node": "b"}))
    assert cache.revision("node", "a") == before, "nothing under a changed"
    cache.put(pod("late", labels={"tunesmith.dev/node": "a"}))
    assert names(cache, "a") == ["early", "late"]
    assert cache.revision("node", "a") != before
    cache.put(pod("late", 2, labels={"tunesmith.dev/node": "b"}))
    assert (names(cache, "a"), names(cache, "b")) == (["early"], ["other", "late"])
    cache.put(pod("late", 3))
    assert names(cache, "b") == ["other"], "an object without the value is under none"
    cache.remove(pod("early"))
    cache.replace([], "9", lambda _: True)
    assert (names(cache, "a"), names(cache, "b"), len(cache), cache.list()) == ([], [], 0, [])


def test_an_index_revision_is_never_reused() -> None:
    cache = Cache("Pod")
    cache.index("node", name_of_node)
    cache.put(pod("p", labels={"tunesmith.dev/node": "a"}))
    before = cache.revision("node", "a")
    cache.remove(pod("p"))
    cache.put(pod("q", 5, labels={"tunesmith.dev/node": "a"}))
    assert cache.revision("node", "a") != before


@pytest.mark.parametrize("namespace", ["team", "other"])
def test_lists_of_a_namespace(namespace: str) -> None:
    cache = Cache("Pod")
    for number in range(3):
        cache.put(pod(f"p{number}"))
    assert len(cache.list(namespace)) == (3 if namespace == "team" else 0)
    assert len(cache.list()) == len(cache) == 3
