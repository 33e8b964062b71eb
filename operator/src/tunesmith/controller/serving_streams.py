"""Streams that the leader reads while it leads: what pool pods hold, and what gateways have to do.

A pod is not trusted: no redirects, bounded lines, a strict schema. Silence makes what was said unknown. Tokens go into
one header and nowhere else.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import aiohttp
from pydantic import ValidationError

from tunesmith.cluster.watch import backoff
from tunesmith.contracts.agent import (
    AGENT_PORT,
    GATEWAY_INTERNAL_PORT,
    SILENCE_SECONDS,
    DesiredAdapter,
    DesiredAdapters,
    GatewayDemand,
    PodState,
    demand_tokens,
    gateway_keys,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from tunesmith.autoscale.demand import DemandBoard
    from tunesmith.cluster.resources import Object
    from tunesmith.controller.context import Context

_MAX_LINE_BYTES = 4 * 1024 * 1024
_STREAM = aiohttp.ClientTimeout(total=None, sock_connect=2.0, sock_read=SILENCE_SECONDS)
_PUSH = aiohttp.ClientTimeout(total=5.0)
_OK, _UNAUTHORIZED = 200, 401
_GATEWAYS = "app.kubernetes.io/component=gateway"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class Target:
    """Address of a pod and the tokens that it may accept, newest first. Not printable: tokens are secret."""

    name: str
    address: str
    stream_tokens: tuple[str, ...] = field(compare=False)
    control_tokens: tuple[str, ...] = field(default=(), compare=False)

    def url(self, port: int, path: str) -> str:
        """An address at the target."""
        return f"http://{self.authority(port)}{path}"

    def authority(self, port: int) -> str:
        """Address and port, as in a URL."""
        return f"[{self.address}]:{port}" if ":" in self.address else f"{self.address}:{port}"


class AgentLink:
    """One pod's agent: its last line, and the list that it should have."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.state: PodState | None = None
        self.heard_at = float("-inf")
        self.since = time.monotonic()
        self.error = ""
        """Why the last connection to the agent failed; empty after a line."""
        self.wake = asyncio.Event()
        self.desired: tuple[DesiredAdapter, ...] | None = None
        self._told: tuple[DesiredAdapter, ...] | None = None
        self._told_number = (0, 0)
        self._told_at = float("-inf")

    def heard(self, now: float) -> bool:
        """Whether the last line is recent."""
        return now - self.heard_at <= SILENCE_SECONDS

    def take(self, state: PodState, now: float) -> bool:
        """Keep a line; True when it says something new."""
        new = not self.heard(now) or self.state is None or _without_load(state) != _without_load(self.state)
        self.state, self.heard_at, self.error = state, now, ""
        if self.behind:
            self.wake.set()
        return new

    def tell(self, desired: tuple[DesiredAdapter, ...]) -> None:
        """Set the whole list that the pod should have."""
        if desired != self.desired:
            self.desired = desired
            self.wake.set()

    def told(self, desired: tuple[DesiredAdapter, ...], number: tuple[int, int], now: float) -> None:
        """The agent answered that it has the list."""
        self._told, self._told_number, self._told_at = desired, number, now

    @property
    def behind(self) -> bool:
        """Whether the agent has not taken the list, or has forgotten it."""
        if self.desired is None:
            return False
        # Lines that were under way when it was told still carry the old number.
        settled = self.heard_at > self._told_at + SILENCE_SECONDS
        forgot = settled and self.state is not None and (self.state.epoch, self.state.sequence) < self._told_number
        return self.desired != self._told or forgot


def _without_load(state: PodState) -> PodState:
    return state.model_copy(update={"in_flight": {}, "epoch": 0, "sequence": 0})


