"""Agents of pool pods, while this process leads: their event streams, and the lists of adapters sent to them.

An agent's report expires when the agent falls silent. Tokens are used only in one header.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import TYPE_CHECKING

import aiohttp

from tunesmith.cluster.watch import backoff
from tunesmith.contracts.addresses import url_host
from tunesmith.contracts.agent import (
    AGENT_PORT,
    EVENTS_WITH_TRAFFIC,
    STALE_AFTER_SECONDS,
    DesiredAdapter,
    DesiredAdapters,
    PodState,
    list_digest,
)
from tunesmith.contracts.podevents import EventReader
from tunesmith.streams import Stream, Tokens, follow

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tunesmith.controller.context import Context

_PUSH = aiohttp.ClientTimeout(total=5.0)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class Target:
    """Address of a pod and the tokens that it may accept. Without a repr, since tokens are secret."""

    name: str
    address: str
    stream_tokens: Tokens = field(compare=False)
    control_tokens: Tokens | None = field(default=None, compare=False)

    def url(self, port: int, path: str) -> str:
        """Return a URL of the target."""
        return f"http://{url_host(self.address)}:{port}{path}"

    def stream(self, port: int, path: str) -> Stream:
        """Return a stream of the target."""
        return Stream(self.name, self.url(port, path), self.stream_tokens)


@dataclass(frozen=True)
class _Sent:
    """A list that an agent accepted. `confirmed`: True if the agent has reported it since."""

    adapters: tuple[DesiredAdapter, ...]
    number: tuple[int, int]
    digest: str
    at: float
    confirmed: bool = False

    def is_reported_by(self, state: PodState) -> bool:
        """Return True if the agent reports exactly this list."""
        return (state.epoch, state.sequence, state.list_digest) == (*self.number, self.digest)


class AgentLink:
    """One pod's agent: its latest state, and the list that it should have."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.state: PodState | None = None
        self.last_report_at = float("-inf")
        self.since = time.monotonic()
        self.error = ""
        """Error of the latest connection to the agent; empty after a line."""
        self.wake = asyncio.Event()
        self.desired: tuple[DesiredAdapter, ...] | None = None
        self._sent: _Sent | None = None

    def is_reporting(self, now: float) -> bool:
        """Return True if the latest line is recent."""
        return now - self.last_report_at <= STALE_AFTER_SECONDS

    def record_state(self, state: PodState, now: float) -> bool:
        """Store the state after a line; return True if it affects the placement of adapters or the crashes."""
        affects_placement = (
            not self.is_reporting(now) or self.state is None or _placement(state) != _placement(self.state)
        )
        self.state, self.last_report_at, self.error = state, now, ""
        if self._sent is not None and self._sent.is_reported_by(state):
            self._sent = _confirmed(self._sent)
        if self.needs_push:
            self.wake.set()
        return affects_placement

    def set_desired(self, desired: tuple[DesiredAdapter, ...]) -> None:
        """Set the complete list that the pod should have."""
        if desired != self.desired:
            self.desired = desired
            self.wake.set()

    def record_sent(self, adapters: tuple[DesiredAdapter, ...], number: tuple[int, int], now: float) -> None:
        """Record that the agent accepted a list under a number."""
        self._sent = _Sent(adapters, number, list_digest(adapters), now)

    def number(self, epoch: int, sequence: int) -> tuple[int, int]:
        """Return the number of the next list: the given one, in a higher epoch if the agent reports a higher number.

        The leader's list must win even if the Lease was deleted, a clock was set back, or another client sent a list.
        Each agent is outbid separately, so that one that reports nonsense cannot make the numbers of others
        implausible.
        """
        if self.state is not None and (self.state.epoch, self.state.sequence) >= (epoch, sequence):
            return self.state.epoch + 1, sequence
        return epoch, sequence

    @property
    def needs_push(self) -> bool:
        """True if the agent has not accepted the list, or reports a different one."""
        if self.desired is None:
            return False
        if self._sent is None or self._sent.adapters != self.desired:
            return True
        # Until the agent has reported the list once, lines that were already in flight may contain the previous one.
        settled = self._sent.confirmed or self.last_report_at > self._sent.at + STALE_AFTER_SECONDS
        return settled and self.state is not None and not self._sent.is_reported_by(self.state)


def _confirmed(sent: _Sent) -> _Sent:
    return sent if sent.confirmed else replace(sent, confirmed=True)


def _placement(state: PodState) -> tuple[object, ...]:
    return (
        state.engine_ready,
        state.engine_crashes,
        state.draining,
        state.problem,
        state.base_model_fingerprint,
        state.adapters,
    )


