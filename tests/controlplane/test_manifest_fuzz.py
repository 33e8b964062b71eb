"""Mutated manifests on a real API server: each that it accepts gets a condition, and no reconcile fails without one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.controlplane.operatorprocess import until
from tests.finetune.manifest_fuzzer import mutants
from tunesmith.cluster.errors import ClusterError

if TYPE_CHECKING:
    from tests.controlplane.operatorprocess import Operator
    from tunesmith.cluster.client import Cluster

pytestmark = [pytest.mark.controlplane, pytest.mark.long]
COUNT = 1000
SEED = 11


async def test_every_accepted_manifest_gets_a_condition(operator: Operator, cluster: Cluster) -> None:
    created = await cluster.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"generateName": "fuzz-"}})
    namespace = created["metadata"]["name"]
    accepted: list[tuple[str, str]] = []
    for number, manifest in enumerate(mutants(SEED, COUNT)):
        try:
            json.dumps(manifest, allow_nan=False)
        except ValueError:
            continue
        metadata = manifest.get("metadata")
        if not isinstance(metadata, dict):
            continue
        name = f"m{number}" if metadata.get("name") in ("tone", "plain", "small") else metadata.get("name")
        try:
            await cluster.create({**manifest, "metadata": {**metadata, "name": name, "namespace": namespace}})
        except (ClusterError, TypeError):
            continue
        accepted.append((manifest["kind"], str(name)))
    assert {kind for kind, _ in accepted} == {"FineTuneJob", "ServingPool", "AdapterDeployment"}

    async def silent() -> list[tuple[str, str]]:
        found: dict[tuple[str, str], Any] = {}
        for kind in {kind for kind, _ in accepted}:
            for item in await cluster.list(kind, namespace):
                found[kind, item["metadata"]["name"]] = (item.get("status") or {}).get("conditions")
        return [entry for entry in accepted if not found.get(entry)]

    async def all_heard() -> bool:
        return not await silent()

    try:
        await until(all_heard, "a condition of each object", seconds=300.0)
    except TimeoutError:
        raise AssertionError(f"without a condition: {(await silent())[:10]}") from None
    assert "reconcile failed" not in operator.log.read_text()
    assert operator.answers("/healthz")
