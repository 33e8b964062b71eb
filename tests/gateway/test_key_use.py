"""Last use of API keys."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import aiohttp

from tests.gateway.gateway_rig import GATEWAY_KEYS, eventually
from tunesmith.contracts.agent import MAX_USED_KEYS, demand_tokens
from tunesmith.contracts.keyuse import KEY_USE_SECONDS, key_use_record, newest, parse_key_use
from tunesmith.gateway.key_use import KeyUse

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.gateway.gateway_rig import Rig


def test_a_use_is_reported_once_a_minute() -> None:
    now = 1000.0
    use = KeyUse(lambda: now)
    use.record("a")
    seen, times = use.since(0)
    assert times == {"a": 1000}
    now += KEY_USE_SECONDS - 1
    use.record("a")
    assert use.since(seen)[1] == {}
    now += 1
    use.record("a")
    use.record("b")
    seen, times = use.since(seen)
    assert times == {"a": 1060, "b": 1060}
    assert use.since(seen)[1] == {}
    assert use.since(0)[1] == times, "a new stream gets all"


def test_the_number_of_keys_is_bounded() -> None:
    use = KeyUse(lambda: 1000.0)
    for number in range(MAX_USED_KEYS + 10):
        use.record(f"key-{number}")
    times = use.since(0)[1]
    assert len(times) == MAX_USED_KEYS
    assert "key-9" not in times


def test_the_record_stays_below_the_limit_of_a_config_map() -> None:
    times = {f"{number:06d}" + "x" * 190: number + 1 for number in range(10_000)}
    kept = newest(times)
    record = key_use_record("tunesmith-system", kept)
    assert len(json.dumps(record)) < 1024 * 1024
    assert max(times.values()) in kept.values()
    assert min(times.values()) not in kept.values()
    assert parse_key_use(record) == kept


def test_a_damaged_record_has_no_uses() -> None:
    for data in (None, {}, {"lastUsed": "["}, {"lastUsed": "[1]"}, {"lastUsed": '{"a": "x", "b": -1}'}):
        assert parse_key_use({"data": data}) == {}
    assert parse_key_use(None) == {}


async def test_gateways_report_the_use_of_keys_to_the_operator(start: Callable[..., Awaitable[Rig]]) -> None:
    rig = await start()
    used, unused = rig.add_key("used", home="team"), rig.add_key("unused", home="team")
    await eventually(lambda: rig.gateway.keys.find(used) and rig.gateway.keys.find(unused), "the keys are known")
    assert (await rig.chat("nothing", key=used))[0] == 404
    url = f"http://127.0.0.1:{rig.gateway.internal_port}/v1/demand"
    headers = {"Authorization": f"Bearer {demand_tokens(GATEWAY_KEYS)[0]}"}
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as stream:
        line = json.loads(await stream.content.readline())
    assert list(line["usedKeys"]) == ["used"]
