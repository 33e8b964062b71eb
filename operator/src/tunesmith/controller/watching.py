"""kopf's watches, in a separate thread, restarted whenever they stop.

On any watch error except 410, kopf stops and cancels every task of its event loop that it does not know. In a separate
loop this affects no other tasks. The gateway and the CLI use `tunesmith.cluster.watch` instead, because kopf runs
handlers in an operator and has no events to iterate over.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from typing import TYPE_CHECKING, Any, cast

import kopf
import uvloop

from tunesmith.cluster.keep import PAGE_SIZE, kept
from tunesmith.cluster.resources import named, resource_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from tunesmith.cluster.client import Cluster
    from tunesmith.cluster.resources import Object

_log = logging.getLogger(__name__)
_MAX_BACKOFF_SECONDS = 30.0


class _Backoffs:
    """Seconds between attempts of one request, with jitter; many attempts, since giving up stops all watches."""

    def __iter__(self) -> Iterator[float]:
        return (min(10.0, 0.5 * 2.0**n) * random.uniform(0.5, 1.0) for n in range(30))  # noqa: S311 - spreads load


class Watcher:
    """Watches of several kinds that call `observe(type, object)` in the loop that started them."""

    def __init__(
        self,
        cluster: Cluster,
        namespaces: Sequence[str],
        selectors: Mapping[str, str],
        observe: Callable[[str | None, Object], None],
        stopped: Callable[[], None],
    ) -> None:
        """Initialise; `start` starts the watches.

        Args:
            cluster: cluster whose address and credentials are used.
            namespaces: namespaces to watch; empty: all.
            selectors: label selector by kind; "" for all objects of the kind.
            observe: called with the event's type (None if the object existed before) and the object.
            stopped: called when the watches have stopped and are about to be restarted.
        """
        self._cluster = cluster
        self._namespaces = namespaces
        self._selectors = selectors
        self._observe = observe
        self._stopped = stopped
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kopf", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def alive(self) -> bool:
        """True if the watches are running."""
        return self._thread.is_alive() and self._ready.is_set()

    @property
    def died(self) -> bool:
        """True if the thread stopped unexpectedly."""
        return self._loop is not None and not self._thread.is_alive() and not self._stop.is_set()

    def start(self) -> None:
        """Start the thread. Must be called in the loop in which `observe` is to be called."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self, seconds: float = 2.0) -> None:
        """Stop the watches and wait for at most `seconds`; the thread terminates with the process."""
        self._stop.set()
        await asyncio.to_thread(self._thread.join, seconds)

    def _run(self) -> None:
        failures = 0
        while not self._stop.is_set():
            started = time.monotonic()
            try:
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    runner.run(
                        kopf.operator(
                            registry=self._registry(),
                            settings=self._settings(),
                            clusterwide=not self._namespaces,
                            namespaces=self._namespaces,
                            # For peering, which is off; kopf's default looks up a user name that the image may lack.
                            identity=cast("Any", "tunesmith-operator"),
                            stop_flag=self._stop,
                            ready_flag=self._ready,
                        )
                    )
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - they are restarted after any error
                _log.warning("the watches stopped: %s: %s", type(error).__name__, error)
            self._ready.clear()
            if self._stop.is_set():
                return
            failures = 0 if time.monotonic() - started > _MAX_BACKOFF_SECONDS else failures + 1
            self._call(self._stopped)
            self._stop.wait(min(_MAX_BACKOFF_SECONDS, 0.5 * 2.0 ** min(failures, 6)))

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:  # noqa: ANN401 - passed through
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def _registry(self) -> kopf.OperatorRegistry:
        registry = kopf.OperatorRegistry()

        async def login(**_: object) -> kopf.ConnectionInfo:
            connection = await self._cluster.connection()
            return kopf.ConnectionInfo(
                server=connection.server,
                ca_path=connection.ca_file,
                certificate_path=connection.certificate_file,
                private_key_path=connection.key_file,
                token=connection.token,
                scheme="Bearer" if connection.token else None,
                insecure=not connection.verify,
            )

        kopf.on.login(registry=registry)(login)
        for kind in self._selectors:
            resource = resource_of(kind)

            async def changed(event: kopf.RawEvent, kind: str = kind, **_: object) -> None:
                raw = cast("Object", event["object"])
                item = kept(named(raw, resource_of(kind)))
                # Free the memory: kopf keeps the last event of each object until its worker has been idle for a while.
                raw.clear()
                raw.update(item)
                self._call(self._observe, event["type"], item)

            decorate = kopf.on.event(resource.group, resource.version, resource.plural, id=kind, registry=registry)
            decorate(changed)
        return registry

    def _settings(self) -> kopf.OperatorSettings:
        settings = kopf.OperatorSettings()
        settings.posting.enabled = False
        settings.peering.standalone = True
        settings.scanning.disabled = True
        settings.queueing.worker_limit = None
        settings.queueing.idle_timeout = 0.1
        settings.watching.chunk_size = PAGE_SIZE
        settings.watching.server_timeout = 600
        settings.networking.request_timeout = 60
        settings.networking.error_backoffs = _Backoffs()
        settings.process.ultimate_exiting_timeout = None
        for kind, selector in self._selectors.items():
            if selector:
                resource = resource_of(kind)
                settings.watching.label_selectors[resource.group, resource.version, resource.plural] = selector
        return settings
