"""Rollouts of all pools: their order, and the check for a node with room for a surge pod."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from tunesmith.cluster.errors import ClusterError
from tunesmith.contracts.quantities import pod_requests
from tunesmith.serving.node_capacity import candidates, has_room
from tunesmith.serving.rolling import Cause, Rollout, RolloutHold, find_hold

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tunesmith.api.servingpool import ServingPool
    from tunesmith.cluster.resources import Object
    from tunesmith.controller.context import Context

_ROOM_CHECK_SECONDS = 30.0
_MAX_NODES = 20
_UNFINISHED_PODS = "spec.nodeName={},status.phase!=Succeeded,status.phase!=Failed"


class PoolRollouts:
    """The latest rollout of each pool, by UID."""

    def __init__(self, context: Context, clock: Callable[[], float] = time.monotonic) -> None:
        self._context = context
        self._clock = clock
        self._rollouts: dict[str, Rollout] = {}
        self._room_checks: dict[str, tuple[float, bool | None]] = {}

    def record(self, uid: str, rollout: Rollout, pools: Callable[[], Iterable[ServingPool]]) -> RolloutHold | None:
        """Record a pool's rollout; return the reason why its pods are not replaced yet, or None.

        Args:
            uid: UID of the pool.
            rollout: the observed rollout.
            pools: returns all pools.
        """
        self._rollouts[uid] = rollout
        if not rollout.is_waiting:
            return None
        complete = all(pool.metadata.uid in self._rollouts for pool in pools())
        found = find_hold(rollout, self._rollouts.values(), complete=complete)
        if found is None:
            # Record its start now, since another worker may decide before the Deployment is written.
            self._rollouts[uid] = replace(rollout, change=None, cause=Cause.INSTALLATION, unfinished=True)
        return found

    def withdraw(self, uid: str) -> None:
        """Record that a pool's pods cannot be replaced, e.g. for an invalid spec, so that others do not wait for it."""
        rollout = self._rollouts.get(uid)
        if rollout is not None:
            self._rollouts[uid] = Rollout(rollout.pool)

    def forget(self, uid: str) -> None:
        """Discard a deleted pool."""
        self._rollouts.pop(uid, None)
        self._room_checks.pop(uid, None)

    async def has_room(self, pool: ServingPool, rendered: Object) -> bool | None:
        """Return True if a node has room for one more of the pool's pods; None if that cannot be determined.

        Nodes and pods are read at most every 30 s while pods are replaced, which is much cheaper than watching them.
        """
        uid, now = pool.metadata.uid, self._clock()
        at, known = self._room_checks.get(uid, (float("-inf"), None))
        if now - at < _ROOM_CHECK_SECONDS:
            return known
        try:
            found = await self._find_room(pool, rendered)
        except ClusterError:
            found = None
        self._room_checks[uid] = (now, found)
        return found

    async def _find_room(self, pool: ServingPool, rendered: Object) -> bool:
        requests = pod_requests(rendered["spec"]["template"]["spec"])
        scheduling, cluster = pool.spec.scheduling, self._context.cluster
        labels = ",".join(f"{key}={value}" for key, value in (scheduling.node_selector or {}).items())
        nodes = {node["metadata"]["name"]: node for node in await cluster.list("Node", labels=labels)}
        for name in candidates(nodes.values(), requests, scheduling.tolerations or ())[:_MAX_NODES]:
            used, _ = await cluster.list_at("Pod", fields=_UNFINISHED_PODS.format(name), keep=_requests_of)
            if has_room(nodes[name], requests, [pod["requests"] for pod in used]):
                return True
        return False


def _requests_of(pod: Object) -> Object:
    return {"requests": pod_requests(pod.get("spec") or {})}
