"""A watch that does not end: it lists again by itself and tells the differences, deletions too."""

from __future__ import annotations

import asyncio
import json
import random
import time
from typing import TYPE_CHECKING, Literal, NamedTuple

from tunesmith.cluster.errors import ClusterError, ExpiredError, UnavailableError, error_of
from tunesmith.cluster.resources import Object, Objects, named, resource_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from tunesmith.cluster.client import Cluster

_WATCH_SECONDS = 300
_MAX_BACKOFF_SECONDS = 10.0
_SHORT_SECONDS = 1.0


class WatchEvent(NamedTuple):
    """A change. SYNCED (with an empty object) follows every complete list: what was not told by then does not exist."""

    type: Literal["ADDED", "MODIFIED", "DELETED", "SYNCED"]
    object: Object


async def watch(
    cluster: Cluster, kind: str, namespace: str | None = None, *, labels: str = "", fields: str = ""
) -> AsyncIterator[WatchEvent]:
    """Every object as ADDED, then SYNCED, then every change, without end.

    Whatever breaks the stream (expiry, network, an overloaded or restarted API server), it goes on or lists again and
    tells the differences. Deletions carry the last known object.

    Raises:
        ClusterError: the first list failed in a way that waiting does not mend (no such kind, forbidden).
    """
    known: dict[tuple[str, str], Object] = {}
    selectors = {"labelSelector": labels, "fieldSelector": fields}
    synced = False
    while True:
        items, version = await _list(cluster, kind, namespace, selectors, patient=synced)
        for difference in differences(known, items):
            yield difference
        known = {key_of(item): item for item in items}
        yield WatchEvent("SYNCED", {})
        synced, failures = True, 0
        while failures < 2:  # noqa: PLR2004 - goes on after a hiccup, lists again after the second in a row
            started, failures = time.monotonic(), failures + 1
            try:
                async for event, newest in _changes(
                    cluster, kind, namespace, {**selectors, "resourceVersion": version}
                ):
                    version, failures = newest, 0
                    if event is not None:
                        _remember(known, event)
                        yield event
            except ExpiredError:
                break
            except ClusterError:
                await asyncio.sleep(backoff(failures))
            else:
                if time.monotonic() - started > _SHORT_SECONDS:
                    failures = 0


async def _list(
    cluster: Cluster, kind: str, namespace: str | None, selectors: Mapping[str, str], *, patient: bool
) -> tuple[Objects, str]:
    """A complete list and its version, tried until it succeeds; unless `patient` only if waiting can mend the error."""
    failures = 0
    while True:
        try:
            return await cluster.list_at(
                kind, namespace, labels=selectors["labelSelector"], fields=selectors["fieldSelector"]
            )
        except ClusterError as error:
            if not patient and not isinstance(error, UnavailableError | ExpiredError):
                raise
            failures += 1
            await asyncio.sleep(backoff(failures))


async def _changes(
    cluster: Cluster, kind: str, namespace: str | None, query: Mapping[str, str]
) -> AsyncIterator[tuple[WatchEvent | None, str]]:
    """Changes, each with its version (None for a bookmark), until the API server ends the stream."""
    resource = resource_of(kind)
    seconds = str(_WATCH_SECONDS + random.randrange(60))  # noqa: S311 - spreads load, is no secret
    query = {**query, "watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": seconds}
    async for line in cluster.stream(kind, namespace, query):
        event = json.loads(line)
        item: Object = event["object"]
        if event["type"] == "ERROR":
            raise error_of(item.get("code", 500), item.get("reason", ""), item.get("message", ""))
        version = item["metadata"]["resourceVersion"]
        yield None if event["type"] == "BOOKMARK" else WatchEvent(event["type"], named(item, resource)), version


def differences(known: Mapping[tuple[str, str], Object], items: Objects) -> list[WatchEvent]:
    """The changes from what was known, by (namespace, name), to a complete list."""
    current = {key_of(item) for item in items}
    events = [WatchEvent("DELETED", item) for key, item in known.items() if key not in current]
    for item in items:
        old = known.get(key_of(item))
        if old is None:
            events.append(WatchEvent("ADDED", item))
        elif old["metadata"]["uid"] != item["metadata"]["uid"]:
            events += [WatchEvent("DELETED", old), WatchEvent("ADDED", item)]
        elif old["metadata"]["resourceVersion"] != item["metadata"]["resourceVersion"]:
            events.append(WatchEvent("MODIFIED", item))
    return events


def key_of(item: Object) -> tuple[str, str]:
    """(namespace, name) of an object."""
    return item["metadata"].get("namespace", ""), item["metadata"]["name"]


def backoff(failures: int) -> float:
    """Seconds to wait after so many failures in a row: 0.2 doubled each time, at most 10, less up to half at random."""
    return min(_MAX_BACKOFF_SECONDS, 0.2 * 2.0 ** min(failures, 10)) * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load


def _remember(known: dict[tuple[str, str], Object], event: WatchEvent) -> None:
    if event.type == "DELETED":
        known.pop(key_of(event.object), None)
    else:
        known[key_of(event.object)] = event.object
