"""Maintenance of the caches, and reconciling of changed objects while this replica leads."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, TypeVar

from tunesmith.cluster.errors import ClusterError, ForbiddenError
from tunesmith.cluster.keep import PAGE_SIZE, kept
from tunesmith.cluster.watch import backoff
from tunesmith.controller.installation_key import gateway_key_secret, installation_keys, metrics_token_secret
from tunesmith.controller.namespaces import KIND as NAMESPACE
from tunesmith.controller.namespaces import NamespaceFollower
from tunesmith.controller.reconciler import Key, Watch, key_of
from tunesmith.controller.watching import Watcher

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from tunesmith.cluster.resources import Object
    from tunesmith.controller.context import Context
    from tunesmith.controller.reconciler import Reconciler

T = TypeVar("T")
_HUNG_SECONDS = 120.0
_SECOND_LIST_SECONDS = 5.0
_READ_KEYS_SECONDS = 10.0
_WRITE_KEYS_SECONDS = 300.0
_log = logging.getLogger(__name__)


class Controller:
    """The caches, the queue and the workers of a set of reconcilers."""

    def __init__(self, context: Context, reconcilers: Sequence[Reconciler]) -> None:
        self._context = context
        self._reconcilers = {reconciler.kind: reconciler for reconciler in reconcilers}
        self._watches = _combined(reconcilers)
        self._cached = [watch for watch in self._watches if watch.kind != NAMESPACE]
        self._namespaces = NamespaceFollower(
            context.cluster, context.settings.watch_namespaces, context.namespaces, self._enqueue_watching
        )
        self._listed: float | None = None
        self._synced = asyncio.Event()
        self._relist = asyncio.Event()
        self._keys_known = asyncio.Event()
        self._leading = False
        self._leads = asyncio.Event()
        self._busy: dict[Key, float] = {}
        self._watcher = Watcher(
            context.cluster,
            context.settings.watch_namespaces,
            self._selectors(),
            self.observe,
            self._watches_stopped,
        )
        context.written = self._enqueue_dependents
        context.metrics.queue_depth.set_function(lambda: context.queue.depth)

    def unhealthy(self) -> list[str]:
        """Return the reasons to restart the process: a reconcile that does not return, stopped watches."""
        now = time.monotonic()
        hung = [key for key, since in self._busy.items() if now - since > _HUNG_SECONDS]
        problems = [f"{key} has been reconciling for more than {_HUNG_SECONDS:.0f} s" for key in hung]
        return [*problems, "the watches stopped permanently"] if self._watcher.died else problems

    def unready(self) -> list[str]:
        """Return the reasons why the process cannot work now: its state of the cluster is missing or stale."""
        if self._listed is None:
            return ["the caches are not synced"]
        problems = [] if self._watcher.alive else ["the watches are not running"]
        age = time.monotonic() - self._listed
        if age > 3 * self._context.settings.relist_seconds:
            problems.append(f"the last complete list is {age:.0f} s old")
        return problems

    async def keep_caches(self) -> None:
        """List everything, start the watches, and relist periodically. Runs until cancelled."""
        failures = lists = 0
        while True:
            self._relist.clear()
            try:
                for watch in {(watch.kind, watch.selector): watch for watch in self._cached}.values():
                    await self._list(watch)
            except ClusterError as error:
                failures += 1
                _log.warning("listing failed: %s", error)
                await asyncio.sleep(backoff(failures))
                continue
            failures = 0
            if self._listed is None:
                self._watcher.start()
            self._listed = time.monotonic()
            self._synced.set()
            # The second list follows soon, since deletions between the first one and the watches' start are missed.
            seconds = self._context.settings.relist_seconds
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds if lists else min(seconds, _SECOND_LIST_SECONDS)):
                    await self._relist.wait()
            lists += 1

    async def lead(self, epoch: int) -> None:
        """Reconcile until cancelled."""
        if self._listed is not None:
            # A replica that was on standby relists first, since its watches may have missed changes.
            self._synced.clear()
            self._relist.set()
        await self._synced.wait()
        await self._namespaces.read.wait()
        self._context.epoch = epoch
        await self._keys_known.wait()
        self._context.cluster_uid = await self._read_with_retries("the cluster's identity", self._cluster_uid)
        self._enqueue_all()
        self._context.metrics.leading.set(1)
        self._leading = True
        self._leads.set()
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._context.settings.workers):
                    group.create_task(self._work())
                for reconciler in self._reconcilers.values():
                    group.create_task(self._background(reconciler))
        finally:
            self._leading = False
            self._context.metrics.leading.set(0)

    async def keep_namespaces(self) -> None:
        """Follow the labels of the namespaces. Runs until cancelled."""
        await self._namespaces.run()

    async def keep_keys(self) -> None:
        """Follow the installation key, and write the Secrets derived from it while this replica leads.

        Runs until cancelled.
        """
        context, failures, written = self._context, 0, float("-inf")
        while True:
            try:
                keys = await installation_keys(context.cluster, context.settings.namespace)
                if keys != context.installation_keys:
                    if context.installation_keys:
                        _log.info("the installation key changed: the keys of gateways and pools are being renewed")
                    context.installation_keys, written = keys, float("-inf")
                    self._keys_known.set()
                    if self._leading:
                        self._enqueue_all()
                if self._leading and time.monotonic() - written > _WRITE_KEYS_SECONDS:
                    for secret in (gateway_key_secret, metrics_token_secret):
                        await context.apply(secret(keys, context.settings.namespace))
                    written = time.monotonic()
            except ClusterError as error:
                failures += 1
                _log.warning("the keys cannot be renewed: %s", error)
                await asyncio.sleep(backoff(failures))
                continue
            failures = 0
            self._leads.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_READ_KEYS_SECONDS):
                    await self._leads.wait()

    def _enqueue_all(self) -> None:
        for kind in self._reconcilers:
            for item in self._context.caches[kind].list():
                self._context.queue.add(key_of(item))

    async def _read_with_retries(self, subject: str, read: Callable[[], Awaitable[T]]) -> T:
        failures = 0
        while True:
            try:
                return await read()
            except ClusterError as error:
                failures += 1
                _log.warning("%s cannot be read: %s", subject, error)
                await asyncio.sleep(backoff(failures))

    async def _cluster_uid(self) -> str:
        try:
            return str((await self._context.cluster.get("Namespace", "kube-system"))["metadata"]["uid"])
        except ForbiddenError as error:
            _log.warning("tunesmith gc will keep the files of deleted jobs in the store: %s", error)
            return ""

    async def stop(self) -> None:
        """Stop the watches."""
        await self._watcher.stop()

    def observe(self, type_: str | None, item: Object) -> None:
        """Process a watch event. An event that cannot be read is logged, and a complete list follows."""
        try:
            self._observe(type_, item)
        except Exception:  # noqa: BLE001 - one object must not hide the others
            _log.exception("an event of %s cannot be read", item.get("kind"))
            self._relist.set()

    def _observe(self, type_: str | None, item: Object) -> None:
        cache = self._context.caches[item["kind"]]
        wanted = any(watch.kind == item["kind"] and watch.matches(item) for watch in self._watches)
        changed = cache.put(item) if wanted and type_ != "DELETED" else cache.remove(item)
        if changed:
            self._enqueue(item)

    async def _list(self, watch: Watch) -> None:
        cache = self._context.caches[watch.kind]
        for namespace in self._context.settings.watch_namespaces or (None,):
            items, version = await self._context.cluster.list_at(
                watch.kind, namespace, labels=watch.selector, page_size=PAGE_SIZE, keep=kept
            )
            for item in cache.replace(items, version, _among(watch, namespace)):
                self._enqueue(item)
        self._context.metrics.cached.labels(watch.kind).set(len(cache))

    def _enqueue(self, item: Object) -> None:
        if item["kind"] in self._reconcilers:
            self._context.queue.add(key_of(item))
        self._enqueue_watching(item)

    def _enqueue_watching(self, item: Object) -> None:
        for watch in self._watches:
            if watch.kind == item["kind"] and watch.matches(item):
                try:
                    for key in watch.keys(item):
                        self._context.queue.add(key)
                except Exception:  # noqa: BLE001 - an object of a tenant must not terminate the process
                    _log.exception("%s cannot be read", key_of(item))

    def _enqueue_dependents(self, item: Object) -> None:
        """Enqueue keys of other kinds that depend on an object that a reconciler wrote."""
        if item["kind"] in self._reconcilers:
            self._enqueue_watching(item)

    async def _work(self) -> None:
        queue = self._context.queue
        while True:
            key = await queue.get()
            started = time.monotonic()
            self._busy[key] = started
            result = "cancelled"
            try:
                outcome = await self._reconcilers[key.kind].reconcile(key)
            except asyncio.CancelledError:
                queue.failed(key)
                raise
            except ClusterError as error:
                result = error.label
                delay = queue.failed(key)
                _log.info("%s: %s; retrying in %.1f s", key, error, delay)
            except Exception:  # noqa: BLE001 - one key's failure must not stop the worker
                result = "error"
                delay = queue.failed(key)
                _log.exception("%s: reconcile failed; retrying in %.1f s", key, delay)
            else:
                result = "ok"
                queue.done(key, outcome.requeue_after, outcome.rest)
            finally:
                del self._busy[key]
                self._context.metrics.reconciles.labels(key.kind, result).inc()
                self._context.metrics.reconcile_seconds.labels(key.kind).observe(time.monotonic() - started)

    async def _background(self, reconciler: Reconciler) -> None:
        failures = 0
        while True:
            try:
                await reconciler.run()
            except Exception:  # noqa: BLE001 - it is restarted
                _log.exception("the background task of %s failed", reconciler.kind)
            failures += 1
            await asyncio.sleep(backoff(failures))

    def _watches_stopped(self) -> None:
        self._context.metrics.watch_restarts.inc()
        # A complete list finds the changes that are missed until the watches run again.
        self._relist.set()

    def _selectors(self) -> dict[str, str]:
        """Return the label selector for each kind; empty if watches of one kind have different ones."""
        found: dict[str, set[str]] = {}
        for watch in self._cached:
            found.setdefault(watch.kind, set()).add(watch.selector)
        return {kind: selectors.copy().pop() if len(selectors) == 1 else "" for kind, selectors in found.items()}


def _among(watch: Watch, namespace: str | None) -> Callable[[Object], bool]:
    """Return a predicate for the objects that a list of the watch covers, in one namespace or, if None, in all."""
    return lambda item: namespace in (None, item["metadata"].get("namespace")) and watch.matches(item)


def _combined(reconcilers: Sequence[Reconciler]) -> list[Watch]:
    """Return watches of every primary kind and of each reconciler's secondary kinds."""
    watches = [Watch(reconciler.kind) for reconciler in reconcilers]
    watches += [watch for reconciler in reconcilers for watch in reconciler.watches]
    return watches
