"""The gateway's watches against an API server that answers over HTTP, also with what it never should."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from aiohttp import web

from tests.gateway.gateway_rig import GATEWAY_KEYS, OWN_NAMESPACE, Watches, adapter_manifest, eventually, pool_manifest
from tunesmith.cluster.client import Cluster
from tunesmith.cluster.watch import WatchEvent
from tunesmith.contracts.apikey import key_record, new_key
from tunesmith.gateway.catalog import Catalog
from tunesmith.gateway.feed import Feed
from tunesmith.gateway.keys import KeyTable
from tunesmith.gateway.limits import MIB
from tunesmith.gateway.server import Gateway, TaskStoppedError
from tunesmith.gateway.settings import GatewaySettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

Object = dict[str, Any]
PLURALS = ("servingpools", "adapterdeployments", "pods", "namespaces", "configmaps")
"""The kinds that the gateway watches."""


class ApiServer:
    """Lists and watches of these kinds; what a watch sends is up to the test."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Object]] = {}
        self.version = 1
        self.lists: dict[str, int] = {}
        self.down = False
        self._watches: dict[str, asyncio.Queue[bytes | None]] = {}

    def put(self, document: Object, *, announce: bool = True) -> None:
        self.version += 1
        document = {**document, "metadata": {**document["metadata"], "resourceVersion": str(self.version)}}
        document["metadata"].setdefault("uid", f"uid-{document['metadata']['name']}")
        plural = f"{document['kind'].lower()}s"
        self.objects.setdefault(plural, {})[document["metadata"]["name"]] = document
        if announce:
            self.send(plural, {"type": "MODIFIED", "object": document})

    def remove(self, document: Object) -> None:
        """Remove an object without a word: what a gateway that lost its watch does not see."""
        self.version += 1
        del self.objects[f"{document['kind'].lower()}s"][document["metadata"]["name"]]

    def send(self, plural: str, event: Object | bytes | None) -> None:
        """Send a line to all watches; None closes the streams."""
        if plural in self._watches:
            line = event if event is None or isinstance(event, bytes) else json.dumps(event).encode() + b"\n"
            self._watches[plural].put_nowait(line)

    def watched(self, *plurals: str) -> bool:
        return all(plural in self._watches for plural in plurals)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if self.down:
            raise web.HTTPServiceUnavailable
        plural = request.path.rpartition("/")[2]
        if request.query.get("watch") != "true":
            self.lists[plural] = self.lists.get(plural, 0) + 1
            self._watches.pop(plural, None)
            items = list(self.objects.get(plural, {}).values())
            return web.json_response({"metadata": {"resourceVersion": str(self.version)}, "items": items})
        assert request.query["allowWatchBookmarks"] == "true"
        response = web.StreamResponse()
        await response.prepare(request)
        lines = self._watches[plural] = asyncio.Queue()
        try:
            while (line := await lines.get()) is not None:
                await response.write(line)
        finally:
            if self._watches.get(plural) is lines:
                del self._watches[plural]
        return response


@pytest.fixture
async def api() -> AsyncIterator[ApiServer]:
    server = ApiServer()
    application = web.Application()
    application.router.add_get("/{tail:.*}", server.answer)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"  # type: ignore[attr-defined]
    yield server
    await runner.cleanup()


class World:
    """A feed and the tables that it fills."""

    def __init__(self, api: ApiServer, cluster: Cluster, stale_seconds: float) -> None:
        self.api, self.keys, self.catalog, self.changes = api, KeyTable(), Catalog(), 0
        self.feed = Feed(
            cluster,
            OWN_NAMESPACE,
            keys=self.keys,
            catalog=self.catalog,
            changed=self._count,
            stale_seconds=stale_seconds,
        )

    def _count(self) -> None:
        self.changes += 1

    def key(self, name: str) -> tuple[str, Object]:
        key = new_key()
        record = key_record(name, OWN_NAMESPACE, key, home="team", namespaces=["team"], models=["*"])
        return key, record


@pytest.fixture
def stale_seconds() -> float:
    return 60.0


