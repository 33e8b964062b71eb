"""Limits that several gateways count together, in a real Redis."""

from __future__ import annotations

import asyncio
import re
import signal
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import aiohttp
import pytest

from tests.gateway.gateway_rig import OWN_NAMESPACE, eventually
from tests.gateway.process_rig import DEADLINE, ProcessRig
from tests.gateway.redis_server import PASSWORD, RedisServer
from tunesmith.contracts.apikey import key_record, new_key
from tunesmith.gateway.shared_counters import SharedCounters, url_in
from tunesmith.gateway.windows import Charge, Decision, LocalCounters, Measure

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

REPLICAS = 3
BODY = {"model": "pirate", "messages": [], "max_tokens": 1}
USABLE = "limits are counted in Redis"
DOWN = "applies its share of the limits"


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[RedisServer]:
    folder = tmp_path / "redis"
    folder.mkdir()
    async with RedisServer(folder, keep=True) as server:
        yield server


@asynccontextmanager
async def counters(
    url: Callable[[], str], *, local: LocalCounters | None = None, ca_file: Path | None = None, patience: float = 5.0
) -> AsyncIterator[tuple[SharedCounters, list[bool]]]:
    """Counters, and the states that they reported."""
    states: list[bool] = []
    shared = SharedCounters(url, ca_file, patience, local or LocalCounters(lambda: 0.0), states.append)
    task = asyncio.create_task(shared.run())
    yield shared, states
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


class Fleet:
    """Gateways, each in its own process, that share a Redis."""

    def __init__(self, rigs: list[ProcessRig]) -> None:
        self.rigs = rigs

    async def key(self, name: str, **limits: int) -> str:
        key = new_key()
        record = key_record(name, OWN_NAMESPACE, key, home="team", namespaces=["team"], models=["*"], **limits)
        for rig in self.rigs:
            rig.keys.append(key)
            rig.put(record)
        async with asyncio.timeout(DEADLINE):
            for rig in self.rigs:  # a malformed body is refused only after the key is found
                while (await rig.chat(b"", key=key))[0] == 401:  # noqa: ASYNC110 - polls a gateway
                    await asyncio.sleep(0.05)
        return key

    async def send(self, key: str, count: int, clients: int = 8, **fields: object) -> Counter[int]:
        """Send requests from concurrent clients to each gateway, and return how many had each status."""
        left = {rig.port: count for rig in self.rigs}
        statuses: Counter[int] = Counter()

        async def client(rig: ProcessRig) -> None:
            while left[rig.port] > 0:
                left[rig.port] -= 1
                status, _ = await rig.chat(BODY | fields, key=key)
                statuses[status] += 1

        await asyncio.gather(*(client(rig) for rig in self.rigs for _ in range(clients)))
        return statuses

    def logged(self, text: str) -> list[int]:
        return [rig.log.read_text().count(text) for rig in self.rigs]


@pytest.fixture
async def fleet(tmp_path: Path, redis: RedisServer) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        rigs = []
        for number in range(REPLICAS):
            folder = tmp_path / f"gateway-{number}"
            folder.mkdir()
            rigs.append(
                ProcessRig(
                    folder,
                    f"--redis-url-file={redis.url_file}",
                    "--redis-timeout-seconds=5",
                    f"--replicas={REPLICAS}",
                    "--no-require-metrics-token",
                )
            )
        for rig in rigs:
            await stack.enter_async_context(rig)
        fleet = Fleet(rigs)
        await eventually(lambda: all(fleet.logged(USABLE)), "the gateways use Redis")
        yield fleet
        for rig in rigs:
            rig.check_log()
            assert PASSWORD not in rig.log.read_text()


async def shared_gauge(rig: ProcessRig) -> float:
    async with rig.http.get(f"http://127.0.0.1:{rig.internal_port}/metrics") as response:
        found = re.search(r"^tunesmith_gateway_limits_shared (\S+)$", await response.text(), re.MULTILINE)
    assert found is not None
    return float(found[1])


