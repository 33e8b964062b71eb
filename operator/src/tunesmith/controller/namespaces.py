"""Labels of the namespaces that the operator serves, which decide to which pools their adapters may attach.

They have their own watches: with `watch-namespaces` the operator may read only these namespaces, one by one with a
field selector, which kopf does not support.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from tunesmith.cluster.errors import ClusterError
from tunesmith.cluster.watch import backoff

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tunesmith.cluster.client import Cluster
    from tunesmith.cluster.resources import Object

KIND = "Namespace"
_ALL = ""
_log = logging.getLogger(__name__)


class NamespaceLabels:
    """Labels by namespace. While the API server is unreachable, they stay unchanged."""

    def __init__(self) -> None:
        self._labels: dict[str, Mapping[str, str]] = {}
        self.revision = 0
        """Number that changes whenever any labels change."""

    def labels(self, namespace: str) -> Mapping[str, str] | None:
        """Return the labels of a namespace; None if it does not exist or may not be read."""
        return self._labels.get(namespace)

    def put(self, namespace: str, labels: Mapping[str, str]) -> bool:
        """Set the labels of a namespace; return False if they are unchanged."""
        if self._labels.get(namespace) == labels:
            return False
        self._labels[namespace] = labels
        self.revision += 1
        return True

    def remove(self, namespace: str) -> bool:
        """Forget a namespace; return False if it is not known."""
        if self._labels.pop(namespace, None) is None:
            return False
        self.revision += 1
        return True

    def names(self) -> list[str]:
        """Return the known namespaces."""
        return list(self._labels)


class NamespaceFollower:
    """Synchronisation of a table of labels with the API server.

    Args:
        cluster: the cluster.
        names: the namespaces to follow; empty: all.
        labels: the table to fill.
        changed: called with each namespace whose labels have changed.
    """

    def __init__(
        self, cluster: Cluster, names: Sequence[str], labels: NamespaceLabels, changed: Callable[[Object], None]
    ) -> None:
        self._cluster = cluster
        self._labels = labels
        self._changed = changed
        self._unread = set(names or (_ALL,))
        self.read = asyncio.Event()
        """Set once every namespace was read or proved unreadable; no selector matches unreadable ones."""

    async def run(self) -> None:
        """Follow the namespaces until cancelled."""
        async with asyncio.TaskGroup() as group:
            for name in tuple(self._unread):
                group.create_task(self._follow(name))

    async def _follow(self, name: str) -> None:
        failures = 0
        while True:
            try:
                await self._watch(name)
            except ClusterError as error:
                _log.warning("the labels of %s cannot be read: %s", name or "the namespaces", error)
            failures += 1
            self._done(name)
            await asyncio.sleep(backoff(failures))

    async def _watch(self, name: str) -> None:
        listed: set[str] | None = set()
        events = self._cluster.watch(KIND, fields=f"metadata.name={name}" if name else "", keep=_reduced)
        async for event in events:
            if event.type == "SYNCED":
                for namespace in self._deleted(name, listed):
                    self._labels.remove(namespace)
                listed = None
                self._done(name)
                continue
            place = event.object["metadata"]["name"]
            if listed is not None:
                listed.add(place)
            if event.type == "DELETED":
                changed = self._labels.remove(place)
            else:
                changed = self._labels.put(place, event.object["metadata"].get("labels") or {})
            if changed:
                self._changed(event.object)

    def _deleted(self, name: str, listed: set[str] | None) -> list[str]:
        """Return the known namespaces that are missing from the first list of a watch."""
        if listed is None:
            return []
        return [known for known in self._labels.names() if known not in listed and name in {_ALL, known}]

    def _done(self, name: str) -> None:
        self._unread.discard(name)
        if not self._unread:
            self.read.set()


def _reduced(namespace: Object) -> Object:
    metadata = namespace["metadata"]
    fields = {name: metadata[name] for name in ("name", "uid", "resourceVersion", "labels") if name in metadata}
    return {"apiVersion": "v1", "kind": KIND, "metadata": fields}