class AgentLinks:
    """The agents of all pools' pods."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._links: dict[str, dict[str, AgentLink]] = {}
        self._changed: dict[str, Callable[[], None]] = {}
        self._links_changed = asyncio.Event()
        self._sequence = 0

    def of(self, pool: str) -> Mapping[str, AgentLink]:
        """Return the links of a pool, by pod UID."""
        return self._links.get(pool, {})

    def sync(self, pool: str, targets: Mapping[str, Target], changed: Callable[[], None]) -> None:
        """Follow exactly these pods of a pool; without targets, the pool is forgotten.

        Args:
            pool: the pool's UID.
            targets: targets by pod UID.
            changed: called when the state of one of them changes.
        """
        old = self._links.get(pool, {})
        links = {
            uid: old[uid] if uid in old and old[uid].target == target else AgentLink(target)
            for uid, target in targets.items()
        }
        if links.keys() != old.keys() or any(links[uid] is not old[uid] for uid in links):
            self._links_changed.set()
        self._links[pool], self._changed[pool] = links, changed
        if not links:
            del self._links[pool], self._changed[pool]

    async def run(self) -> None:
        """Read all streams and send the agents their lists. Runs until cancelled; earlier state is discarded.

        Raises:
            Exception: a permanent task stopped; the caller restarts all of them.
        """
        self._links.clear()
        self._changed.clear()
        tasks: dict[AgentLink, asyncio.Task[None]] = {}
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
        async with aiohttp.ClientSession(connector=connector, trust_env=False) as session:
            try:
                while True:
                    self._links_changed.clear()
                    current = {link: pool for pool, links in self._links.items() for link in links.values()}
                    for link in tasks.keys() - current.keys():
                        tasks.pop(link).cancel()
                    for link in current.keys() - tasks.keys():
                        tasks[link] = asyncio.create_task(self._serve(session, link, current[link]))
                        tasks[link].add_done_callback(lambda _: self._links_changed.set())
                    await self._links_changed.wait()
                    for task in tasks.values():
                        if task.done():
                            task.result()
            finally:
                for task in tasks.values():
                    task.cancel()
                await asyncio.gather(*tasks.values(), return_exceptions=True)

    async def _serve(self, session: aiohttp.ClientSession, link: AgentLink, pool: str) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._listen(session, link, pool))
            tasks.create_task(self._push(session, link))

    async def _listen(self, session: aiohttp.ClientSession, link: AgentLink, pool: str) -> None:
        def opened() -> Callable[[bytes], None]:
            reader = EventReader()

            def read(line: bytes) -> None:
                reader.read(line)
                if link.record_state(reader.state, time.monotonic()) and pool in self._changed:
                    self._changed[pool]()

            return read

        def failed(error: str) -> None:
            link.error = error

        await follow(session, link.target.stream(AGENT_PORT, EVENTS_WITH_TRAFFIC), opened, failed)

    async def _push(self, session: aiohttp.ClientSession, link: AgentLink) -> None:
        failures = 0
        while True:
            await link.wake.wait()
            link.wake.clear()
            if not link.is_reporting(time.monotonic()) or not self._context.may_write():
                continue  # the next line wakes this task again
            if not link.needs_push or link.desired is None:
                continue
            desired, number = link.desired, link.number(self._context.epoch, self._next_sequence())
            try:
                problem = await _put(session, link.target, number, desired)
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                problem = type(error).__name__
            except Exception as error:  # noqa: BLE001 - it must not stop the reading of streams
                _log.exception("the adapters of %s cannot be sent", link.target.name)
                problem = type(error).__name__
            if problem is None:
                failures = 0
                link.record_sent(desired, number, time.monotonic())
                continue
            # 409: another replica leads by now, or the agent has a higher number, which its next line reports.
            failures += 1
            _log.warning("the agent of %s did not accept its adapters: %s", link.target.name, problem)
            await asyncio.sleep(min(2.0, backoff(failures)))
            link.wake.set()

    def _next_sequence(self) -> int:
        # Increases across restarts too: without leader election two processes may start in the same second.
        self._sequence = max(self._sequence + 1, int(time.time() * 1000))
        return self._sequence


async def _put(
    session: aiohttp.ClientSession, target: Target, number: tuple[int, int], desired: tuple[DesiredAdapter, ...]
) -> str | None:
    """Send an agent its list; return the reason why it was not accepted, or None.

    After a refused token the next one is used.
    """
    body = DesiredAdapters(epoch=number[0], sequence=number[1], adapters=list(desired)).model_dump_json(by_alias=True)
    if target.control_tokens is None:
        raise ValueError(f"{target.name} has no control tokens")
    while True:
        token = target.control_tokens.current
        async with session.put(
            target.url(AGENT_PORT, "/v1/adapters"),
            headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
            data=body,
            timeout=_PUSH,
            allow_redirects=False,
        ) as response:
            if response.status == HTTPStatus.OK:
                return None
            if response.status != HTTPStatus.UNAUTHORIZED or not target.control_tokens.refused(token):
                return f"it returned status {response.status}"
