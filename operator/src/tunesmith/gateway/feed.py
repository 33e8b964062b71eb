"""From the API server's watches into the gateway's tables."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol

from tunesmith.cluster.errors import ClusterError
from tunesmith.contracts.apikey import KEY_LABEL, parse_key_secret
from tunesmith.gateway.catalog import POOL_LABEL

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

    from tunesmith.cluster.watch import WatchEvent
    from tunesmith.gateway.catalog import Catalog
    from tunesmith.gateway.keys import KeyTable

LOG = logging.getLogger(__name__)

KINDS = ("ServingPool", "AdapterDeployment", "Pod", "Secret")
_RETRY_SECONDS = 5.0


class Watcher(Protocol):
    """What the gateway asks of the cluster."""

    def watch(self, kind: str, namespace: str | None = None, *, labels: str = "") -> AsyncIterator[WatchEvent]:
        """Every object as ADDED, then SYNCED, then every change, without end."""


class Feed:
    """Keeps the tables as the API server has them. While it cannot be reached, the tables stay as they are.

    Args:
        watcher: the cluster.
        namespace: the gateway's own, which holds the keys.
        keys: the table of keys to fill.
        catalog: the catalog to fill.
        changed: called after a change of pools or pods.
    """

    def __init__(
        self, watcher: Watcher, namespace: str, *, keys: KeyTable, catalog: Catalog, changed: Callable[[], None]
    ) -> None:
        self._watcher = watcher
        self._namespace = namespace
        self._keys = keys
        self._catalog = catalog
        self._changed = changed
        self._synced: set[str] = set()

    @property
    def missing(self) -> list[str]:
        """The kinds that have not been read yet."""
        return [kind for kind in KINDS if kind not in self._synced]

    def synced(self) -> bool:
        """Whether everything has been read once."""
        return len(self._synced) == len(KINDS)

    async def run(self) -> None:
        """Follow all kinds until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for kind in KINDS:
                tasks.create_task(self._follow(kind), name=f"watch {kind}")

    async def _follow(self, kind: str) -> None:
        namespace = self._namespace if kind == "Secret" else None
        labels = {"Pod": POOL_LABEL, "Secret": f"{KEY_LABEL}=true"}.get(kind, "")
        while True:
            try:
                events: AsyncGenerator[WatchEvent, None]
                events = self._watcher.watch(kind, namespace, labels=labels)  # type: ignore[assignment]
                async with aclosing(events):
                    async for event in events:
                        self.take(kind, event.type, event.object)
            except ClusterError as error:
                LOG.error("cannot watch %s: %s", kind, error)  # noqa: TRY400 - the sentence says all
            await asyncio.sleep(_RETRY_SECONDS)

    def take(self, kind: str, type_: str, document: dict[str, Any]) -> None:
        """Take over one event. An object that cannot be read is logged and left out."""
        if type_ == "SYNCED":
            self._synced.add(kind)
            return
        try:
            if type_ == "DELETED":
                self._remove(kind, document)
            else:
                self._put(kind, document)
        except (ValueError, KeyError) as error:
            metadata = document.get("metadata", {})
            LOG.warning("%s %s/%s is ignored: %s", kind, metadata.get("namespace"), metadata.get("name"), error)
        if kind in {"ServingPool", "Pod"}:
            self._changed()

    def _put(self, kind: str, document: dict[str, Any]) -> None:
        if kind == "Secret":
            name = document["metadata"]["name"]
            self._keys.remove(name)
            self._keys.put(name, parse_key_secret(document))
        elif kind == "ServingPool":
            self._catalog.put_pool(document)
        elif kind == "AdapterDeployment":
            self._catalog.put_adapter(document)
        else:
            self._catalog.put_pod(document)

    def _remove(self, kind: str, document: dict[str, Any]) -> None:
        if kind == "Secret":
            self._keys.remove(document["metadata"]["name"])
        elif kind == "ServingPool":
            self._catalog.remove_pool(document)
        elif kind == "AdapterDeployment":
            self._catalog.remove_adapter(document)
        else:
            self._catalog.remove_pod(document)
