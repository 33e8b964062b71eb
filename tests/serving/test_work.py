"""The operator's work grows with the number of objects, and not faster. Work is counted in calls of functions."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.serving.operatorworld import World
from tunesmith.controller.reconciler import Key

if TYPE_CHECKING:
    from collections.abc import Coroutine

SMALL, LARGE = 40, 160
SLOTS = 16
TOLERANCE = 1.35
"""Constant parts make small worlds relatively dearer; sorting and lists of pods make large ones a little dearer."""


async def calls(work: Coroutine[Any, Any, object]) -> int:
    """Await the work; return the calls of functions that it made, Python's and C's."""
    count = 0

    def profile(_: object, event: str, __: object) -> None:
        nonlocal count
        count += event in {"call", "c_call"}

    sys.setprofile(profile)
    try:
        await work
    finally:
        sys.setprofile(None)
    return count


async def world_of(count: int, **spec: Any) -> World:
    world = World()
    world.add_pool("base", engine={"maxLoras": 1, "maxAdapters": SLOTS}, replicas=-(-count // SLOTS))
    await world.converge()
    for number in range(count):
        world.add_adapter(number, **spec)
    return world


async def settled(count: int) -> World:
    world = await world_of(count)
    await world.converge()
    assert {item["status"]["phase"] for item in world.adapters()} == {"Ready"}
    return world


async def everything(world: World) -> None:
    world.reconcile_everything()
    await world.drain()


async def test_an_adapter_whose_rank_is_too_high_takes_no_slot_and_adds_no_pod() -> None:
    world = World()
    rule = {"minReplicas": 1, "maxReplicas": 3}
    world.add_pool("base", engine={"maxLoras": 1, "maxAdapters": 1, "maxLoraRank": 8}, autoscaling=rule)
    await world.converge()
    for number in range(3):
        world.add_adapter(number)
    await world.converge()
    (deployment,) = world.store.of_kind("Deployment")
    assert deployment["spec"]["replicas"] == 1
    assert world.store.find("ServingPool", "team", "base")["status"]["registeredAdapters"] == 0
    for item in world.adapters():
        reasons = {condition["type"]: condition["reason"] for condition in item["status"]["conditions"]}
        assert reasons["Resolved"] == reasons["Ready"] == "RankTooHigh"
    pool = world.store.find("ServingPool", "team", "base")
    engine = {**pool["spec"]["engine"], "maxLoraRank": 16, "maxAdapters": 4}
    world.observe(world.store.put({**pool, "spec": {**pool["spec"], "engine": engine}}))
    await world.converge()
    assert {item["status"]["phase"] for item in world.adapters()} == {"Ready"}


async def test_reconciling_everything_is_linear() -> None:
    small = await calls(everything(await settled(SMALL)))
    large = await calls(everything(await settled(LARGE)))
    assert large / LARGE <= TOLERANCE * small / SMALL


async def test_from_creation_to_ready_is_linear() -> None:
    small = await calls((await world_of(SMALL)).converge())
    large = await calls((await world_of(LARGE)).converge())
    assert large / LARGE <= TOLERANCE * small / SMALL


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(Key("AdapterDeployment", "team", "adapter-7"), id="adapter"),
        pytest.param(Key("ServingPool", "team", "base"), id="pool"),
    ],
)
async def test_the_cost_of_a_key_does_not_depend_on_other_objects(key: Key) -> None:
    found = {}
    for count in (SMALL, LARGE):
        world = await settled(count)
        await world.reconcile(key)
        found[count] = await calls(world.reconcile(key))
    # A pool observes each of its pods, of which there are four times as many.
    pods = LARGE // SMALL if key.kind == "ServingPool" else 2
    assert found[LARGE] <= pods * found[SMALL]


async def test_a_change_of_one_adapter_reconciles_that_one_and_its_pool() -> None:
    world = await settled(LARGE)
    world.passes.clear()
    item = world.store.find("AdapterDeployment", "team", "adapter-7")
    world.observe(world.store.put({**item, "spec": {**item["spec"], "replicas": 2}}))
    await world.converge()
    assert world.passes["AdapterDeployment"] <= 6
    assert world.passes["ServingPool"] <= 6


async def test_loading_an_adapter_does_not_requeue_others() -> None:
    world = await world_of(LARGE)
    world.passes.clear()
    await world.converge(batch=1)
    # Twice until it is placed, once when it is resident, and once more for a status that the pool changed meanwhile.
    assert world.passes["AdapterDeployment"] <= 5 * LARGE


async def test_deletions_are_linear_and_leave_nothing_behind() -> None:
    found = {}
    for count in (SMALL, LARGE):
        world = await settled(count)

        async def delete(world: World = world) -> None:
            for item in list(world.adapters()):
                world.controller.observe("DELETED", item)
            await world.drain()

        found[count] = await calls(delete())
        assert len(world.context.caches["AdapterDeployment"]) == 0
        assert world.state.adapters.list() == []
    assert found[LARGE] / LARGE <= TOLERANCE * found[SMALL] / SMALL


async def test_large_annotations_are_not_cached() -> None:
    world = World()
    note = "x" * 250_000
    for number in range(20):
        world.add_adapter(number)
        item = world.store.find("AdapterDeployment", "team", f"adapter-{number}")
        world.observe(world.store.put({**item, "metadata": {**item["metadata"], "annotations": {"note": note}}}))
    assert note not in str(world.context.caches["AdapterDeployment"].list())


async def test_a_settled_adapter_is_planned_again_only_when_something_that_it_depends_on_changes() -> None:
    world, key = await settled(SMALL), Key("AdapterDeployment", "team", "adapter-7")
    await world.reconcile(key)
    unchanged = await calls(world.reconcile(key))
    pool = world.state.pools.list()[0].metadata.uid
    for link in world.state.agents.of(pool).values():
        assert link.state is not None
        kept = [entry for entry in link.state.adapters if not entry.engine_name.startswith("team/adapter-7@")]
        link.record_state(link.state.model_copy(update={"adapters": kept}), float("inf"))
    assert await calls(world.reconcile(key)) > 2 * unchanged
    status = world.store.find("AdapterDeployment", "team", "adapter-7")["status"]
    assert (status["phase"], status["readyReplicas"]) != ("Ready", 1)
    await world.converge()
    assert world.store.find("AdapterDeployment", "team", "adapter-7")["status"]["phase"] == "Ready"
