"""Which pod holds what, from the event streams of the pools' agents."""

from __future__ import annotations

import asyncio
import logging
from http import HTTPStatus
from typing import TYPE_CHECKING

import aiohttp
from yarl import URL

from tunesmith.contracts.agent import (
    SILENCE_SECONDS,
    PodState,
    ResidencyState,
    events_keys,
    pod_tokens,
    serving_keys,
)
from tunesmith.gateway.broadcast import Broadcast
from tunesmith.gateway.routing import choose, rank

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tunesmith.contracts.agent import Keys
    from tunesmith.gateway.catalog import Pod, PoolKey

LOG = logging.getLogger(__name__)

SUSPECT_SECONDS = 1.0
"""A pod that refused a connection is asked last for this long."""
_CONNECT_SECONDS = 2.0
_MIN_RETRY_SECONDS = 0.1
_MAX_RETRY_SECONDS = 2.0
_MAX_LINE_BYTES = 4 * 1024 * 1024


class _Tokens:
    """The tokens of one pod for one purpose: the newest that the pod accepts.

    Gateway and pod read a rotated key at different times, so the pod may accept only one of two tokens.
    """

    def __init__(self, keys: Callable[[], Keys], derive: Callable[[Keys], tuple[str, ...]]) -> None:
        self._keys = keys
        self._derive = derive
        self._derived: tuple[Keys, tuple[str, ...]] = ((), ())
        self._index = 0

    @property
    def current(self) -> str:
        """The token to present."""
        keys = self._keys()
        if keys != self._derived[0]:
            self._derived, self._index = (keys, self._derive(keys)), 0
        return self._derived[1][self._index]

    def refused(self, token: str) -> bool:
        """Record that the pod refused a token; True if another one has not been tried yet."""
        if token != self.current:
            return True
        self._index = (self._index + 1) % len(self._derived[1])
        return self._index != 0


class Backend:
    """A pool's pod: what it holds and how many sequences of this gateway's requests it works on."""

    def __init__(self, pod: Pod, keys: Callable[[], Keys], engine_port: int, agent_port: int) -> None:
        host = f"[{pod.address}]" if ":" in pod.address else pod.address
        self.pod = pod
        self.in_flight = 0
        self.suspect_until = 0.0
        self.heard = float("-inf")
        self.serving = False
        self.resident: frozenset[str] = frozenset()
        place = (pod.pool.key[0], pod.pool.uid)
        self.serving_tokens = _Tokens(keys, lambda given: pod_tokens(serving_keys(given, *place), pod.uid))
        self.events_tokens = _Tokens(keys, lambda given: pod_tokens(events_keys(given, *place), pod.uid))
        self.events_url = URL(f"http://{host}:{agent_port}/v1/events")
        self._engine_url = URL(f"http://{host}:{engine_port}/")

    def url(self, path: str) -> URL:
        """The engine's URL of a path that starts with a slash."""
        return self._engine_url.with_path(path)

    def take(self, state: PodState, now: float) -> bool:
        """Remember what the agent says; True if it changes routing."""
        serving = state.engine_ready and not state.draining and not state.problem
        resident = frozenset(
            adapter.engine_name for adapter in state.adapters if adapter.state is ResidencyState.RESIDENT
        )
        stale = now - self.heard > SILENCE_SECONDS
        changed = stale or (serving, resident) != (self.serving, self.resident)
        self.heard, self.serving, self.resident = now, serving, resident
        return changed

    def usable(self, now: float) -> bool:
        """Whether requests may go there; what was said too long ago does not count."""
        return self.pod.ready and self.serving and now - self.heard <= SILENCE_SECONDS


