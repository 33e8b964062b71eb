from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tunesmith.cluster.errors import ForbiddenError
from tunesmith.controller.serving.pool_rollouts import PoolRollouts
from tunesmith.serving.render import deployment
from tunesmith.serving.rolling import Cause, Rollout
from tunesmith.serving.settings import PoolSettings

if TYPE_CHECKING:
    from tunesmith.api.servingpool import ServingPool

Build = Callable[..., Any]
WAITING = {name: Rollout(f"team/{name}", change=Cause.INSTALLATION, serves=True) for name in "abc"}


@dataclass
class Nodes:
    """The part of the cluster that lists nodes of one GPU each, and the pods on them."""

    busy: dict[str, bool]
    forbidden: bool = False
    requests: list[str] = field(default_factory=list)

    async def list(self, _: str, *, labels: str) -> list[Any]:
        assert labels == ""
        self.requests.append("nodes")
        if self.forbidden:
            raise ForbiddenError("nodes is forbidden")
        allocatable = {"cpu": "32", "memory": "256Gi", "nvidia.com/gpu": "1", "ephemeral-storage": "4Ti", "pods": "110"}
        status = {"conditions": [{"type": "Ready", "status": "True"}], "allocatable": allocatable}
        return [{"metadata": {"name": name}, "spec": {}, "status": status} for name in self.busy]

    async def list_at(self, _: str, *, fields: str, keep: Callable[[Any], Any]) -> tuple[list[Any], str]:
        node = fields.partition(",")[0].removeprefix("spec.nodeName=")
        self.requests.append(node)
        pod = {"spec": {"containers": [{"resources": {"requests": {"nvidia.com/gpu": "1"}}}]}}
        return ([keep(pod)] if self.busy[node] else []), "1"


@pytest.fixture
def rollouts(pool: Build) -> Callable[..., Any]:
    def build(nodes: Nodes | None = None, clock: Callable[[], float] = lambda: 0.0) -> tuple[PoolRollouts, list[Any]]:
        context: Any = SimpleNamespace(cluster=nodes)
        return PoolRollouts(context, clock), [pool(name) for name in "abc"]

    return build


def test_no_replacement_starts_before_every_pool_was_observed(rollouts: Build) -> None:
    turns, pools = rollouts()
    assert turns.record("uid-a", WAITING["a"], lambda: pools) is not None
    turns.record("uid-b", WAITING["b"], lambda: pools)
    turns.record("uid-c", WAITING["c"], lambda: pools)
    assert turns.record("uid-a", WAITING["a"], lambda: pools) is None


def test_two_workers_never_start_two_replacements(rollouts: Build) -> None:
    turns, pools = rollouts()
    for name in "abca":
        turns.record(f"uid-{name}", WAITING[name], lambda: pools)
    held = turns.record("uid-b", WAITING["b"], lambda: pools)
    assert held is not None
    assert held.message.startswith("waits for the update of ServingPool team/a")


def test_a_pool_that_cannot_be_updated_or_was_deleted_does_not_block_others(rollouts: Build) -> None:
    turns, pools = rollouts()
    for name in "abc":
        turns.record(f"uid-{name}", WAITING[name], lambda: pools)
    turns.withdraw("uid-a")
    assert turns.record("uid-b", WAITING["b"], lambda: pools) is None
    turns.forget("uid-b")
    assert turns.record("uid-c", WAITING["c"], lambda: pools[2:]) is None


def test_a_failing_replacement_blocks_others_until_it_is_fixed(rollouts: Build) -> None:
    turns, pools = rollouts()
    failing = replace(WAITING["a"], change=None, cause=Cause.INSTALLATION, unfinished=True, failure="pod x: y")
    for name, rollout in (("a", failing), ("b", WAITING["b"]), ("c", WAITING["c"])):
        held = turns.record(f"uid-{name}", rollout, lambda: pools)
    assert held is not None
    assert held.failed
    turns.record("uid-a", replace(failing, unfinished=False, failure=None), lambda: pools)
    assert turns.record("uid-b", WAITING["b"], lambda: pools) is None


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        pytest.param(Nodes({"n1": True, "n2": False}), True, id="one is free"),
        pytest.param(Nodes({"n1": True, "n2": True}), False, id="none is free"),
        pytest.param(Nodes({}), False, id="no node"),
        pytest.param(Nodes({"n1": False}, forbidden=True), None, id="forbidden"),
    ],
)
async def test_room(nodes: Nodes, expected: object, rollouts: Build, pool: Build) -> None:
    now = [0.0]
    turns, _ = rollouts(nodes, lambda: now[0])
    wanted: ServingPool = pool()
    rendered = deployment(wanted, PoolSettings(store="s3://x", agent_image="a", engine_image="e"), 1)
    assert await turns.has_room(wanted, rendered) is expected
    requests = len(nodes.requests)
    assert await turns.has_room(wanted, rendered) is expected
    assert len(nodes.requests) == requests, "known for 30 s"
    now[0] = 31.0
    await turns.has_room(wanted, rendered)
    assert len(nodes.requests) == 2 * requests
