"""Measure what reading many AdapterDeployments and API keys costs a gateway that starts.

The feed, the catalog, the key table and the client of the API server are the gateway's own, on its event loop. A
separate process simulates the API server: it lists over HTTP, in pages, and then sends changes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop
import yaml
from aiohttp import web

from tests.gateway.gateway_rig import adapter_manifest, pool_manifest
from tunesmith.cluster.client import Cluster
from tunesmith.contracts.apikey import key_record
from tunesmith.gateway.catalog import Catalog
from tunesmith.gateway.feed import Feed
from tunesmith.gateway.keys import KeyTable
from tunesmith.gateway.main import exempt_modules_from_collection

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from tunesmith.contracts.claims import ModelNameClaim
    from tunesmith.gateway.catalog import Model

Object = dict[str, Any]
NAMESPACE = "tunesmith-system"
CHANGES = 200
"""Changes that follow the list, one after the other."""
_TURN_SECONDS = 0.001
MOST_CPU_SECONDS, MOST_PAUSE_SECONDS = 3.0, 0.1
"""Highest figures that the last size may have."""


class RebuiltCatalog(Catalog):
    """The catalog as it was: each change sorts all claims and builds the index again."""

    def __init__(self) -> None:
        super().__init__()
        self._entries: dict[Any, tuple[ModelNameClaim, Model]] = {}

    def _claim(self, place: Any, claim: ModelNameClaim, model: Model) -> None:
        self._entries[place] = claim, model
        self._rebuild()

    def _withdraw(self, place: Any) -> None:
        if self._entries.pop(place, None) is not None:
            self._rebuild()

    def _rebuild(self) -> None:
        found = sorted(self._entries.values(), key=lambda entry: (entry[0].created, entry[0].uid), reverse=True)
        self._models = {claim.model: model for claim, model in found}


class RebuiltKeyTable(KeyTable):
    """The key table as it was: each change builds the index again."""

    def put(self, record_name: str, key: Any) -> None:
        """Add or replace a key."""
        self._by_record[record_name] = key
        self._rebuild()

    def remove(self, record_name: str) -> None:
        """Forget a key."""
        if self._by_record.pop(record_name, None) is not None:
            self._rebuild()

    def _rebuild(self) -> None:
        self._by_prefix = {}
        for name, key in self._by_record.items():
            self._by_prefix.setdefault(key.digest[:8], {})[name] = key


@dataclass(frozen=True)
class Figures:
    """Result of one run. Times in seconds; `pause` and `change` are CPU time of the event loop's thread."""

    cpu: float
    pause: float
    change: float


def adapters(count: int) -> list[Object]:
    """Return AdapterDeployments, 100 per namespace, with the status that a served one has."""
    conditions = [
        {"type": type_, "status": "True", "reason": "Resident", "message": "is resident", "observedGeneration": 1}
        for type_ in ("Resolved", "Ready", "Progressing")
    ]
    stamped = [{**condition, "lastTransitionTime": "2026-01-02T00:00:00Z"} for condition in conditions]
    return [
        adapter_manifest(f"adapter-{number}", f"team-{number // 100}", conditions=stamped) for number in range(count)
    ]


def keys(count: int) -> list[Object]:
    """Return the ConfigMaps of API keys."""
    return [
        key_record(f"key-{number}", NAMESPACE, f"sk-ts-{number}", home="team-0", namespaces=["team-0"], models=["*"])
        for number in range(count)
    ]


def serve(count: int, kind: str, port: Connection) -> None:
    """Simulate the API server for one kind; send its port. A line from the reader starts the changes."""
    plural = f"{kind.lower()}s"
    objects = {"servingpools": [pool_manifest()]}
    objects[plural] = adapters(count) if kind == "AdapterDeployment" else keys(count)
    for documents in objects.values():
        for number, document in enumerate(documents, 1):
            document["metadata"].update(resourceVersion=str(number))
            document["metadata"].setdefault("uid", f"uid-{document['metadata']['name']}")
    encoded = {name: [json.dumps(document).encode() for document in found] for name, found in objects.items()}

    async def answer(request: web.Request) -> web.StreamResponse:
        name = request.path.rpartition("/")[2]
        if request.query.get("watch") == "true":
            response = web.StreamResponse()
            await response.prepare(request)
            if name == plural:
                await asyncio.to_thread(port.recv)
                for number, document in enumerate(objects[plural][:CHANGES], count + 1):
                    document["metadata"]["resourceVersion"] = str(number)
                    await response.write(json.dumps({"type": "MODIFIED", "object": document}).encode() + b"\n")
            await asyncio.Event().wait()
        start, limit = int(request.query.get("continue", "0")), int(request.query["limit"])
        page, end = encoded.get(name, [])[start : start + limit], start + limit
        metadata: Object = {"resourceVersion": str(count)}
        if end < len(encoded.get(name, [])):
            metadata["continue"] = str(end)
        body = b'{"metadata":' + json.dumps(metadata).encode() + b',"items":[' + b",".join(page) + b"]}"
        return web.Response(body=body, content_type="application/json")

    async def run() -> None:
        application = web.Application()
        application.router.add_get("/{tail:.*}", answer)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    uvloop.run(run())


