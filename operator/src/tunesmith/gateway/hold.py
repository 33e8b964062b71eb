"""Selection of a pod for a call, which waits while no usable pod holds its model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.gateway import errors
from tunesmith.gateway.broadcast import wait_for_event
from tunesmith.gateway.split import Points, in_order, session_point

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

    from tunesmith.gateway.backends import Backend, BackendTable
    from tunesmith.gateway.catalog import Catalog
    from tunesmith.gateway.demand import Demand
    from tunesmith.gateway.limits import Limits
    from tunesmith.gateway.request import Call

_RETRY_PAUSE_SECONDS = 0.25


class RequestHold:
    """Assignment of pods to calls, which wait until a pod holds their model.

    Args:
        catalog: the models; they are resolved again after each wait.
        backends: the pods.
        demand: counts of waiting calls.
        limits: bounds on the time and the number of waiting calls.
        clock: monotonic seconds.
    """

    def __init__(
        self, catalog: Catalog, backends: BackendTable, demand: Demand, limits: Limits, *, clock: Callable[[], float]
    ) -> None:
        self._catalog = catalog
        self._backends = backends
        self._demand = demand
        self._limits = limits
        self._clock = clock
        self._points = Points(catalog.exists)
        self._waiting = 0

    async def wait_for_pod(self, call: Call, refused: set[str]) -> tuple[Backend, str]:
        """Return a pod for a revision, and the revision's name in the engine.

        During a rollout, the revision is chosen by its weight, and another one with a weight answers while no usable
        pod holds the chosen one. Otherwise it is the newest one that any usable pod holds.

        Args:
            call: its model is resolved again while it waits, since revisions change.
            refused: UIDs of pods that did not accept it; cleared after a pause, so that they are tried again.

        Raises:
            ApiError: the model cannot be called, no pod holds it in time, or too many calls wait.
            ClientDisconnectedError: the client closed its connection.
        """
        while True:
            changed = self._backends.changed.next()
            chosen = self._pick(call, refused)
            if chosen is not None:
                return chosen
            model = call.model
            if not model.deployed and not refused:
                raise errors.model_not_found(model.engine_names[0])
            if model.not_ready is not None:
                raise errors.model_not_ready(model.id, model.not_ready)
            hold_seconds = self._hold_seconds(call)
            remaining = call.arrived + hold_seconds - self._clock()
            if remaining <= 0:
                raise errors.no_pod_ready(model.id, hold_seconds)
            await self._wait(call, changed, min(remaining, _RETRY_PAUSE_SECONDS) if refused else remaining)
            refused.clear()
            call.model = self._catalog.resolve(call.body.model, call.key)

    def finds_pod(self, call: Call) -> bool:
        """Return True if a call could be sent to a pod now."""
        return self._pick(call, set()) is not None

    def _hold_seconds(self, call: Call) -> float:
        """Return the time for which a call may wait: longer if an engine of its pool may be starting."""
        pool = call.model.pool
        if pool is None or not self._backends.has_pods(pool):
            return self._limits.hold_seconds
        seconds = self._catalog.hold_seconds(pool)
        return self._limits.hold_seconds if seconds is None else seconds

    def _pick(self, call: Call, refused: set[str]) -> tuple[Backend, str] | None:
        model = call.model
        if model.pool is None:
            return None
        found: list[tuple[Backend, str]] = []
        for engine_name in self._in_order(call):
            backend = self._backends.pick(
                model.pool,
                engine_name,
                is_base=model.is_base,
                needs_slot=not model.is_whole,
                excluded=refused | {call.lost_on},
                weight=call.body.sequences,
            )
            if backend is not None and (model.weights or not model.is_whole):
                return backend, engine_name
            if backend is not None:
                found.append((backend, engine_name))
        # While the pods of a whole model are replaced, the first new one must not get all requests.
        return min(found, key=lambda entry: entry[0].in_flight, default=None)

    def _in_order(self, call: Call) -> Sequence[str]:
        """Return the revisions that may answer a call, the preferred one first."""
        model = call.model
        if not model.weights:
            return model.engine_names
        if call.point is None:
            session = call.session()
            call.point = session_point(session, model.engine_names[0]) if session else self._points.next(model.id)
        return in_order(model.engine_names, model.weights, call.point)

    async def _wait(self, call: Call, changed: asyncio.Event, seconds: float) -> None:
        """Hold a call until a change or for at most `seconds`.

        Raises:
            ApiError: too many calls wait already.
            ClientDisconnectedError: the client closed its connection.
        """
        if self._waiting >= self._limits.max_held_requests:
            raise errors.too_many_waiting(call.model.id)
        model, until = call.model.id, self._clock() + seconds
        self._waiting += 1
        self._demand.add_waiting(model, call.body.sequences)
        try:
            while not changed.is_set() and (remaining := until - self._clock()) > 0:
                if call.events is None:
                    await wait_for_event(changed, remaining)
                else:
                    await call.events.comment_if_due()
                    await wait_for_event(changed, min(remaining, call.events.until_comment()))
        finally:
            self._waiting -= 1
            self._demand.add_waiting(model, -call.body.sequences)