class AgentLinks:
    """The agents of all pools' pods."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._links: dict[str, dict[str, AgentLink]] = {}
        self._changed: dict[str, Callable[[], None]] = {}
        self._dirty = asyncio.Event()
        self._sequence = 0

    def of(self, pool: str) -> Mapping[str, AgentLink]:
        """The links of a pool, by pod UID."""
        return self._links.get(pool, {})

    def sync(self, pool: str, targets: Mapping[str, Target], changed: Callable[[], None]) -> None:
        """Follow exactly these pods of a pool; none forgets the pool.

        Args:
            pool: the pool's UID.
            targets: by pod UID.
            changed: called when what one of them says changes.
        """
        old = self._links.get(pool, {})
        links = {
            uid: old[uid] if uid in old and old[uid].target == target else AgentLink(target)
            for uid, target in targets.items()
        }
        for uid, target in targets.items():
            links[uid].target = target  # with its current tokens
        if links.keys() != old.keys() or any(links[uid] is not old[uid] for uid in links):
            self._dirty.set()
        self._links[pool], self._changed[pool] = links, changed
        if not links:
            del self._links[pool], self._changed[pool]

    async def run(self) -> None:
        """Read all streams and tell the agents their lists. Runs without end; what was known before is forgotten."""
        self._links.clear()
        self._changed.clear()
        tasks: dict[AgentLink, asyncio.Task[None]] = {}
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
        async with aiohttp.ClientSession(connector=connector, trust_env=False) as session:
            try:
                while True:
                    self._dirty.clear()
                    wanted = {link: pool for pool, links in self._links.items() for link in links.values()}
                    for link in tasks.keys() - wanted.keys():
                        tasks.pop(link).cancel()
                    for link in wanted.keys() - tasks.keys():
                        tasks[link] = asyncio.create_task(self._serve(session, link, wanted[link]))
                    await self._dirty.wait()
            finally:
                for task in tasks.values():
                    task.cancel()
                await asyncio.gather(*tasks.values(), return_exceptions=True)

    async def _serve(self, session: aiohttp.ClientSession, link: AgentLink, pool: str) -> None:
        await asyncio.gather(self._listen(session, link, pool), self._push(session, link))

    async def _listen(self, session: aiohttp.ClientSession, link: AgentLink, pool: str) -> None:
        def take(line: bytes) -> None:
            if link.take(PodState.model_validate_json(line), time.monotonic()) and pool in self._changed:
                self._changed[pool]()

        def failed(error: str) -> None:
            link.error = error

        await _follow(session, lambda: link.target, AGENT_PORT, "/v1/events", take, failed)

    async def _push(self, session: aiohttp.ClientSession, link: AgentLink) -> None:
        failures = 0
        while True:
            await link.wake.wait()
            link.wake.clear()
            if not link.heard(time.monotonic()) or not self._context.may_write():
                continue  # the next line wakes again
            if not link.behind or link.desired is None:
                continue
            desired, number = link.desired, (self._context.epoch, self._next())
            body = DesiredAdapters(epoch=number[0], sequence=number[1], adapters=list(desired))
            try:
                status = await _put(session, link.target, body)
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                failures += 1
                _log.info("the agent of %s was not told its adapters: %s", link.target.name, _text(error))
                await asyncio.sleep(min(2.0, backoff(failures)))
                link.wake.set()
                continue
            if status == _OK:
                failures = 0
                link.told(desired, number, time.monotonic())
            else:
                # 409: another replica leads by now, or the agent's clock of lists is ahead; the next number may do.
                failures += 1
                _log.warning("the agent of %s answered %d to its adapters", link.target.name, status)
                await asyncio.sleep(min(2.0, backoff(failures)))
                link.wake.set()

    def _next(self) -> int:
        # Rises across restarts too: without leader election the epoch is always the same.
        self._sequence = max(self._sequence + 1, int(time.time() * 1000))
        return self._sequence


class GatewayLinks:
    """The gateways' demand streams: they fill the board."""

    def __init__(self, context: Context, board: DemandBoard) -> None:
        self._context = context
        self._board = board

    async def run(self) -> None:
        """Follow every gateway pod of the operator's namespace. Runs without end.

        Raises:
            ClusterError: the pods cannot be listed.
        """
        tasks: dict[str, asyncio.Task[None]] = {}
        targets: dict[str, Target] = {}
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, trust_env=False) as session:
            try:
                async for event in self._context.cluster.watch(
                    "Pod", self._context.settings.namespace, labels=_GATEWAYS
                ):
                    if event.type != "SYNCED":
                        uid = event.object["metadata"]["uid"]
                        target = None if event.type == "DELETED" else _gateway(event.object)
                        if target == targets.get(uid):
                            continue
                        if uid in tasks:
                            tasks.pop(uid).cancel()
                        targets.pop(uid, None)
                        if target is not None:
                            targets[uid] = target
                            tasks[uid] = asyncio.create_task(self._listen(session, uid, target))
                    self._board.expect({uid: target.name for uid, target in targets.items()}, time.monotonic())
            finally:
                for task in tasks.values():
                    task.cancel()
                await asyncio.gather(*tasks.values(), return_exceptions=True)

    async def _listen(self, session: aiohttp.ClientSession, uid: str, target: Target) -> None:
        def take(line: bytes) -> None:
            self._board.record(uid, GatewayDemand.model_validate_json(line), time.monotonic())

        def current() -> Target:
            tokens = demand_tokens(gateway_keys(self._context.installation_keys))
            return replace(target, stream_tokens=tokens)

        def failed(error: str) -> None:
            self._board.fail(uid, error)

        await _follow(session, current, GATEWAY_INTERNAL_PORT, "/v1/demand", take, failed)