class Loop:
    """Longest CPU time between two turns of a task that is always about to be due."""

    def __init__(self) -> None:
        self.longest = 0.0

    async def run(self) -> None:
        """Measure until cancelled."""
        last = time.thread_time()
        while True:
            await asyncio.sleep(_TURN_SECONDS)
            now = time.thread_time()
            self.longest, last = max(self.longest, now - last), now


class CountingFeed(Feed):
    """A feed that sets an event once it has taken a number of objects."""

    expected = 0
    done: asyncio.Event

    def apply(self, kind: str, type_: str, document: Object) -> None:
        """Take one change."""
        super().apply(kind, type_, document)
        self.expected -= 1
        if self.expected <= 0:
            self.done.set()


def kubeconfig(folder: Path, url: str) -> Path:
    """Write the kubeconfig of an API server and return its path."""
    document = {
        "clusters": [{"name": "c", "cluster": {"server": url}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump(document))
    return path


async def read(url: str, count: int, change: Callable[[], None], catalog: Catalog, table: KeyTable) -> Figures:
    """Read everything as a gateway that starts does, then the changes."""
    with tempfile.TemporaryDirectory() as folder:
        async with await Cluster.connect(kubeconfig=kubeconfig(Path(folder), url)) as cluster:
            feed = CountingFeed(cluster, NAMESPACE, keys=table, catalog=catalog, changed=lambda: None)
            feed.expected, feed.done = count + 1, asyncio.Event()
            loop = Loop()
            started = time.process_time()
            tasks = [asyncio.create_task(loop.run()), asyncio.create_task(feed.run())]
            await feed.done.wait()
            while not feed.synced():  # noqa: ASYNC110 - it has no event
                await asyncio.sleep(_TURN_SECONDS)
            cpu, pause = time.process_time() - started, loop.longest
            tasks[0].cancel()
            changes = min(CHANGES, count)
            feed.expected, feed.done = changes, asyncio.Event()
            started = time.thread_time()
            change()
            await feed.done.wait()
            per_change = (time.thread_time() - started) / changes
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return Figures(cpu, pause, per_change)


def measure(kind: str, count: int, catalog: Catalog, table: KeyTable) -> Figures:
    """Measure one size of one kind."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(count, kind, theirs), daemon=True)
    server.start()
    try:
        url = f"http://127.0.0.1:{ours.recv()}"
        return uvloop.run(read(url, count, lambda: ours.send("change"), catalog, table))
    finally:
        server.kill()
        server.join()


def main() -> None:
    """Print the table."""
    exempt_modules_from_collection()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="1000,4000,10000", help="numbers of objects")
    arguments = parser.parse_args()
    sizes = [int(text) for text in arguments.sizes.split(",")]
    print(
        "| | CPU time to read all | longest pause | one change | as it was: to read all | longest pause | one change |"
    )
    print("|---|---|---|---|---|---|---|")
    slow = []
    for kind, name in (("AdapterDeployment", "AdapterDeployments"), ("ConfigMap", "API keys")):
        for size in sizes:
            now = measure(kind, size, Catalog(), KeyTable())
            before = measure(kind, size, RebuiltCatalog(), RebuiltKeyTable())
            cells = (
                f"{found.cpu:.2f} s | {found.pause * 1000:.1f} ms | {found.change * 1000:.2f} ms"
                for found in (now, before)
            )
            print(f"| {size:,} {name} | {' | '.join(cells)} |", flush=True)
            if now.cpu > MOST_CPU_SECONDS or now.pause > MOST_PAUSE_SECONDS:
                slow.append(f"{size:,} {name}")
    if slow:
        sys.exit(
            f"Above {MOST_CPU_SECONDS:g} s of CPU or a pause of {MOST_PAUSE_SECONDS * 1000:g} ms: {', '.join(slow)}"
        )


if __name__ == "__main__":
    main()
