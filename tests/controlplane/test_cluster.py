"""The cluster client against a real API server."""

from __future__ import annotations

import asyncio
import gc
import os
import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.controlplane.cable import Cable
from tests.controlplane.operatorprocess import until
from tunesmith.cluster.client import Cluster
from tunesmith.cluster.errors import (
    AlreadyExistsError,
    ClusterError,
    ConfigurationError,
    ConflictError,
    InvalidError,
    NotFoundError,
    UnavailableError,
)
from tunesmith.cluster.events import EventRecorder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.controlplane.apiserver import ApiServer

pytestmark = pytest.mark.controlplane
Object = dict[str, Any]


@pytest.fixture
async def cluster(apiserver: ApiServer) -> AsyncIterator[Cluster]:
    async with await Cluster.connect(kubeconfig=apiserver.kubeconfig) as connected:
        yield connected


def config_map(namespace: str, name: str = "settings", **data: str) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": namespace, "labels": {"part": "a"}},
        "data": data,
    }


async def test_apply_is_the_full_intent(cluster: Cluster, namespace: str) -> None:
    await cluster.apply(config_map(namespace, a="1", b="2"))
    applied = await cluster.apply(config_map(namespace, a="3"))
    assert applied["data"] == {"a": "3"}
    assert "managedFields" not in applied["metadata"]


async def test_errors_name_the_fix(cluster: Cluster, namespace: str) -> None:
    old = await cluster.create(config_map(namespace))
    with pytest.raises(AlreadyExistsError):
        await cluster.create(config_map(namespace))
    await cluster.replace({**old, "data": {"a": "1"}})
    with pytest.raises(ConflictError, match="the object has been modified"):
        await cluster.replace({**old, "data": {"a": "2"}})
    with pytest.raises(ConflictError):
        await cluster.delete("ConfigMap", "settings", namespace, uid="another")
    with pytest.raises(InvalidError, match=r"metadata\.name"):
        await cluster.create(config_map(namespace, "Not_A_Name"))
    with pytest.raises(NotFoundError):
        await cluster.get("ConfigMap", "nothing", namespace)
    assert await cluster.find("ConfigMap", "nothing", namespace) is None
    assert await cluster.delete("ConfigMap", "settings", namespace)
    assert not await cluster.delete("ConfigMap", "settings", namespace)


async def test_an_unreachable_server_is_unavailable(apiserver: ApiServer, tmp_path: Path) -> None:
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(apiserver.kubeconfig.read_text().replace(apiserver.url, "https://127.0.0.1:1"))
    results = []
    async with await Cluster.connect(kubeconfig=kubeconfig, observer=lambda *call: results.append(call)) as cluster:
        with pytest.raises(UnavailableError, match=r"https://127\.0\.0\.1:1 cannot be reached"):
            await cluster.list("Pod")
    assert results == [("list", "Pod", "unavailable")]


async def test_a_missing_kubeconfig_is_reported_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"there is no kubeconfig at .*: set KUBECONFIG to one"):
        await Cluster.connect(kubeconfig=tmp_path / "nothing")


def kubeconfig_of(path: Path, name: str, current: str | None) -> Path:
    """Write a kubeconfig of a cluster, whose namespace has the same name; all name their user alike."""
    document: dict[str, Any] = {
        "clusters": [{"name": name, "cluster": {"server": f"https://{name}.test"}}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": "me", "namespace": name}}],
        "users": [{"name": "me", "user": {"token": f"token-of-{name}"}}],
    }
    path.write_text(yaml.safe_dump(document if current is None else document | {"current-context": current}))
    return path


@pytest.mark.parametrize(
    ("current", "context", "expected"),
    [
        (("a", "b"), None, "a"),
        ((None, "b"), None, "b"),
        (("", "a"), None, "a"),
        (("b", "a"), None, "b"),
        (("a", "b"), "b", "b"),
    ],
)
async def test_a_list_of_kubeconfigs_is_merged_as_kubectl_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, current: tuple[str | None, ...], context: str | None, expected: str
) -> None:
    files = [kubeconfig_of(tmp_path / name, name, of) for name, of in zip("ab", current, strict=True)]
    (tmp_path / "empty").touch()
    monkeypatch.setenv("KUBECONFIG", os.pathsep.join(map(str, [tmp_path / "none", tmp_path / "empty", "", *files])))
    monkeypatch.delenv("KUBECONTEXT", raising=False)
    async with await Cluster.connect(context=context) as cluster:
        assert (cluster.server, cluster.namespace) == (f"https://{expected}.test", expected)
        assert (await cluster.connection()).token == "token-of-a"


