"""Events that users see when a pool or an adapter changes its size, or a pool replaces its pods."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serving.operatorworld import Recorder, World
from tunesmith.api.servingpool import ServingPoolStatus
from tunesmith.serving.scale_events import scale_events


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [(None, 3, None), (2, 2, None), (2, None, None), (1, 3, "ScaledUp"), (3, 0, "ScaledDown")],
)
def test_a_new_size_is_an_event(before: int | None, after: int | None, reason: str | None) -> None:
    found = scale_events("pods", before, ServingPoolStatus(desired_replicas=after, desired_reason="why"))
    assert [notice.reason for notice in found] == ([] if reason is None else [reason])
    assert [notice.message for notice in found] == ([] if reason is None else [f"{before} → {after} pods: why"])


class Events(Recorder):
    def __init__(self) -> None:
        self.seen: list[tuple[str, str, str]] = []

    async def event(self, about: Any, reason: str, message: str, **_: Any) -> None:
        self.seen.append((about["kind"], str(reason), message))


async def test_scaling_and_the_replacement_of_pods_are_events() -> None:
    world = World()
    events = world.context.recorder = Events()
    world.add_pool("base", replicas=1)
    world.add_adapter(0)
    await world.converge()

    def change(kind: str, name: str, **spec: Any) -> None:
        found = world.store.find(kind, "team", name)
        world.observe(world.store.put({**found, "spec": {**found["spec"], **spec}}))

    events.seen.clear()
    change("ServingPool", "base", replicas=2)
    change("AdapterDeployment", "adapter-0", replicas=2)
    await world.converge()
    assert ("ServingPool", "ScaledUp", "1 → 2 pods: spec.replicas is 2") in events.seen
    assert ("AdapterDeployment", "ScaledUp", "1 → 2 copies: spec.replicas is 2") in events.seen
    change("AdapterDeployment", "adapter-0", replicas=1)
    await world.converge()
    assert ("AdapterDeployment", "ScaledDown", "2 → 1 copies: spec.replicas is 1") in events.seen
    events.seen.clear()
    change("ServingPool", "base", engine={"maxModelLength": 256})
    await world.drain()
    (message,) = [message for kind, reason, message in events.seen if (kind, reason) == ("ServingPool", "RollingOut")]
    assert "pods" in message
