"""Use of limits by all gateways, counted in Redis.

One task sends everything over one connection, in batches: a request waits for one round trip at most two batches away.
While Redis is down, or slower than the timeout, nothing waits for it: `admit` returns None at once, and each gateway
applies its share. What the gateway counted meanwhile is added when Redis returns; if Redis lost its data, everything
that this gateway still counts is added.

The scripts compute the names of the gateways' keys, so a Redis Cluster does not work; a primary with replicas does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections import Counter, deque
from typing import TYPE_CHECKING, Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from tunesmith.gateway.broadcast import wait_for_event
from tunesmith.gateway.windows import Decision, Measure, WindowState

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from redis.commands.core import AsyncScript

    from tunesmith.gateway.windows import Charge, LocalCounters

LOG = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
"""Pause before a Redis that is down is tried again."""
_HEARTBEAT_SECONDS = 2.0
_ALIVE_SECONDS = 10
"""Time after which the running sequences of a gateway that no longer reports do not count."""
_BATCH = 256
_SCHEMES = ("redis://", "rediss://")
_PREFIX = "tunesmith:"
_MARKER = f"{_PREFIX}data"
_MAX_MARKER = 64

# ARGV: the gateway's id; for each key: length of the window in ms (0: running sequences), 1 if it slides, limit, cost.
_ADMIT = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local refused, result, windows = 0, {0, now}, {}
for i, key in ipairs(KEYS) do
  local period, slides = tonumber(ARGV[4 * i - 2]), ARGV[4 * i - 1] == '1'
  local limit, cost = tonumber(ARGV[4 * i]), tonumber(ARGV[4 * i + 1])
  local start, previous, current, used = now, 0, 0, 0
  if period == 0 then
    local fields = redis.call('HGETALL', key)
    for field = 1, #fields, 2 do
      if redis.call('EXISTS', 'tunesmith:gateway:' .. fields[field]) == 1 then
        current = current + fields[field + 1]
      else
        redis.call('HDEL', key, fields[field])
      end
    end
    used = current
  else
    local stored = redis.call('HMGET', key, 'start', 'previous', 'current')
    if stored[1] then
      start, previous, current = tonumber(stored[1]), tonumber(stored[2]), tonumber(stored[3])
    end
    if now - start >= 2 * period then
      start, previous, current = now, 0, 0
    elseif now - start >= period then
      start, previous, current = start + period, current, 0
    end
    used = current
    if slides then
      used = used + math.floor(previous * math.max(0, 1 - (now - start) / period))
    end
  end
  if refused == 0 and used + cost > limit then
    refused = i
  end
  windows[i] = {period, start, previous, current, cost}
end
for i, key in ipairs(KEYS) do
  local period, start, previous, current, cost = unpack(windows[i])
  if refused == 0 then
    current = current + cost
    if period == 0 then
      redis.call('HINCRBY', key, ARGV[1], cost)
      redis.call('PEXPIRE', key, 86400000)
    else
      redis.call('HSET', key, 'start', start, 'previous', previous, 'current', current)
      redis.call('PEXPIRE', key, 2 * period)
    end
  end
  table.insert(result, start)
  table.insert(result, previous)
  table.insert(result, current)
end
result[1] = refused
return result
"""

# ARGV: the gateway's id; for each key: length of the window in ms, start of the window in ms, change.
_SETTLE = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
for i, key in ipairs(KEYS) do
  local period, at, change = tonumber(ARGV[3 * i - 1]), tonumber(ARGV[3 * i]), tonumber(ARGV[3 * i + 1])
  if period == 0 then
    if redis.call('HINCRBY', key, ARGV[1], change) <= 0 then
      redis.call('HDEL', key, ARGV[1])
    end
    redis.call('PEXPIRE', key, 86400000)
  elseif now - at < 2 * period then
    local stored = redis.call('HMGET', key, 'start', 'previous', 'current')
    local start, previous, current = at, 0, 0
    if stored[1] then
      start, previous, current = tonumber(stored[1]), tonumber(stored[2]), tonumber(stored[3])
    end
    if now - start >= period then
      start, previous, current = start + period, current, 0
    end
    if at + period <= start then
      previous = math.max(0, previous + change)
    else
      current = math.max(0, current + change)
    end
    redis.call('HSET', key, 'start', start, 'previous', previous, 'current', current)
    redis.call('PEXPIRE', key, 2 * period)
  end
