"""Watch without end: after any interruption it lists again and yields the differences, deletions included."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Literal, NamedTuple

from tunesmith.cluster.errors import ClusterError, ExpiredError, UnavailableError, error_of
from tunesmith.cluster.resources import Object, named, resource_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping

    from tunesmith.cluster.client import Cluster

_WATCH_SECONDS = 300
_MAX_BACKOFF_SECONDS = 10.0
_SHORT_SECONDS = 1.0
_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
_log = logging.getLogger(__name__)


class WatchEvent(NamedTuple):
    """A change. SYNCED, with an empty object, follows every complete list: objects not in the list do not exist."""

    type: Literal["ADDED", "MODIFIED", "DELETED", "SYNCED"]
    object: Object


async def watch(
    cluster: Cluster,
    kind: str,
    namespace: str | None = None,
    *,
    labels: str = "",
    fields: str = "",
    alive: Callable[[], None] = lambda: None,
    keep: Callable[[Object], Object] = lambda item: item,
) -> AsyncIterator[WatchEvent]:
    """Yield every object as ADDED, then SYNCED, then every change, without end.

    After any interruption (expiry, network, an overloaded or restarted API server, a line that is cut or cannot be
    parsed), it resumes or lists again and yields the differences. A deletion that a list reveals has the object's
    identity and labels only; nothing more is kept of the objects. The changes in a list's page are yielded before the
    next page is read.

    Args:
        cluster: the connection.
        kind: kind of the objects.
        namespace: namespace of the objects; None: all namespaces.
        labels: label selector.
        fields: field selector.
        alive: called for each sign of life of the API server: a list, an event, a bookmark (about one a minute), the
            regular close of a stream.
        keep: returns the parts of an object that events contain, such as `keep.kept`.

    Raises:
        ClusterError: the first list failed in a way that waiting does not fix (no such kind, forbidden).
    """
    known: dict[tuple[str, str], Object] = {}
    selectors = {"labelSelector": labels, "fieldSelector": fields}
    synced, failures, unreadable = False, 0, 0
    while True:
        listed: set[tuple[str, str]] = set()
        version = ""
        try:
            async with aclosing(cluster.pages(kind, namespace, labels=labels, fields=fields)) as pages:
                async for page, version in pages:  # noqa: B007 - every page has the same version
                    alive()
                    for item in page:
                        listed.add(key_of(item))
                        for event in _difference(known.get(key_of(item)), item):
                            _remember(known, event)
                            yield event._replace(object=keep(event.object))
        except ClusterError as error:
            if not synced and not isinstance(error, UnavailableError | ExpiredError):
                raise
            failures += 1
            await asyncio.sleep(backoff(failures))
            continue
        for key in known.keys() - listed:
            yield WatchEvent("DELETED", known.pop(key))
        synced, failures = True, 0
        yield WatchEvent("SYNCED", {})
        try:
            async with aclosing(_follow(cluster, kind, namespace, selectors, version, alive, keep)) as events:
                async for event in events:
                    unreadable = 0
                    _remember(known, event)
                    yield event
        except _UNREADABLE as error:
            unreadable += 1
            _log.warning("the watch of %s received an unreadable line (%s): listing again", kind, error)
            await asyncio.sleep(backoff(unreadable))


async def _follow(
    cluster: Cluster,
    kind: str,
    namespace: str | None,
    selectors: Mapping[str, str],
    version: str,
    alive: Callable[[], None],
    keep: Callable[[Object], Object],
) -> AsyncGenerator[WatchEvent, None]:
    """Yield the changes after a version, reopening streams that close, until a new list is needed."""
    failures = 0
    while failures < 2:  # noqa: PLR2004 - continues after a hiccup, lists again after the second in a row
        started, failures = time.monotonic(), failures + 1
        try:
            query = {**selectors, "resourceVersion": version}
            async with aclosing(_changes(cluster, kind, namespace, query)) as changes:
                async for event, newest in changes:
                    version, failures = newest, 0
                    alive()
                    if event is not None:
                        yield event._replace(object=keep(event.object))
        except ExpiredError:
            return
        except ClusterError as error:
            _log.info("the watch of %s was interrupted: %s", kind, error)
            await asyncio.sleep(backoff(failures))
        else:
            alive()
            if time.monotonic() - started > _SHORT_SECONDS:
                failures = 0


async def _changes(
    cluster: Cluster, kind: str, namespace: str | None, query: Mapping[str, str]
) -> AsyncGenerator[tuple[WatchEvent | None, str], None]:
    """Yield changes, each with its version (None for a bookmark), until the API server closes the stream."""
    resource = resource_of(kind)
    seconds = str(_WATCH_SECONDS + random.randrange(60))  # noqa: S311 - spreads load, is no secret
    query = {**query, "watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": seconds}
    async with aclosing(cluster.stream(kind, namespace, query)) as lines:
        async for line in lines:
            event = json.loads(line)
            item: Object = event["object"]
            if event["type"] == "ERROR":
                raise error_of(item.get("code", 500), item.get("reason", ""), item.get("message", ""))
            version = item["metadata"]["resourceVersion"]
            yield None if event["type"] == "BOOKMARK" else WatchEvent(event["type"], named(item, resource)), version


def _difference(old: Object | None, item: Object) -> Iterator[WatchEvent]:
    """Yield the differences between the known state of an object and its state in a list."""
    if old is None:
        yield WatchEvent("ADDED", item)
    elif old["metadata"]["uid"] != item["metadata"]["uid"]:
        yield WatchEvent("DELETED", old)
        yield WatchEvent("ADDED", item)
    elif old["metadata"]["resourceVersion"] != item["metadata"]["resourceVersion"]:
        yield WatchEvent("MODIFIED", item)


def key_of(item: Object) -> tuple[str, str]:
    """Return (namespace, name) of an object."""
    return item["metadata"].get("namespace", ""), item["metadata"]["name"]


def backoff(failures: int) -> float:
    """Return the wait after consecutive failures, in seconds: 0.2 doubled each time, at most 10, 0 to 50 % less."""
    return min(_MAX_BACKOFF_SECONDS, 0.2 * 2.0 ** min(failures, 10)) * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load


def _remember(known: dict[tuple[str, str], Object], event: WatchEvent) -> None:
    if event.type == "DELETED":
        known.pop(key_of(event.object), None)
    else:
        known[key_of(event.object)] = _identity(event.object)


def _identity(item: Object) -> Object:
    """Return the fields of an object that later comparisons need."""
    metadata = item["metadata"]
    kept = {
        name: metadata[name] for name in ("namespace", "name", "uid", "resourceVersion", "labels") if name in metadata
    }
    return {**{name: item[name] for name in ("apiVersion", "kind") if name in item}, "metadata": kept}