class Residency:
    """The pods of all pools.

    Args:
        session: makes the requests to agents.
        gateway_keys: return the gateway's keys, which the pods' tokens derive from.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        gateway_keys: Callable[[], Keys],
        *,
        clock: Callable[[], float],
        engine_port: int,
        agent_port: int,
    ) -> None:
        self._session = session
        self._keys = gateway_keys
        self._clock = clock
        self._ports = (engine_port, agent_port)
        self._backends: dict[str, Backend] = {}
        self._streams: dict[str, asyncio.Task[None]] = {}
        self._ranked: dict[tuple[PoolKey, str], tuple[Backend, ...]] = {}
        self.changed = Broadcast()

    def sync(self, pods: Iterable[Pod]) -> None:
        """Follow exactly these pods. A running request on a pod that is gone goes on."""
        wanted = {pod.uid: pod for pod in pods}
        for uid in self._backends.keys() - wanted.keys():
            self._forget(uid)
        for uid, pod in wanted.items():
            backend = self._backends.get(uid)
            if backend is not None and (backend.pod.address, backend.pod.pool) != (pod.address, pod.pool):
                self._forget(uid)
                backend = None
            if backend is None:
                backend = self._backends[uid] = Backend(pod, self._keys, *self._ports)
                self._streams[uid] = asyncio.create_task(self._follow(backend), name=f"events of {pod.name}")
            backend.pod = pod
        self._tell()

    def _forget(self, uid: str) -> None:
        del self._backends[uid]
        self._streams.pop(uid).cancel()

    async def close(self) -> None:
        """End all streams."""
        streams = list(self._streams.values())
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        self._streams.clear()
        self._backends.clear()

    def pick(
        self,
        pool: PoolKey,
        engine_name: str,
        *,
        is_base: bool,
        excluded: frozenset[str] | set[str] = frozenset(),
        weight: int = 1,
    ) -> Backend | None:
        """The pod that takes the next request for an engine name, or None where no usable pod holds it.

        `weight` is the number of sequences of the request.
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
        return trusted[choose([backend.in_flight for backend in trusted], weight)]

    def suspect(self, backend: Backend) -> None:
        """The pod did not take a connection: ask it last for a moment."""
        backend.suspect_until = self._clock() + SUSPECT_SECONDS

    def _holders(self, pool: PoolKey, engine_name: str, *, is_base: bool) -> tuple[Backend, ...]:
        """The pods that hold it, in its own order, fresh or not."""
        ranked = self._ranked.get((pool, engine_name))
        if ranked is None:
            holders = [
                backend
                for backend in self._backends.values()
                if backend.pod.pool.key == pool and (is_base or engine_name in backend.resident)
            ]
            ranked = rank(engine_name, holders, lambda backend: backend.pod.uid)
            if holders:
                self._ranked[pool, engine_name] = ranked
        return ranked

    def _tell(self) -> None:
        self._ranked.clear()
        self.changed.fire()

    async def _follow(self, backend: Backend) -> None:
        """Read the agent's stream for as long as the pod exists."""
        pause, told = _MIN_RETRY_SECONDS, ""
        while True:
            before = backend.heard
            try:
                await self._read(backend)
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
                problem = str(error) or type(error).__name__
                # A pod that starts, or is gone, fails the same way for long: that is told once.
                if backend.heard > before or problem != told:
                    LOG.info("events of pod %s: %s", backend.pod.name, problem)
                told = problem
            if backend.heard > before:
                pause = _MIN_RETRY_SECONDS
            await asyncio.sleep(pause)
            pause = min(_MAX_RETRY_SECONDS, pause * 2)

    async def _read(self, backend: Backend) -> None:
        """Read until the stream ends."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=SILENCE_SECONDS)
        token = backend.events_tokens.current
        headers = {"Authorization": f"Bearer {token}"}
        async with self._session.get(
            backend.events_url, headers=headers, timeout=timeout, allow_redirects=False
        ) as response:
            if response.status == HTTPStatus.UNAUTHORIZED:
                backend.events_tokens.refused(token)
            response.raise_for_status()
            rest = b""
            async for chunk in response.content.iter_any():
                *lines, rest = (rest + chunk).split(b"\n")
                if len(rest) > _MAX_LINE_BYTES:
                    raise ValueError(f"a line has more than {_MAX_LINE_BYTES} bytes")
                # Each line is the whole state: of several only the last counts.
                if lines and backend.take(PodState.model_validate_json(lines[-1]), self._clock()):
                    self._tell()
