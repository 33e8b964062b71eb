"""Rollouts on a real API server with the real operator and controllers; kubelet, agents and requests are played."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from tests.controlplane.operatorprocess import until
from tests.controlplane.servingworld import World, digest_of, serving_world
from tests.controlplane.test_cli import tunesmith
from tunesmith.cluster.errors import InvalidError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.controlplane.apiserver import ApiServer
    from tests.controlplane.operatorprocess import Operator
    from tunesmith.cluster.client import Cluster

pytestmark = pytest.mark.controlplane
Object = dict[str, Any]
CANARY = {
    "strategy": "Canary",
    "steps": [{"weight": 10, "pauseSeconds": 1}, {"weight": 50, "pauseSeconds": 1}],
    "analysis": [{"measure": "ErrorRate", "max": 0.05}],
    "minRequests": 20,
}


@pytest.fixture
async def world(operator: Operator, cluster: Cluster) -> AsyncIterator[World]:
    async with serving_world(operator, cluster) as made:
        await made.pool()
        await made.train("one")
        await made.train("two")
        await made.serve("pirate", "one", rollout=CANARY)
        await made.until_condition("pirate", "Ready", "True", "Resident")
        yield made


async def roll_out(world: World, source: str) -> None:
    patch = {"spec": {"adapterFrom": {"fineTuneJob": {"name": source}}}}
    await world.cluster.patch("AdapterDeployment", "pirate", world.namespace, patch)


async def command(world: World, text: str) -> None:
    patch = {"metadata": {"annotations": {"tunesmith.dev/rollout": text}}}
    await world.cluster.patch("AdapterDeployment", "pirate", world.namespace, patch)


async def until_status(world: World, holds: Callable[[Object], bool], what: str) -> Object:
    async def held() -> bool:
        return holds((await world.get("pirate"))["status"])

    try:
        await until(held, what)
    except TimeoutError as error:
        raise TimeoutError(f"{error}: {(await world.get('pirate'))['status']}") from None
    return dict((await world.get("pirate"))["status"])


def weights(status: Object) -> list[int | None]:
    return [revision.get("weight") for revision in status["revisions"]]


async def until_weights(world: World, *expected: int | None) -> Object:
    return await until_status(world, lambda status: weights(status) == list(expected), f"weights {expected}")


async def reasons(world: World) -> set[str]:
    return {event["reason"] for event in await world.cluster.list("Event", world.namespace)}


async def test_a_good_revision_is_promoted_through_a_restart_of_the_operator(world: World, operator: Operator) -> None:
    new = world.engine_name("pirate", "two")
    await roll_out(world, "two")
    await until_weights(world, 10, 90)
    (agent,) = world.pods.agents.values()
    assert agent.holds == sorted([new, world.engine_name("pirate", "one")])
    await agent.serve(new, 15)
    waiting = await until_status(
        world, lambda status: status["rollout"]["traffic"]["requests"] == 15, "the requests are counted"
    )
    assert waiting["rollout"]["message"] == "waits for ErrorRate: 15 of at least 20 requests in this step"
    operator.kill()
    operator.start()
    await agent.serve(new, 25, errors=1)
    assert weights(await until_weights(world, 50, 50)) == [50, 50]
    await agent.serve(new, 50, errors=1)
    status = await until_weights(world, None)
    assert status["revisions"][0]["digest"] == digest_of("two")
    assert status["rollout"]["phase"] == "Complete"
    await world.until(lambda: agent.holds == [new], "the old revision is unregistered")
    await world.until_condition("pirate", "Progressing", "False", "Settled")
    assert "RolloutStep" in await reasons(world)


async def test_a_bad_revision_is_rolled_back_and_kstatus_reports_it(world: World, server: ApiServer) -> None:
    await roll_out(world, "two")
    await until_weights(world, 10, 90)
    (agent,) = world.pods.agents.values()
    await agent.serve(world.engine_name("pirate", "two"), 40, errors=10)
    await world.until_condition("pirate", "Progressing", "False", "RolledBack")
    status = (await world.get("pirate"))["status"]
    assert weights(status) == [None]
    assert status["revisions"][0]["digest"] == digest_of("one")
    assert status["rejectedDigests"] == [digest_of("two")]
    (found,) = status["rollout"]["measures"]
    assert (found["measure"], found["value"], found["max"], found["passed"]) == ("ErrorRate", 0.25, 0.05, False)
    await world.until_condition("pirate", "Stalled", "True", "RolledBack")
    waited = await asyncio.to_thread(
        server.kubectl,
        *("wait", "-n", world.namespace, "adapterdeployment/pirate", "--for=condition=Ready", "--timeout=120s"),
    )
    assert waited.returncode == 0, waited.stderr
    await world.until(lambda: agent.holds == [world.engine_name("pirate", "one")], "the bad one is unregistered")
    assert "RolledBack" in await reasons(world)


async def test_commands_by_annotation(world: World) -> None:
    await roll_out(world, "two")
    await until_weights(world, 10, 90)
    (agent,) = world.pods.agents.values()
    await command(world, "pause")
    await world.until_condition("pirate", "Progressing", "True", "RolloutPaused")
    await agent.serve(world.engine_name("pirate", "two"), 100)
    await until_status(world, lambda status: status["rollout"]["traffic"]["requests"] == 100, "requests are counted")
    assert weights((await world.get("pirate"))["status"]) == [10, 90]
    await command(world, "promote")
    assert (await until_weights(world, None))["revisions"][0]["digest"] == digest_of("two")
    await command(world, "undo")
    status = await until_status(
        world,
        lambda status: [found["digest"] for found in status["revisions"]] == [digest_of("one")],
        "the previous revision is back",
    )
    assert status["rollout"]["phase"] == "Undone"
    assert (await world.get("pirate"))["metadata"]["annotations"] == {"tunesmith.dev/rollout": "undo"}


async def test_commands_of_the_cli(world: World, server: ApiServer) -> None:
    async def cli(*arguments: str) -> str:
        code, output, problems = await asyncio.to_thread(tunesmith, server, *arguments, "-n", world.namespace)
        assert code == 0, problems
        return output

    await roll_out(world, "two")
    await until_weights(world, 10, 90)
    assert await cli("rollout", "pause", "pirate") == (
        f"AdapterDeployment {world.namespace}/pirate: the rollout is paused; a failed check still rolls it back\n"
    )
    shown = await cli("rollout", "status", "pirate")
    assert "state     Progressing, paused" in shown
    assert f"requests  10 % to {digest_of('two')[7:19]}, 1 pod" in shown
    assert "measure   ErrorRate: ? (max 0.05), 0 of at least 20 requests in this step" in shown
    await cli("rollout", "resume", "pirate")
    assert "answers all requests" in await cli("rollout", "abort", "pirate")
    code, _, problems = await asyncio.to_thread(tunesmith, server, "wait", "adapter", "pirate", "-n", world.namespace)
    assert (code, "was given up: aborted by the command abort" in problems) == (1, True), problems


async def test_impossible_rollouts_are_refused(world: World) -> None:
    for change, error in (
        ({"steps": [{"weight": 50}, {"weight": 10}]}, "order the steps by weight"),
        ({"strategy": "Immediate"}, "Immediate has no steps"),
        ({"analysis": [{"measure": "ErrorRate", "max": 5}]}, "write 0.05 for 5 %"),
        ({"analysis": [{"measure": "Query", "max": 5}]}, "query is required"),
        ({"analysis": [{"measure": "TimeToFirstTokenP95Seconds"}]}, "has no max"),
    ):
        with pytest.raises(InvalidError, match=error):
            await world.serve("other", "one", rollout={**CANARY, **change})