async def test_limits_are_exact_over_three_gateways(fleet: Fleet) -> None:
    tokens = await fleet.key("tokens", tokens_per_day=1000)
    # Each answer uses 2 tokens; requests reserve more until they are answered, so the last ones come one at a time.
    answered = (await fleet.send(tokens, 200))[200] + (await fleet.send(tokens, 40, clients=1))[200]
    assert 990 <= 2 * answered <= 1000
    requests = await fleet.key("requests", requests_per_minute=300)
    statuses = await fleet.send(requests, 150)
    refused_first = statuses[200]
    assert set(statuses) == {200, 429}
    assert 297 <= refused_first <= 300


async def test_one_gateway_may_use_a_whole_limit(fleet: Fleet) -> None:
    key = await fleet.key("alone", tokens_per_day=1000)
    alone = Fleet(fleet.rigs[:1])
    assert (await alone.send(key, 200, clients=4))[200] == 200, "its share alone would be 167 requests"
    status, answer = await fleet.rigs[1].chat(BODY | {"max_tokens": 900}, key=key)
    assert status == 429
    assert b"1000 tokens per day" in answer


async def test_sequences_at_once_are_counted_together(fleet: Fleet) -> None:
    key = await fleet.key("limited", max_concurrency=4)
    for rig in fleet.rigs:
        rig.pod.gate.clear()
    running = [asyncio.create_task(rig.chat(BODY | {"n": 2}, key=key)) for rig in fleet.rigs[:2]]
    await eventually(lambda: all(rig.pod.running for rig in fleet.rigs[:2]), "both requests run")
    status, answer = await fleet.rigs[2].chat(BODY, key=key)
    assert status == 429
    assert b"4 sequences" in answer
    for rig in fleet.rigs:
        rig.pod.gate.set()
    assert [(await task)[0] for task in running] == [200, 200]

    async def accepted() -> bool:
        return (await fleet.rigs[2].chat(BODY | {"n": 4}, key=key))[0] == 200

    async with asyncio.timeout(DEADLINE):
        while not await accepted():  # noqa: ASYNC110 - polls a gateway
            await asyncio.sleep(0.05)


async def test_sequences_of_a_gateway_that_was_killed_stop_counting(fleet: Fleet) -> None:
    key = await fleet.key("limited", max_concurrency=1)
    dying, other = fleet.rigs[:2]
    dying.pod.gate.clear()
    request = asyncio.create_task(dying.chat(BODY, key=key))
    await eventually(lambda: dying.pod.running, "the request runs")
    assert (await other.chat(BODY, key=key))[0] == 429
    dying.kill()
    with pytest.raises(aiohttp.ClientError):
        await request
    async with asyncio.timeout(DEADLINE):
        while (await other.chat(BODY, key=key))[0] != 200:  # noqa: ASYNC110 - polls a gateway
            await asyncio.sleep(0.1)


async def test_without_redis_each_gateway_applies_its_share_and_returns_by_itself(
    fleet: Fleet, redis: RedisServer
) -> None:
    key = await fleet.key("limited", tokens_per_day=3000)
    load = asyncio.create_task(fleet.send(key, 200))
    await eventually(lambda: sum(len(rig.pod.seen) for rig in fleet.rigs) > 100, "the load runs")
    await redis.kill()
    statuses = await load
    assert set(statuses) <= {200, 429}, "no request fails because of Redis"
    assert fleet.logged(DOWN) == [1] * REPLICAS
    assert [await shared_gauge(rig) for rig in fleet.rigs] == [0.0] * REPLICAS
    statuses += await fleet.send(key, 400)
    assert 2 * statuses[200] <= 3000 + 2 * REPLICAS, "what was used before counts towards the shares"
    await redis.start()
    await eventually(lambda: fleet.logged(USABLE) == [2] * REPLICAS, "the gateways use Redis again")
    assert [await shared_gauge(rig) for rig in fleet.rigs] == [1.0] * REPLICAS
    assert fleet.logged(DOWN) == [1] * REPLICAS, "one line for each time that Redis is down"
    statuses += await fleet.send(key, 100) + await fleet.send(key, 20, clients=1)
    assert 0.99 * 3000 <= 2 * statuses[200] <= 3000 + 2 * REPLICAS, "what was used without Redis counts there too"