@pytest.fixture
async def world(
    api: ApiServer, tmp_path: Path, stale_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[World]:
    monkeypatch.setattr("tunesmith.gateway.feed._RETRY_SECONDS", 0.05)
    monkeypatch.setattr("tunesmith.cluster.watch._MAX_BACKOFF_SECONDS", 0.05)
    kubeconfig = tmp_path / "kubeconfig"
    document = {
        "clusters": [{"name": "c", "cluster": {"server": api.url}}],  # type: ignore[attr-defined]
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    kubeconfig.write_text(yaml.safe_dump(document))
    async with await Cluster.connect(kubeconfig=kubeconfig) as cluster:
        world = World(api, cluster, stale_seconds)
        task = asyncio.create_task(world.feed.run())
        await eventually(world.feed.synced, "everything is read")
        await eventually(lambda: api.watched(*PLURALS), "all is watched")
        yield world
        assert not task.done(), "the watches stopped"
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_gateway_whose_watches_stop_exits() -> None:
    settings = GatewaySettings(namespace=OWN_NAMESPACE, host="127.0.0.1", port=0, internal_port=0).for_memory(512 * MIB)
    async with Gateway(settings, lambda: GATEWAY_KEYS, Watches()) as gateway:
        stop = asyncio.Event()
        running = asyncio.create_task(gateway.run_until(stop))
        await eventually(gateway.feed.synced, "everything is read")
        gateway._tasks[0].cancel()
        with pytest.raises(TaskStoppedError, match="the task `watches` stopped"):
            await running


UNREADABLE = [
    b'{"type": "MODIFIED", "object": {"kind": "Secr\n',
    b"\n",
    b"[]\n",
    b"null\n",
    b'{"type": "MODIFIED"}\n',
    b'{"type": "MODIFIED", "object": {"metadata": null}}\n',
    b'{"type": "MODIFIED", "object": {"metadata": {"name": "x"}}}\n',
    b'{"type": "MODIFIED", "object": 7}\n',
    b"\xff\xfe\n",
    b"[" * 200_000 + b"\n",
]


@pytest.mark.parametrize("line", UNREADABLE, ids=range(len(UNREADABLE)))
async def test_an_unreadable_line_stops_no_watch_and_hides_no_deletion(world: World, line: bytes) -> None:
    api = world.api
    key, record = world.key("leaked")
    api.put(record)
    await eventually(lambda: world.keys.find(key), "the key is known")
    api.remove(record)
    api.send("configmaps", line)
    await eventually(lambda: world.keys.find(key) is None, "the deleted key no longer works")
    other, record = world.key("other")
    await eventually(lambda: api.lists["configmaps"] == 2 and api.watched("configmaps"), "the kind is watched again")
    api.put(record)
    await eventually(lambda: world.keys.find(other), "the watch continues")
    api.put(pool_manifest(namespace="team"))
    await eventually(lambda: list(world.catalog._models), "the other watches were not disturbed")
    assert api.lists["servingpools"] == 1


async def test_a_watch_interrupted_within_a_line_is_restarted(world: World) -> None:
    world.api.put(adapter_manifest("a"))
    await eventually(lambda: "team/a" in world.catalog._models, "the adapter is known")
    world.api.remove(adapter_manifest("a"))
    world.api.send("adapterdeployments", b'{"type": "DELETED", "object": {"metad')
    world.api.send("adapterdeployments", None)
    await eventually(lambda: not world.catalog._models, "the adapter is gone")


async def test_a_restarted_watch_removes_objects_deleted_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.gateway.feed._RETRY_SECONDS", 0.0)
    rounds = [[pool_manifest("gone"), pool_manifest("stays", model="small")], [pool_manifest("stays", model="small")]]

    class Failing:
        async def watch(self, kind: str, *_: Any, **__: Any) -> AsyncIterator[WatchEvent]:
            if kind == "ServingPool":
                for document in rounds[0]:
                    yield WatchEvent("ADDED", document)
            yield WatchEvent("SYNCED", {})
            if kind == "ServingPool" and len(rounds) > 1:
                del rounds[0]
                raise RuntimeError("a fault that nobody thought of")
            await asyncio.Event().wait()

    catalog = Catalog()
    feed = Feed(Failing(), OWN_NAMESPACE, keys=KeyTable(), catalog=catalog, changed=lambda: None)
    task = asyncio.create_task(feed.run())
    await eventually(lambda: [*catalog._models] == ["serving/small"], "what vanished is removed")
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_objects_that_do_not_fit_the_schema_hide_no_others(world: World) -> None:
    broken: list[Any] = [None, 7, {}, {"modelName": 7}, {"modelName": "x", "baseModel": {"uri": "http://x"}}]
    for number, spec in enumerate(broken):
        world.api.put({**pool_manifest(f"broken-{number}"), "spec": spec})
    for status in (None, 7, [], {"revisions": 7}, {"conditions": [{}]}):
        world.api.put({**adapter_manifest("broken"), "status": status})
    world.api.put({"kind": "Pod", "metadata": {"name": "p", "namespace": "team", "labels": 7}, "status": []})
    world.api.put(pool_manifest())
    await eventually(lambda: "serving/base" in world.catalog._models, "the good pool is known")
    assert world.api.lists == dict.fromkeys(world.api.lists, 1)


async def test_changes_that_arrive_together_are_reported_once(world: World) -> None:
    before = world.changes
    for number in range(200):
        world.feed.apply("ServingPool", "ADDED", pool_manifest(f"p{number}"))
    await eventually(lambda: world.changes > before, "the change is reported")
    assert world.changes == before + 1


@pytest.mark.parametrize("stale_seconds", [1.5])
async def test_the_tables_are_stale_if_the_api_server_is_silent(world: World) -> None:
    bookmark = {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "2"}}}
    await eventually(lambda: world.feed.problem() is not None, "silence is a problem")
    problem = world.feed.problem()
    assert problem is not None
    assert "the API server sent nothing for more than 1.5 s about " in problem
    for plural in PLURALS[:-1]:
        world.api.send(plural, bookmark)
    await eventually(lambda: "Pod" not in (world.feed.problem() or ""), "bookmarks are signs of life")
    world.api.send("configmaps", bookmark)
    for plural in PLURALS[:-1]:
        world.api.send(plural, bookmark)
    await eventually(lambda: world.feed.problem() is None, "all kinds are current")


@pytest.mark.parametrize("stale_seconds", [1.5])
async def test_an_unreachable_api_server_leaves_the_tables_but_makes_them_stale(world: World) -> None:
    world.api.put(pool_manifest())
    await eventually(lambda: "serving/base" in world.catalog._models, "the pool is known")
    world.api.down = True
    for plural in PLURALS:
        world.api.send(plural, None)
    await eventually(lambda: world.feed.problem() is not None, "silence is a problem")
    assert "serving/base" in world.catalog._models
    world.api.down = False
    await eventually(lambda: world.feed.problem() is None, "the API server is back")
