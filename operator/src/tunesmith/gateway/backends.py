"""The pools' pods and the models that each of them holds, from the event streams of their agents."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import TYPE_CHECKING

from yarl import URL

from tunesmith.contracts.addresses import url_host
from tunesmith.contracts.agent import (
    STALE_AFTER_SECONDS,
    ResidencyState,
    events_keys,
    pod_tokens,
    serving_keys,
)
from tunesmith.contracts.podevents import EventReader
from tunesmith.gateway.broadcast import Broadcast
from tunesmith.gateway.routing import PodLoad, choose, rank
from tunesmith.streams import Stream, Tokens, follow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import aiohttp

    from tunesmith.contracts.agent import Keys
    from tunesmith.contracts.podevents import PodChange
    from tunesmith.gateway.catalog import Pod, PoolKey
    from tunesmith.gateway.crashes import CrashTable

LOG = logging.getLogger(__name__)

SUSPECT_SECONDS = 1.0
"""Time for which a pod that refused a connection is tried last."""


class Backend:
    """A pool's pod, the models it holds and the sequences that it is generating for this gateway."""

    def __init__(self, pod: Pod, keys: Callable[[], Keys], engine_port: int, agent_port: int) -> None:
        host = url_host(pod.address)
        self.pod = pod
        self.in_flight = 0
        self._running: Counter[str] = Counter()
        self._reported: set[str] = set()
        self._ended: set[str] = set()
        self._slots: int | None = None
        self._waiting_adapters = 0
        self.suspect_until = 0.0
        self.last_report_at = float("-inf")
        self.serving = False
        self.resident: set[str] = set()
        pool = (pod.pool.key[0], pod.pool.uid)
        self.serving_tokens = Tokens(keys, lambda current: pod_tokens(serving_keys(current, *pool), pod.uid))
        events_tokens = Tokens(keys, lambda current: pod_tokens(events_keys(current, *pool), pod.uid))
        self.events = Stream(f"pod {pod.name}", f"http://{host}:{agent_port}/v1/events", events_tokens)
        self._engine_url = URL(f"http://{host}:{engine_port}/")

    def add_running(self, engine_name: str, count: int) -> None:
        """Change the number of sequences that the pod is generating for this gateway."""
        self.in_flight += count
        self._running[engine_name] += count
        if not self._running[engine_name]:
            del self._running[engine_name]
            # The next report may be older.
            self._ended.add(engine_name)
            self._reported.discard(engine_name)

    def load(self, engine_name: str, *, needs_slot: bool) -> PodLoad:
        """Return the load for the choice of a pod. An adapter is active if this or another gateway uses it."""
        if not needs_slot or self._slots is None:
            return PodLoad(self.in_flight, uid=self.pod.uid)
        active = self._running.keys() | self._reported
        is_active = engine_name in active
        count = len(active) + (not is_active)
        return PodLoad(
            self.in_flight, count - self._slots, active=is_active, roomy=2 * count <= self._slots, uid=self.pod.uid
        )

    def url(self, path: str) -> URL:
        """Return the engine's URL for a path that starts with a slash."""
        return self._engine_url.with_path(path)

    def apply(self, reader: EventReader, change: PodChange, now: float) -> frozenset[str] | None:
        """Apply a line of the pod's stream.

        Returns:
            The engine names that were added to or removed from the pod; None if nothing changes for routing.
        """
        header = reader.header
        serving = header.engine_ready and not (header.draining or header.problem or header.stalled)
        changed = now - self.last_report_at > STALE_AFTER_SECONDS or serving != self.serving
        self.last_report_at, self.serving = now, serving
        if change.header:
            self._waiting_adapters = header.use.waiting
            self._slots, self._reported = header.use.slots, set(header.use.active) - self._ended
            self._ended.clear()
        moved = set()
        for name in change.names:
            residency = reader.residency(name)
            holds = residency is not None and residency.state is ResidencyState.RESIDENT
            if holds != (name in self.resident):
                moved.add(name)
        self.resident ^= moved
        return frozenset(moved) if moved or changed else None

    def remove_unlisted(self, reader: EventReader) -> frozenset[str]:
        """Remove and return the engine names that a new connection's snapshot does not list."""
        gone = frozenset(name for name in self.resident if reader.residency(name) is None)
        self.resident -= gone
        return gone

    def usable(self, now: float) -> bool:
        """Return True if the pod can receive requests; reports that are too old do not count."""
        return self.pod.ready and self.serving and now - self.last_report_at <= STALE_AFTER_SECONDS

    def is_crowded(self, now: float) -> bool:
        """Return True if requests wait for an adapter slot of the pod, or if it receives no requests."""
        return self._waiting_adapters > 0 or not self.usable(now)