end
return 1
"""

_Entry = tuple["Measure", str, float]
"""Measure, owner and start of the window."""


class _LostRegistrationError(Exception):
    """Redis no longer knows this gateway, whose sequences therefore do not count."""


class SharedCounters:
    """Use of limits by all gateways.

    Args:
        url: returns the URL, `redis://[user:password@]host:port[/db]` or `rediss://…` with TLS, at each connection.
        ca_file: certificates of the authorities that Redis' certificate must be from; None: the system's.
        timeout: seconds after which a batch is given up and Redis counts as down.
        local: the gateway's own counts.
        report: called with True when Redis becomes usable and False when it no longer is.
    """

    def __init__(
        self,
        url: Callable[[], str],
        ca_file: Path | None,
        timeout: float,
        local: LocalCounters,
        report: Callable[[bool], None],
    ) -> None:
        self._url = url
        self._ca_file = ca_file
        self._timeout = timeout
        self._local = local
        self._report = report
        self._usable = False
        self._logged: bool | None = None
        self._marker = ""
        self._gateway = ""
        self._waiting: deque[tuple[Sequence[Charge], asyncio.Future[Decision | None]]] = deque()
        self._changes: Counter[_Entry] = Counter()
        self._wake = asyncio.Event()
        self._admit: AsyncScript
        self._settle: AsyncScript

    async def admit(self, charges: Sequence[Charge]) -> Decision | None:
        """Count the charges if all of them fit; None: Redis is down."""
        if not self._usable:
            return None
        future: asyncio.Future[Decision | None] = asyncio.get_running_loop().create_future()
        self._waiting.append((charges, future))
        self._wake.set()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self._give_back(charges, future.result())
            raise

    def change(self, charge: Charge, start: float, change: int) -> None:
        """Change the use that a charge added to the window that started at `start`; it is sent soon."""
        if not charge.measure.seconds:
            if self._usable:
                self._changes[charge.measure, charge.owner, 0.0] += change
                self._wake.set()
            return  # all running sequences are sent when Redis returns
        self._changes[charge.measure, charge.owner, start] += change
        self._wake.set()

    async def run(self) -> None:
        """Exchange batches with Redis until cancelled, and connect again when that fails."""
        while True:
            try:
                await self._exchange()
            except (RedisError, OSError, ValueError, _LostRegistrationError) as error:
                self._down(str(error) or f"no answer within {self._timeout:g} s")
            await asyncio.sleep(RETRY_SECONDS)

    async def _exchange(self) -> None:
        url = self._url()
        if not url.startswith(_SCHEMES):
            raise ValueError(f"its URL does not start with {' or '.join(_SCHEMES)}")
        tls: dict[str, Any] = {"ssl_ca_certs": str(self._ca_file)} if self._ca_file and url.startswith("rediss") else {}
        client = Redis.from_url(
            url,
            socket_timeout=self._timeout,
            socket_connect_timeout=self._timeout,
            retry=Retry(NoBackoff(), 0),
            max_connections=1,
            decode_responses=True,
            **tls,
        )
        try:
            await self._start(client)
            while True:
                await wait_for_event(self._wake, _HEARTBEAT_SECONDS)
                self._wake.clear()
                await self._send(client)
        finally:
            self._usable = False
            self._release_waiting()
            with contextlib.suppress(RedisError, OSError):
                async with asyncio.timeout(self._timeout):
                    await client.aclose()

    async def _start(self, client: Redis) -> None:
        """Register this gateway, and add what Redis does not know."""
        self._admit, self._settle = client.register_script(_ADMIT), client.register_script(_SETTLE)
        old, self._gateway = self._gateway, secrets.token_hex(8)
        async with asyncio.timeout(self._timeout * 4):
            await client.set(_MARKER, secrets.token_hex(8), nx=True)
            marker = str(await client.get(_MARKER))[:_MAX_MARKER]
            await client.script_load(_ADMIT)
            await client.script_load(_SETTLE)
            if old:
                await client.delete(f"{_PREFIX}gateway:{old}")
            await client.set(f"{_PREFIX}gateway:{self._gateway}", 1, ex=_ALIVE_SECONDS)
        if marker != self._marker:
            # A new Redis, or one that lost its data.
            self._changes.clear()
            for measure, owner, start, use in self._local.totals():
                self._changes[measure, owner, start] += use
            self._marker = marker
        for entry in [entry for entry in self._changes if entry[0] is Measure.CONCURRENCY]:
            del self._changes[entry]
        for owner, count in self._local.running():
            self._changes[Measure.CONCURRENCY, owner, 0.0] = count
        self._usable = True
        self._report(True)  # noqa: FBT003 - the state
        if not self._logged:
            LOG.info("limits are counted in Redis, for all gateways")
            self._logged = True
        self._wake.set()

    async def _send(self, client: Redis) -> None:
        batch = [self._waiting.popleft() for _ in range(min(_BATCH, len(self._waiting)))]
        batch = [entry for entry in batch if not entry[1].cancelled()]
        if self._waiting:
            self._wake.set()
        changes, self._changes = [(entry, change) for entry, change in self._changes.items() if change], Counter()
        try:
            known, results = await self._call(client, changes, [charges for charges, _ in batch])
        except BaseException:
            for _, future in batch:
                if not future.done():
                    future.set_result(None)
            for entry, change in changes:
                self._changes[entry] += change
            raise
        for (charges, future), decision in zip(batch, results, strict=True):
            if not future.done():
                future.set_result(decision)
            else:
                self._give_back(charges, decision)
        if not known:
            raise _LostRegistrationError("it has lost the registration of this gateway")

    async def _call(
        self, client: Redis, changes: Sequence[tuple[_Entry, int]], batch: Sequence[Sequence[Charge]]
    ) -> tuple[bool, list[Decision]]:
        """Send changes and charges; return True if Redis knows this gateway, and the decisions."""
        pipe = client.pipeline(transaction=False)
        pipe.set(f"{_PREFIX}gateway:{self._gateway}", 1, ex=_ALIVE_SECONDS, get=True)
        for first in range(0, len(changes), _BATCH):
            self._pipe_changes(pipe, changes[first : first + _BATCH])
        for charges in batch:
            self._pipe_charges(pipe, charges)
        async with asyncio.timeout(self._timeout):
            results = await pipe.execute()
        answers = results[len(results) - len(batch) :]
        decisions = [_decision(result, len(charges)) for result, charges in zip(answers, batch, strict=True)]
        return results[0] is not None, decisions

    def _give_back(self, charges: Sequence[Charge], decision: Decision | None) -> None:
        """Take back the charges of a request that was cancelled meanwhile."""
        if decision is not None and decision.refused is None:
            for charge, state in zip(charges, decision.states, strict=True):
                self.change(charge, state.start, -charge.cost)

    def _pipe_charges(self, pipe: Redis, charges: Sequence[Charge]) -> None:
        arguments: list[str | int] = [self._gateway]
        for charge in charges:
            measure = charge.measure
            arguments += [measure.seconds * 1000, int(measure.sliding), charge.limit, charge.cost]
        keys = [_redis_key(charge.measure, charge.owner) for charge in charges]
        pipe.evalsha(self._admit.sha, len(keys), *keys, *arguments)

    def _pipe_changes(self, pipe: Redis, changes: Sequence[tuple[_Entry, int]]) -> None:
        arguments: list[str | int] = [self._gateway]
        for (measure, _, start), change in changes:
            arguments += [measure.seconds * 1000, round(start * 1000), change]
        keys = [_redis_key(measure, owner) for (measure, owner, _), _ in changes]
        pipe.evalsha(self._settle.sha, len(keys), *keys, *arguments)

    def _down(self, reason: str) -> None:
        self._usable = False
        self._report(False)  # noqa: FBT003 - the state
        if self._logged is not False:
            LOG.warning(
                "Redis is not usable (%s): this gateway applies its share of the limits until Redis returns", reason
            )
            self._logged = False
        for entry in [entry for entry in self._changes if self._local.has_ended(entry[0], entry[2])]:
            del self._changes[entry]

    def _release_waiting(self) -> None:
        """Let the waiting requests apply the gateway's share."""
        while self._waiting:
            _, future = self._waiting.popleft()
            if not future.done():
                future.set_result(None)


def url_in(file: Path) -> Callable[[], str]:
    """Return a function that reads the URL in a file, so that a changed password needs no restart."""
    return lambda: file.read_text().strip()


def _redis_key(measure: Measure, owner: str) -> str:
    return f"{_PREFIX}{measure.label}:{owner}"


def _decision(result: Sequence[int], count: int) -> Decision:
    refused, now = result[0], result[1]
    states = tuple(
        WindowState(result[2 + 3 * i] / 1000, result[3 + 3 * i], result[4 + 3 * i], now / 1000) for i in range(count)
    )
    return Decision(refused - 1 if refused else None, states)