async def test_a_redis_that_lost_its_data_learns_it_again(tmp_path: Path) -> None:
    now = 1000.0
    local = LocalCounters(lambda: now)
    async with RedisServer(tmp_path) as redis, counters(url_in(redis.url_file), local=local) as (shared, states):
        charge = Charge("key/a", Measure.TOKENS_PER_DAY, 100, 60)
        running = Charge("key/a", Measure.CONCURRENCY, 2, 1)
        await eventually(lambda: states[-1:] == [True], "Redis is usable")
        decision = await shared.admit([charge, running])
        assert decision is not None
        assert decision.refused is None
        now = decision.states[0].now  # Redis has a clock of its own
        local.record([charge, running], decision)
        await redis.kill()
        assert await shared.admit([charge]) is None
        await redis.start()
        await eventually(lambda: states[-1], "Redis is usable again")
        refused = await shared.admit([charge])
        assert refused is not None
        assert (refused.refused, refused.states[0].current) == (0, 60)
        two = await shared.admit([running._replace(cost=2)])
        assert two is not None
        assert two.refused == 0


async def test_a_redis_that_does_not_answer_is_given_up() -> None:
    connections = 0

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, counters(lambda: url, patience=0.2) as (shared, states):
        await eventually(lambda: connections >= 2, "it was tried again")
        assert await shared.admit([Charge("key/a", Measure.CONCURRENCY, 1, 1)]) is None
        assert not any(states)


async def test_a_redis_that_hangs_delays_only_the_requests_that_wait_for_it(tmp_path: Path) -> None:
    charge = Charge("key/a", Measure.TOKENS_PER_DAY, 100, 1)
    async with (
        RedisServer(tmp_path) as redis,
        counters(url_in(redis.url_file), patience=1.0) as (shared, states),
    ):
        await eventually(lambda: states[-1:] == [True], "Redis is usable")
        redis.signal(signal.SIGSTOP)
        assert await asyncio.gather(*(shared.admit([charge]) for _ in range(1000))) == [None] * 1000
        request = shared.admit([charge])
        with pytest.raises(StopIteration) as answered:
            request.send(None)
        assert answered.value.value is None, "the next one does not wait at all"
        redis.signal(signal.SIGCONT)
        await eventually(lambda: states[-1], "Redis is usable again")


async def test_a_request_that_is_cancelled_gives_its_charges_back(tmp_path: Path) -> None:
    async with RedisServer(tmp_path) as redis, counters(url_in(redis.url_file)) as (shared, states):
        await eventually(lambda: states[-1:] == [True], "Redis is usable")
        charge = Charge("key/a", Measure.CONCURRENCY, 10, 10)
        for rounds in range(20):
            request = asyncio.create_task(shared.admit([charge]))
            for _ in range(rounds):
                await asyncio.sleep(0)
            request.cancel()
            (decision,) = await asyncio.gather(request, return_exceptions=True)
            if isinstance(decision, Decision) and decision.refused is None:
                shared.change(charge, 0.0, -10)

        async def fits() -> bool:
            decision = await shared.admit([charge])
            return decision is not None and decision.refused is None

        async with asyncio.timeout(DEADLINE):
            while not await fits():  # noqa: ASYNC110 - polls Redis
                await asyncio.sleep(0.01)


async def test_a_connection_with_tls(tmp_path: Path) -> None:
    async with RedisServer(tmp_path, tls=True) as redis:
        for ca_file, usable in ((None, False), (redis.ca_file, True)):
            async with counters(url_in(redis.url_file), ca_file=ca_file) as (_, states):
                await eventually(lambda states=states: states, "it was tried")
                assert states[0] == usable, "the certificate is checked"
