"""Every key, on every model, by every name, on every route of a gateway's process: what is forbidden is refused."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from tests.gateway.gateway_rig import OWN_NAMESPACE, adapter_manifest, pool_manifest
from tests.gateway.process_rig import DEADLINE, ProcessRig
from tunesmith.contracts.apikey import key_record, new_key
from tunesmith.gateway.apis import API_BY_PATH

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

REVISION = "aaaaaaaaaaaa"
ADAPTERS = ("team/pirate", "team/parrot", "other/pirate", "other/wren")
MODELS = (*ADAPTERS, "serving/base")
PAST = datetime.now(UTC) - timedelta(days=1)


class Holder(NamedTuple):
    """A key and the models that it may call, written out."""

    name: str
    home: str
    namespaces: tuple[str, ...]
    models: tuple[str, ...]
    may_call: frozenset[str]
    expires: datetime | None = None


HOLDERS = (
    Holder("team", "team", ("team",), ("*",), frozenset({"team/pirate", "team/parrot", "serving/base"})),
    Holder("pirate", "team", ("team",), ("team/pirate",), frozenset({"team/pirate"})),
    Holder("other", "other", ("other",), ("*",), frozenset({"other/pirate", "other/wren", "serving/base"})),
    Holder("both", "team", ("team", "other"), ("*",), frozenset(MODELS)),
    Holder("wren", "team", ("team", "other"), ("other/wren",), frozenset({"other/wren"})),
    Holder("base", "team", ("team",), ("serving/base",), frozenset({"serving/base"})),
    Holder("foreign-list", "team", ("team",), ("other/wren",), frozenset()),
    Holder("elsewhere", "elsewhere", ("elsewhere",), ("*",), frozenset({"serving/base"})),
    Holder("nothing", "team", ("team",), (), frozenset()),
    Holder("expired", "team", ("team", "other"), ("*",), frozenset(), PAST),
)
BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hello"}],
    "prompt": "Hello",
    "input": "Hello",
    "query": "Hello",
    "documents": ["Hello"],
    "text_1": "Hello",
    "text_2": "Hello",
    "tokens": [1],
    "max_tokens": 1,
}


def names(model: str, home: str) -> list[str]:
    """The names by which a key could call a model."""
    namespace, _, bare = model.partition("/")
    found = [model]
    if namespace == home or model == "serving/base":
        found.append(bare)
    if model in ADAPTERS:
        found += [f"{name}@{REVISION}" for name in found]
    return found


class World:
    """A gateway's process and the keys of all holders, one that was deleted, and one that never existed."""

    def __init__(self, rig: ProcessRig) -> None:
        self.rig = rig
        self.keys = {holder.name: new_key() for holder in HOLDERS}

    async def start(self) -> None:
        rig = self.rig
        rig.put(pool_manifest("closed", "private", model="secret", open_to="Same"))
        for model in ADAPTERS:
            namespace, _, name = model.partition("/")
            rig.put(adapter_manifest(name, namespace))
            await rig.pod.hold(f"{model}@{REVISION}")
        for holder in HOLDERS:
            key = self.keys[holder.name]
            rig.keys.append(key)
            record = key_record(
                holder.name,
                OWN_NAMESPACE,
                key,
                home=holder.home,
                namespaces=holder.namespaces,
                models=holder.models,
                expires=holder.expires,
            )
            rig.put(record)
        for holder in HOLDERS:
            for model in sorted(holder.may_call):
                async with asyncio.timeout(DEADLINE):
                    while (await self.reaches(self.keys[holder.name], "/v1/chat/completions", model))[0] != 200:  # noqa: ASYNC110
                        await asyncio.sleep(0.05)

    async def reaches(self, key: str, path: str, model: str, header: str = "Authorization") -> tuple[int, bool]:
        """Return the status, and True if an engine got the request."""
        seen = len(self.rig.pod.seen)
        value = f"Bearer {key}" if header == "Authorization" else key
        async with self.rig.http.post(
            self.rig.url + path, json=BODY | {"model": model}, headers={header: value}
        ) as response:
            await response.read()
        return response.status, len(self.rig.pod.seen) > seen


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with ProcessRig(tmp_path, "--hold-seconds=2", "--shared-pool-namespaces=serving") as rig:
        world = World(rig)
        await world.start()
        yield world
        rig.check_log()


async def test_every_forbidden_pair_is_refused_on_every_route(world: World) -> None:
    checked = 0
    for holder in HOLDERS:
        key = world.keys[holder.name]
        for path in API_BY_PATH:
            for model in MODELS:
                for name in names(model, holder.home):
                    status, reached = await world.reaches(key, path, name)
                    what = f"{holder.name} calls {name} on {path}: {status}"
                    assert reached == (model in holder.may_call), what
                    if not reached:
                        assert status == 401 if holder.expires else status in {403, 404}, what
                    checked += 1
    assert checked > 1000


async def test_a_bare_name_is_never_that_of_another_namespace(world: World) -> None:
    assert await world.reaches(world.keys["team"], "/v1/chat/completions", "wren") == (404, False)
    assert await world.reaches(world.keys["both"], "/v1/chat/completions", "wren") == (404, False)
    assert await world.reaches(world.keys["both"], "/v1/chat/completions", "secret") == (404, False)
    assert await world.reaches(world.keys["both"], "/v1/chat/completions", "private/secret") == (404, False)
    status, _ = await world.reaches(world.keys["other"], "/v1/chat/completions", "pirate")
    assert status == 200
    assert world.rig.pod.seen[-1]["model"] == f"other/pirate@{REVISION}"


async def test_without_a_valid_key_no_route_reaches_an_engine(world: World) -> None:
    for path in API_BY_PATH:
        for header in ("Authorization", "x-api-key"):
            for key in ("", new_key(), "null", world.keys["team"][:-1]):
                status, reached = await world.reaches(key, path, "team/pirate", header)
                assert (status, reached) == (401, False), (path, header)


async def test_models_lists_what_a_key_may_call(world: World) -> None:
    for holder in HOLDERS:
        headers = {"Authorization": f"Bearer {world.keys[holder.name]}"}
        async with world.rig.http.get(f"{world.rig.url}/v1/models", headers=headers) as response:
            answer = await response.json()
        if holder.expires:
            assert response.status == 401
            continue
        assert {model["id"] for model in answer["data"]} == holder.may_call, holder.name
        for model in MODELS:
            async with world.rig.http.get(f"{world.rig.url}/v1/models/{model}", headers=headers) as response:
                assert (response.status == 200) == (model in holder.may_call), (holder.name, model)