def _gateway(pod: Object) -> Target | None:
    """A gateway that runs. One that is stopping counts too: it still has requests."""
    status = pod.get("status") or {}
    address = status.get("podIP")
    if status.get("phase") != "Running" or not address:
        return None
    return Target(f"gateway {pod['metadata']['name']}", address, stream_tokens=())


async def _follow(
    session: aiohttp.ClientSession,
    current: Callable[[], Target],
    port: int,
    path: str,
    take: Callable[[bytes], None],
    failed: Callable[[str], None],
) -> None:
    """Read a stream of lines repeatedly, for as long as the pod is a target; nothing that it sends ends this.

    Args:
        session: makes the requests.
        current: return the target with its current tokens.
        port: of the target.
        path: of the stream.
        take: called with each line; raises for a line that is not valid.
        failed: called with the reason after each connection that failed or broke.
    """
    failures = 0
    while True:
        target = current()
        token = target.stream_tokens[failures % len(target.stream_tokens)]
        try:
            async for line in _lines(session, target.url(port, path), token):
                failures = 0
                take(line)
            failed("the stream ended")
        except Exception as error:  # noqa: BLE001 - a pod's line must not end what reads it
            failed(_text(error))
            if failures == 0:
                _log.info("the stream of %s broke: %s", target.name, _text(error))
        failures += 1
        await asyncio.sleep(min(2.0, backoff(failures)))


async def _lines(session: aiohttp.ClientSession, url: str, token: str) -> AsyncIterator[bytes]:
    """The newest of the lines that came together: each says everything."""
    async with session.get(url, headers=_bearer(token), timeout=_STREAM, allow_redirects=False) as response:
        if response.status != _OK:
            raise ValueError(f"{url} answered {response.status}")
        rest = b""
        async for chunk in response.content.iter_any():
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > _MAX_LINE_BYTES:
                raise ValueError(f"a line has more than {_MAX_LINE_BYTES} bytes")
            if lines and lines[-1]:
                yield lines[-1]


async def _put(session: aiohttp.ClientSession, target: Target, body: DesiredAdapters) -> int:
    """Send an agent its list; the status of the answer. A token that is not accepted (yet) is followed by the next."""
    status = _UNAUTHORIZED
    for token in target.control_tokens:
        async with session.put(
            target.url(AGENT_PORT, "/v1/adapters"),
            headers={**_bearer(token), "Content-Type": "application/json"},
            data=body.model_dump_json(by_alias=True),
            timeout=_PUSH,
            allow_redirects=False,
        ) as response:
            status = response.status
        if status != _UNAUTHORIZED:
            break
    return status


def _bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def _text(error: Exception) -> str:
    """The cause in a few words. What a pod sent is not repeated, as pydantic does."""
    if isinstance(error, ValidationError):
        return "it sends lines that are not valid"
    if isinstance(error, aiohttp.ServerTimeoutError | TimeoutError):
        return "connection timed out"
    if isinstance(error, aiohttp.ClientConnectorError):
        return (error.os_error.strerror or str(error.os_error)).lower()
    if isinstance(error, aiohttp.ClientError | OSError | ValueError):
        return str(error) or type(error).__name__
    return type(error).__name__
