"""The operator writes the last use of API keys, with the rights that the chart gives it; the CLI shows it."""

from __future__ import annotations

import asyncio
import json
import time
from datetime import datetime
from typing import TYPE_CHECKING

import pytest

from tests.controlplane.rights import grant
from tests.controlplane.test_cli import tunesmith
from tunesmith.cluster.client import Cluster
from tunesmith.cluster.errors import ForbiddenError
from tunesmith.contracts.apikey import key_record, new_key
from tunesmith.contracts.keyuse import KEY_USE_NAME, parse_key_use
from tunesmith.controller.serving.keyuse import KeyUseWriter

if TYPE_CHECKING:
    from tests.controlplane.apiserver import ApiServer


async def written(cluster: Cluster, namespace: str) -> set[str]:
    return set(parse_key_use(await cluster.find("ConfigMap", KEY_USE_NAME, namespace)))


async def test_the_last_use_of_keys(apiserver: ApiServer, namespace: str) -> None:
    for name in ("alice", "bob"):
        record = key_record(name, namespace, new_key(), home="team", namespaces=["team"], models=["*"])
        apiserver.apply(record)
    kubeconfig = grant(apiserver, namespace, release=f"release-{namespace}")
    now = int(time.time()) + 5
    async with await Cluster.connect(kubeconfig=kubeconfig) as cluster:
        writer = KeyUseWriter(cluster, namespace, seconds=0.1)
        task = asyncio.create_task(writer.run())
        for times in ({"alice": now}, {"alice": now - 60, "deleted": 1_800_000_000}):
            writer.record(times)
            async with asyncio.timeout(120):
                while times.keys() - await written(cluster, namespace):  # noqa: ASYNC110 - polls the API server
                    await asyncio.sleep(0.05)
        task.cancel()
        later = KeyUseWriter(cluster, namespace)
        later.record({"carol": now})
        await later._write()
        assert later.times == {"alice": now, "carol": now, "deleted": 1_800_000_000}, "a new leader keeps them"
        with pytest.raises(ForbiddenError):
            await cluster.patch("ConfigMap", "api-key-alice", namespace, {"data": {"models": "[]"}})
    code, output, _ = tunesmith(apiserver, "keys", "list", "-o", "json", "--gateway-namespace", namespace)
    shown = {row["name"]: row["lastUsed"] for row in json.loads(output)}
    assert code == 0
    assert (datetime.fromisoformat(shown["alice"]).timestamp(), shown["bob"]) == (now, None)
    code, output, _ = tunesmith(apiserver, "keys", "list", "--gateway-namespace", namespace)
    assert "LAST USED" in output
    assert "never" in output