class BackendTable:
    """The pods of all pools.

    Args:
        session: makes the requests to agents.
        gateway_keys: returns the gateway's keys, from which the pods' tokens are derived.
        crashes: gets the crashes that the agents report.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        gateway_keys: Callable[[], Keys],
        crashes: CrashTable,
        *,
        clock: Callable[[], float],
        engine_port: int,
        agent_port: int,
    ) -> None:
        self._session = session
        self._keys = gateway_keys
        self._crashes = crashes
        self._clock = clock
        self._ports = (engine_port, agent_port)
        self._by_uid: dict[str, Backend] = {}
        self._streams: dict[str, asyncio.Task[None]] = {}
        self._by_pool: dict[PoolKey, dict[str, Backend]] = {}
        self._ranked: dict[tuple[PoolKey, str], tuple[Backend, ...]] = {}
        self.changed = Broadcast()

    def sync(self, pods: Iterable[Pod]) -> None:
        """Follow exactly these pods. Running requests on a removed pod continue."""
        listed = {pod.uid: pod for pod in pods}
        changed = False
        for uid in self._by_uid.keys() - listed.keys():
            self._forget(uid)
            changed = True
        for uid, pod in listed.items():
            backend = self._by_uid.get(uid)
            if backend is not None and (backend.pod.address, backend.pod.pool) != (pod.address, pod.pool):
                self._forget(uid)
                backend = None
            if backend is None:
                backend = self._by_uid[uid] = Backend(pod, self._keys, *self._ports)
                self._by_pool.setdefault(pod.pool.key, {})[uid] = backend
                self._streams[uid] = asyncio.create_task(self._follow(backend), name=f"events of {pod.name}")
                self._forget_ranks(pod.pool.key)
                changed = True
            changed = changed or backend.pod != pod
            backend.pod = pod
        if changed:
            self.changed.notify()

    def _forget(self, uid: str) -> None:
        pool = self._by_uid.pop(uid).pod.pool.key
        self._streams.pop(uid).cancel()
        del self._by_pool[pool][uid]
        if not self._by_pool[pool]:
            del self._by_pool[pool]
        self._forget_ranks(pool)

    def _forget_ranks(self, pool: PoolKey) -> None:
        for key in [key for key in self._ranked if key[0] == pool]:
            del self._ranked[key]

    async def close(self) -> None:
        """Close all streams."""
        streams = list(self._streams.values())
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        self._streams.clear()
        self._by_uid.clear()
        self._by_pool.clear()
        self._ranked.clear()

    def pick(
        self,
        pool: PoolKey,
        engine_name: str,
        *,
        is_base: bool,
        needs_slot: bool = True,
        excluded: frozenset[str] | set[str] = frozenset(),
        weight: int = 1,
        conversation: bytes = b"",
    ) -> Backend | None:
        """Return the pod for the next request for an engine name, or None if no usable pod holds it.

        `weight` is the number of sequences of the request. `needs_slot` is False for a model other than the
        base that computes without an adapter slot. `conversation` is the request's `affinity.conversation`.
        """
        now = self._clock()
        usable = [
            backend
            for backend in self._holders(pool, engine_name, is_base=is_base)
            if backend.usable(now) and backend.pod.uid not in excluded
        ]
        trusted = [backend for backend in usable if backend.suspect_until <= now] or usable
        if not trusted:
            return None
        with_slot = needs_slot and not is_base
        loads = [backend.load(engine_name, needs_slot=with_slot) for backend in trusted]
        return trusted[choose(loads, weight, conversation)]

    def in_pool(self, pool: PoolKey) -> Iterable[Backend]:
        """Return the pods of a pool, usable or not."""
        return self._by_pool.get(pool, {}).values()

    def has_pods(self, pool: PoolKey) -> bool:
        """Return True if the pool has pods, usable or not."""
        return pool in self._by_pool

    def has_ready_pods(self, pool: PoolKey) -> bool:
        """Return True if the pool has a pod that is ready in Kubernetes."""
        return any(backend.pod.ready for backend in self._by_pool.get(pool, {}).values())

    def suspect(self, backend: Backend) -> None:
        """Record that the pod did not accept a connection: it is tried last for `SUSPECT_SECONDS`."""
        backend.suspect_until = self._clock() + SUSPECT_SECONDS

    def _holders(self, pool: PoolKey, engine_name: str, *, is_base: bool) -> tuple[Backend, ...]:
        """Return the pods that hold an engine name, in its rendezvous order, usable or not."""
        ranked = self._ranked.get((pool, engine_name))
        if ranked is None:
            holders = [
                backend
                for backend in self._by_pool.get(pool, {}).values()
                if is_base or engine_name in backend.resident
            ]
            ranked = rank(engine_name, holders, lambda backend: backend.pod.uid)
            if holders:
                self._ranked[pool, engine_name] = ranked
        return ranked

    async def _follow(self, backend: Backend) -> None:
        """Read the agent's stream for as long as the pod exists."""

        def opened() -> Callable[[bytes], None]:
            reader = EventReader()

            def process(line: bytes) -> None:
                change = reader.read(line)
                for crash in change.crashes:
                    self._crashes.record(backend.pod.pool.uid, crash)
                gone = backend.remove_unlisted(reader) if change.snapshot else frozenset()
                moved = backend.apply(reader, change, self._clock())
                if moved is not None or gone:
                    for name in gone | (moved or frozenset()):
                        self._ranked.pop((backend.pod.pool.key, name), None)
                    self.changed.notify()

            return process

        await follow(self._session, backend.events, opened)
