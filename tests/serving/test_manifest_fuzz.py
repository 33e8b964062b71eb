"""Mutated manifests of ServingPools and AdapterDeployments: every reconcile succeeds, and what is wrong is a condition.

Most of these an API server with the CRDs would refuse; an older or newer CRD, or a status written by another release,
lets some through. `TUNESMITH_FUZZ_MANIFESTS=10000` runs more than `make test` does.
"""

from __future__ import annotations

import copy
import json
import os
import random
from typing import Any

from tests.serving.operatorworld import World

COUNT = int(os.environ.get("TUNESMITH_FUZZ_MANIFESTS", "400"))
SEED = int(os.environ.get("TUNESMITH_FUZZ_SEED", "1"))
MOST_BYTES = 64 * 1024
HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 2**63, 1e308, "", "x" * 5000, "\x1b[31m\u202e\x00\n", "../../etc", "team/other", "NaN",
    [], {}, [[]],
    [None], {"a": {"b": []}}, ["x"] * 300, {"name": 5}, {"name": "x", "namespace": []}, "2026-99-99T00:00:00Z",
)  # fmt: skip
STATUS = {
    "conditions": [
        {"type": "Ready", "status": "True", "reason": "Resident", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    ],
    "pool": {"name": "base", "namespace": "team"},
    "desiredReplicas": 1,
    "revisions": [
        {
            "digest": "sha256:" + "a" * 64,
            "uri": "s3://store/team/x/artifact",
            "engineName": "team/m@" + "a" * 12,
            "state": "Resident",
            "readyReplicas": 1,
        }
    ],
}
ADAPTER: dict[str, Any] = {
    "spec": {
        "adapterFrom": {"fineTuneJob": {"name": "job-0"}},
        "pool": {"name": "base"},
        "modelName": "m",
        "replicas": 1,
        "autoscaling": {"minReplicas": 1, "maxReplicas": 2},
    },
    "status": STATUS,
}
POOL: dict[str, Any] = {
    "spec": {
        "modelName": "m",
        "baseModel": {"uri": "s3://models/smol"},
        "engine": {"maxLoras": 4, "args": ["--seed=1"], "env": [{"name": "A", "value": "b"}]},
        "resources": {"gpus": 1, "memory": "8Gi"},
        "scheduling": {"nodeSelector": {"a": "b"}, "tolerations": [{"key": "k", "operator": "Exists"}]},
        "replicas": 1,
        "rollingUpdate": {"maxSurge": 1},
        "allowedNamespaces": {"from": "All"},
    },
    "status": {"conditions": STATUS["conditions"], "baseModelFingerprint": "sha256:f", "desiredReplicas": 1},
}


def paths(node: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values below a node."""
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    found = []
    for key, value in entries:
        found += [(*here, key), *paths(value, (*here, key))]
    return found


def mutated(kind: str, name: str, dice: random.Random) -> dict[str, Any]:
    """A manifest with one to three values replaced, removed or added."""
    document = copy.deepcopy(POOL if kind == "ServingPool" else ADAPTER)
    for _ in range(dice.randint(1, 3)):
        *parents, last = dice.choice(paths(document))
        node: Any = document
        for parent in parents:
            node = node[parent] if isinstance(node, dict) and parent in node else None
        if not isinstance(node, dict):
            continue
        match dice.randrange(4):
            case 0:
                node.pop(last, None)
            case 1:
                node["unknownField"] = copy.deepcopy(dice.choice(HOSTILE))
            case _:
                node[last] = copy.deepcopy(dice.choice(HOSTILE))
    return {
        "apiVersion": "tunesmith.dev/v1alpha1",
        "kind": kind,
        "metadata": {"name": name, "namespace": "team"},
        **document,
    }


async def test_every_manifest_gets_a_condition_instead_of_an_error() -> None:
    dice = random.Random(SEED)  # noqa: S311 - repeatable
    world = World()
    world.add_pool("base", replicas=1)
    world.add_adapter(0)
    await world.converge()
    refused = 0
    for number in range(COUNT):
        kind = dice.choice(["ServingPool", "AdapterDeployment"])
        item = world.store.put(mutated(kind, f"fuzz-{number}", dice))
        what = json.dumps(item, default=str)[:2000]
        world.observe(item)
        await world.drain()
        stored = world.store.find(kind, "team", f"fuzz-{number}")
        status = stored["status"]
        conditions = status["conditions"]
        assert conditions, what
        assert all(len(condition.get("message", "")) <= 4096 for condition in conditions), what
        assert len(json.dumps(status)) <= MOST_BYTES, what
        refused += any(condition["reason"] == "InvalidSpec" for condition in conditions)
        world.controller.observe("DELETED", stored)
        await world.drain()
    assert refused > COUNT / 10, "the mutations do something"
    victim = world.store.find("AdapterDeployment", "team", "adapter-0")
    assert victim["status"]["phase"] == "Ready", "the others' adapter is served all the time"