async def test_a_list_of_kubeconfigs_of_which_none_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = f"{tmp_path}/a{os.pathsep}{tmp_path}/b"
    monkeypatch.setenv("KUBECONFIG", names)
    with pytest.raises(ConfigurationError, match=f"there is no kubeconfig at {re.escape(names)}"):
        await Cluster.connect()


async def test_lists_of_any_length_are_complete(
    cluster: Cluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.cluster.client.PAGE_SIZE", 3)
    for number in range(8):
        await cluster.create(config_map(namespace, f"c-{number}"))
    items = await cluster.list("ConfigMap", namespace, labels="part=a")
    assert [item["metadata"]["name"] for item in items] == [f"c-{number}" for number in range(8)]
    assert items[0]["kind"] == "ConfigMap"


async def test_a_watch_yields_every_change_including_missed_ones(
    apiserver: ApiServer, cluster: Cluster, namespace: str, tmp_path: Path
) -> None:
    for name in ("deleted", "changed"):
        await cluster.create(config_map(namespace, name))
    told: list[tuple[str, str]] = []

    async def follow(behind: Cluster) -> None:
        async for event in behind.watch("ConfigMap", namespace, labels="part=a"):
            told.append((event.type, event.object.get("metadata", {}).get("name", "")))  # noqa: PERF401 - it has no end

    async def have(*events: tuple[str, str]) -> None:
        async def found() -> bool:
            return set(events) <= set(told)

        await until(found, f"{events} among {told}")

    cable = Cable(apiserver.url)
    async with await cable.start() as listener:
        async with await Cluster.connect(kubeconfig=cable.kubeconfig(apiserver, listener, tmp_path)) as behind:
            task = asyncio.create_task(follow(behind))
            await have(("SYNCED", ""))
            assert told == [("ADDED", "changed"), ("ADDED", "deleted"), ("SYNCED", "")]
            await cluster.create(config_map(namespace, "new"))
            await have(("ADDED", "new"))
            cable.cut()
            await cluster.delete("ConfigMap", "deleted", namespace)
            await cluster.apply(config_map(namespace, "changed", a="1"))
            cable.mend()
            await have(("DELETED", "deleted"), ("MODIFIED", "changed"))
            task.cancel()
        cable.cut()


async def test_a_repeated_event_is_one_object(cluster: Cluster, namespace: str) -> None:
    about = await cluster.create(config_map(namespace))
    first, later = EventRecorder(cluster), EventRecorder(cluster)
    noon = datetime(2026, 1, 1, 12, tzinfo=UTC)
    for recorder in (first, first, later):
        await recorder.event(about, "Started", "attempt 1 is running", now=noon)
    await first.event(about, "Ended", "attempt 1 ended", type_="Warning", now=noon)
    events = await cluster.list("Event", namespace)
    assert sorted((event["reason"], event["type"]) for event in events) == [("Ended", "Warning"), ("Started", "Normal")]
    await later.event(about, "Started", "attempt 1 is running", now=noon + timedelta(minutes=10))
    assert len(await cluster.list("Event", namespace)) == len(events) + 1


def test_every_error_names_a_retry_policy_and_a_label() -> None:
    def all_of(kind: type[ClusterError]) -> list[type[ClusterError]]:
        return [kind, *(found for child in kind.__subclasses__() for found in all_of(child))]

    labels = [kind.label for kind in all_of(ClusterError)]
    assert len(labels) == len(set(labels))


def test_cancelled_requests_leave_no_socket_open(apiserver: ApiServer) -> None:
    """Cancelled at every moment of their connections; pytest turns the warning about an open socket into an error."""

    async def cancel_after(iterations: int) -> None:
        async with await Cluster.connect(kubeconfig=apiserver.kubeconfig) as cluster:
            requests = [asyncio.create_task(cluster.list("Pod", "default")) for _ in range(4)]
            for _ in range(iterations):
                await asyncio.sleep(0)
            for request in requests:
                request.cancel()
            await asyncio.gather(*requests, return_exceptions=True)

    for iterations in range(60):
        asyncio.run(cancel_after(iterations))
    gc.collect()
