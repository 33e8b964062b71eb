"""Updates of the gateway's tables from watches of the API server."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol

from tunesmith.cluster.errors import ClusterError
from tunesmith.cluster.keep import kept
from tunesmith.contracts.apikey import KEY_KIND, KEY_LABEL, parse_key_record
from tunesmith.contracts.labels import POOL_LABEL

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence

    from tunesmith.cluster.resources import Object
    from tunesmith.cluster.watch import WatchEvent
    from tunesmith.gateway.catalog import Catalog
    from tunesmith.gateway.keys import KeyTable

LOG = logging.getLogger(__name__)

_Source = tuple[str, str | None]
"""A kind and the namespace in which it is watched; None: all. For the kind Namespace, the name of the watched one."""
KINDS = ("ServingPool", "AdapterDeployment", "Pod", "Namespace", KEY_KIND)
STALE_SECONDS = 180.0
"""A kind whose watch received nothing for this long, not even a bookmark, is stale: a deleted key would still be valid.
The API server sends a bookmark about once a minute, and a stream that is silent for 90 s is reopened."""
_RETRY_SECONDS = 5.0
_SLICE_SECONDS = 0.005
"""Events are processed for this long before other tasks run."""


class Watcher(Protocol):
    """The part of the cluster that the gateway reads."""

    def watch(
        self,
        kind: str,
        namespace: str | None = None,
        *,
        labels: str = "",
        fields: str = "",
        alive: Callable[[], None],
        keep: Callable[[Object], Object],
    ) -> AsyncIterator[WatchEvent]:
        """Yield every object as ADDED, then SYNCED, then every change; call `alive` whenever data arrives."""


class Feed:
    """Synchronisation of the tables with the API server. While it is unreachable, the tables stay unchanged.

    Args:
        watcher: the cluster.
        namespace: the gateway's namespace, which holds the keys.
        watched: namespaces whose pools and adapters are served; empty: all.
        keys: the table of keys to fill.
        catalog: the catalog to fill.
        changed: called soon after changes of pools or pods, once for changes that arrive together.
        stale_seconds: see `STALE_SECONDS`.
    """

    def __init__(
        self,
        watcher: Watcher,
        namespace: str,
        watched: Sequence[str] = (),
        *,
        keys: KeyTable,
        catalog: Catalog,
        changed: Callable[[], None],
        stale_seconds: float = STALE_SECONDS,
    ) -> None:
        self._watcher = watcher
        self._sources: list[_Source] = [
            (kind, scope) for kind in KINDS for scope in ((namespace,) if kind == KEY_KIND else watched or (None,))
        ]
        self._keys = keys
        self._catalog = catalog
        self._changed = changed
        self._stale_seconds = stale_seconds
        self._synced: set[_Source] = set()
        self._received_at: dict[_Source, float] = {}
        self._known: dict[str, set[tuple[str, str]]] = {kind: set() for kind in KINDS}
        self._change_pending = False

    @property
    def missing(self) -> list[str]:
        """Kinds that have not been read yet."""
        return list(dict.fromkeys(kind for kind, scope in self._sources if (kind, scope) not in self._synced))

    def synced(self) -> bool:
        """Return True if everything has been read once."""
        return len(self._synced) == len(self._sources)

    def problem(self) -> str | None:
        """Return the reason why the tables are not reliable, or None."""
        if self.missing:
            return f"not read yet: {', '.join(self.missing)}"
        now = time.monotonic()
        ages = {_describe(source): now - self._received_at[source] for source in self._sources}
        stale = [f"{source} ({age:.0f} s)" for source, age in ages.items() if age > self._stale_seconds]
        if stale:
            return f"the API server sent nothing for more than {self._stale_seconds:g} s about {', '.join(stale)}"
        return None

    async def run(self) -> None:
        """Follow all kinds until cancelled.

        Raises:
            ExceptionGroup: one of the tasks failed; the others were cancelled.
        """
        async with asyncio.TaskGroup() as tasks:
            for source in self._sources:
                tasks.create_task(self._follow(source), name=f"watch {_describe(source)}")

    async def _follow(self, source: _Source) -> None:
        kind = _describe(source)
        while True:
            try:
                await self._watch(source)
            except ClusterError as error:
                LOG.error("cannot watch %s: %s", kind, error)  # noqa: TRY400 - the message is sufficient
            except Exception:
                LOG.exception("the watch of %s failed; restarting it", kind)
            await asyncio.sleep(_RETRY_SECONDS)

    async def _watch(self, source: _Source) -> None:
        """Follow a kind until its watch fails. A new watch lists everything; objects that it omits are removed."""
        kind, namespace = source
        labels = {"Pod": POOL_LABEL, KEY_KIND: f"{KEY_LABEL}=true"}.get(kind, "")
        listed: set[tuple[str, str]] | None = set()

        def alive() -> None:
            self._received_at[source] = time.monotonic()

        events: AsyncGenerator[WatchEvent, None]
        fields = f"metadata.name={namespace}" if kind == "Namespace" and namespace is not None else ""
        events = self._watcher.watch(  # type: ignore[assignment]
            kind, None if fields else namespace, labels=labels, fields=fields, alive=alive, keep=kept
        )
        async with aclosing(events):
            time_slice = _TimeSlice()
            async for event in events:
                alive()
                if event.type == "SYNCED":
                    if listed is not None:
                        known = {key for key in self._known[kind] if namespace in (None, key[kind == "Namespace"])}
                        for unlisted in known - listed:
                            self.apply(kind, "DELETED", _identity(*unlisted))
                            await time_slice.pause_if_over()
                        listed = None
                    self._synced.add(source)
                else:
                    if listed is not None:
                        listed.add(_key_of(event.object))
                    self.apply(kind, event.type, event.object)
                await time_slice.pause_if_over()

    def apply(self, kind: str, type_: str, document: dict[str, Any]) -> None:
        """Apply one change. An object that cannot be parsed is logged and skipped."""
        try:
            if type_ == "DELETED":
                self._known[kind].discard(_key_of(document))
                self._remove(kind, document)
            else:
                self._known[kind].add(_key_of(document))
                self._put(kind, document)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            metadata = document.get("metadata", {})
            LOG.warning("ignoring %s %s/%s: %s", kind, metadata.get("namespace"), metadata.get("name"), error)
        if kind in {"ServingPool", "Pod"} and not self._change_pending:
            self._change_pending = True
            asyncio.get_running_loop().call_soon(self._report_change)

    def _report_change(self) -> None:
        self._change_pending = False
        self._changed()

    def _put(self, kind: str, document: dict[str, Any]) -> None:
        if kind == KEY_KIND:
            name = document["metadata"]["name"]
            self._keys.remove(name)
            self._keys.put(name, parse_key_record(document))
        elif kind == "ServingPool":
            self._catalog.put_pool(document)
        elif kind == "Namespace":
            self._catalog.put_namespace(document)
        elif kind == "AdapterDeployment":
            self._catalog.put_adapter(document)
        else:
            self._catalog.put_pod(document)

    def _remove(self, kind: str, document: dict[str, Any]) -> None:
        if kind == KEY_KIND:
            self._keys.remove(document["metadata"]["name"])
        elif kind == "ServingPool":
            self._catalog.remove_pool(document)
        elif kind == "Namespace":
            self._catalog.remove_namespace(document)
        elif kind == "AdapterDeployment":
            self._catalog.remove_adapter(document)
        else:
            self._catalog.remove_pod(document)


class _TimeSlice:
    """Time for which events may be processed without a pause."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    async def pause_if_over(self) -> None:
        """Let other tasks run if the time is over."""
        if time.monotonic() - self._started > _SLICE_SECONDS:
            await asyncio.sleep(0)
            self._started = time.monotonic()


def _identity(namespace: str, name: str) -> Object:
    return {"metadata": {"namespace": namespace, "name": name}}


def _describe(source: _Source) -> str:
    kind, namespace = source
    return kind if namespace is None else f"{kind} in {namespace}"


def _key_of(document: dict[str, Any]) -> tuple[str, str]:
    metadata = document["metadata"]
    return metadata.get("namespace", ""), metadata["name"]
