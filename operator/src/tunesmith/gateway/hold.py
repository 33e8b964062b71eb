"""Selection of a pod for a call, which waits while no usable pod holds its model or has a place for its key."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from tunesmith.gateway import errors
from tunesmith.gateway.broadcast import wait_for_event
from tunesmith.gateway.fairness import WEIGHTS, PodShares, Tenant, Turns, Waiter
from tunesmith.gateway.split import Points, in_order, session_point

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tunesmith.gateway.backends import Backend, BackendTable
    from tunesmith.gateway.catalog import Catalog, PoolKey
    from tunesmith.gateway.demand import Demand
    from tunesmith.gateway.limits import Limits
    from tunesmith.gateway.request import Call

_RETRY_PAUSE_SECONDS = 0.25
_RETRY_SECONDS = 5
_NO_POOL = ("", "")


@dataclass(slots=True)
class _Held(Waiter["tuple[Backend, str]"]):
    """A waiting call.

    Attributes:
        woken: set when it got a place, or when the pods changed.
        turns: the queue in which it is.
    """

    woken: asyncio.Event = field(default_factory=asyncio.Event)
    turns: Turns[tuple[Backend, str]] | None = None


class RequestHold:
    """Assignment of pods to calls, which wait until a pod holds their model and their key is next.

    Args:
        catalog: the models; they are resolved again after each wait.
        backends: the pods.
        demand: counts of waiting calls.
        limits: bounds on the time and the number of waiting calls.
        replicas: number of gateways; each uses its part of a pod.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        catalog: Catalog,
        backends: BackendTable,
        demand: Demand,
        limits: Limits,
        *,
        replicas: int,
        clock: Callable[[], float],
    ) -> None:
        self._catalog = catalog
        self._backends = backends
        self._demand = demand
        self._limits = limits
        self._replicas = replicas
        self._clock = clock
        self._points = Points(catalog.exists)
        self._waiting: dict[int, _Held] = {}
        self._waiting_of_key: Counter[str] = Counter()
        self._turns: dict[PoolKey, Turns[tuple[Backend, str]]] = {}
        self._shares: WeakKeyDictionary[Backend, PodShares] = WeakKeyDictionary()
        backends.changed.call(self._pods_changed)

    async def wait_for_pod(self, call: Call, refused: set[str]) -> tuple[Backend, str]:
        """Return a pod for a revision, and the revision's name in the engine.

        During a rollout, the revision is chosen by its weight, and another one with a weight answers while no usable
        pod holds the chosen one. Otherwise it is the newest one that any usable pod holds. The call has a place on the
        pod until `release`.

        Args:
            call: its model is resolved again while it waits, since revisions change.
            refused: UIDs of pods that did not accept it; cleared after a pause, so that they are tried again.

        Raises:
            ApiError: the model cannot be called, no pod holds it or has a place in time, or too many calls wait.
            ClientDisconnectedError: the client closed its connection.
        """
        self.release(call)
        tenant, sequences = Tenant(call.key.name, WEIGHTS[call.key.priority]), call.body.sequences
        flow, turns = (tenant.name, call.model.id), self._turns_of(call)
        if not turns.has_waiting(flow) and (chosen := self._take(call, refused)) is not None:
            turns.started(turns.charge(tenant, sequences))
            return chosen
        held = _Held(tenant, flow, sequences, lambda: self._take_again(call, refused))
        try:
            while held.place is None:
                seconds = self._seconds_left(call, refused)
                self._enter(call, held)
                await self._wait(call, held, min(seconds, _RETRY_PAUSE_SECONDS) if refused else seconds)
                if held.place is None:
                    refused.clear()
                    call.model = self._catalog.resolve(call.body.model, call.key)
                    self._wake(self._turns_of(call).dispatch())
            return held.place
        finally:
            self._leave(held)

    def release(self, call: Call) -> None:
        """Give back the place of a call, if it has one, to those that wait."""
        if call.place is None:
            return
        backend, tenant, sequences = call.place
        call.place = None
        self._shares_of(backend).add(tenant, -sequences)
        turns = self._turns.get(backend.pod.pool.key)
        if turns is not None and not turns.is_empty:
            self._wake(turns.dispatch(sequences))

    def finds_pod(self, call: Call) -> bool:
        """Return True if a pod other than the one that lost the call holds its model."""
        return self._pick(call, set()) is not None

    def _take(self, call: Call, refused: set[str]) -> tuple[Backend, str] | None:
        """Return a pod that is open to the call's key, with a place on it."""
        pool = call.model.pool
        if pool is None:
            return None
        tenant = Tenant(call.key.name, WEIGHTS[call.key.priority])
        places = math.ceil((self._catalog.max_sequences(pool) or self._limits.max_running_per_pod) / self._replicas)
        closed = {
            backend.pod.uid
            for backend in self._backends.in_pool(pool)
            if not self._shares_of(backend).is_open_to(tenant, places)
        }
        chosen = self._pick(call, refused, closed)
        if chosen is not None:
            self._shares_of(chosen[0]).add(tenant, call.body.sequences)
            call.place = (chosen[0], tenant, call.body.sequences)
        return chosen

    def _take_again(self, call: Call, refused: set[str]) -> tuple[Backend, str] | None:
        """Take a place for a call that has waited."""
        try:
            call.model = self._catalog.resolve(call.body.model, call.key)
        except errors.ApiError:
            return None  # the call itself fails when it is woken
        return self._take(call, refused)

    def _seconds_left(self, call: Call, refused: set[str]) -> float:
        """Return the time for which a call without a place may still wait.

        Raises:
            ApiError: none, or the model cannot be called.
        """
        model = call.model
        if not model.deployed and not refused:
            raise errors.model_not_found(model.engine_names[0])
        if model.not_ready is not None:
            raise errors.model_not_ready(model.id, model.not_ready)
        busy = self._pick(call, refused) is not None
        seconds = self._limits.queue_seconds if busy else self._hold_seconds(call)
        left = call.arrived + seconds - self._clock()
        if left <= 0:
            raise (
                errors.no_turn(model.id, seconds)
                if busy
                else errors.no_pod_ready(model.id, seconds, self._retry_seconds(call))
            )
        return left

    def _hold_seconds(self, call: Call) -> float:
        """Return the time for which a call may wait: longer if an engine of its pool may be starting."""
        pool = call.model.pool
        if pool is None:
            return self._limits.hold_seconds
        start = self._catalog.start_of(pool)
        if start.hold_seconds is None or not (start.from_zero or self._backends.has_pods(pool)):
            return self._limits.hold_seconds
        return start.hold_seconds

    def _retry_seconds(self, call: Call) -> int:
        """Return the time after which a client should try again: the pool's measured start, if it has no pod."""
        pool = call.model.pool
        if pool is None or self._backends.has_ready_pods(pool):
            return _RETRY_SECONDS
        return max(_RETRY_SECONDS, math.ceil(self._catalog.start_of(pool).start_seconds or 0))

    def _pick(self, call: Call, refused: set[str], closed: set[str] | None = None) -> tuple[Backend, str] | None:
        """Return a pod and the revision that it holds; closed pods do not change the choice of the revision."""
        found: list[tuple[Backend, str]] = []
        for engine_name in self._in_order(call):
            backend = self._pick_for(call, engine_name, refused | {call.lost_on})
            if backend is None:
                continue
            if closed and backend.pod.uid in closed:
                backend = self._pick_for(call, engine_name, refused | {call.lost_on} | closed)
            if call.model.weights or not call.model.is_whole:
                return (backend, engine_name) if backend is not None else None
            if backend is not None:
                found.append((backend, engine_name))
        # While the pods of a whole model are replaced, the first new one must not get all requests.
        return min(found, key=lambda entry: entry[0].in_flight, default=None)

    def _pick_for(self, call: Call, engine_name: str, excluded: set[str]) -> Backend | None:
        model = call.model
        if model.pool is None:
            return None
        return self._backends.pick(
            model.pool,
            engine_name,
            is_base=model.is_base,
            needs_slot=not model.is_whole,
            excluded=excluded,
            weight=call.body.sequences,
            conversation=call.conversation,
        )

    def _in_order(self, call: Call) -> Sequence[str]:
        """Return the revisions that may answer a call, the preferred one first."""
        model = call.model
        if not model.weights:
            return model.engine_names
        if call.point is None:
            session = call.session()
            call.point = session_point(session, model.engine_names[0]) if session else self._points.next(model.id)
        return in_order(model.engine_names, model.weights, call.point)

    def _enter(self, call: Call, held: _Held) -> None:
        """Put a call into the queue of its pool.

        Raises:
            ApiError: too many calls wait already.
        """
        turns = self._turns_of(call)
        if held.turns is turns:
            return
        if held.turns is None:
            self._check_waiting(call, held.tenant.name)
            self._waiting[id(held)] = held
            self._waiting_of_key[held.tenant.name] += 1
        else:
            held.turns.leave(held)
        held.turns = turns
        turns.enter(held)

    def _check_waiting(self, call: Call, key: str) -> None:
        """Raise if too many calls wait; a key may have half of what the other keys leave.

        Raises:
            ApiError: 429 if the key has more waiting calls than any other, otherwise 503.
        """
        of_key = self._waiting_of_key[key]
        limit = math.ceil((self._limits.max_held_requests - len(self._waiting) + of_key) / 2)
        if of_key < limit:
            return
        heaviest = max((count for name, count in self._waiting_of_key.items() if name != key), default=0)
        if of_key > heaviest:
            raise errors.key_waits_too_often(of_key)
        raise errors.too_many_waiting(call.model.id)

    def _leave(self, held: _Held) -> None:
        if held.turns is None:
            return
        held.turns.leave(held)
        del self._waiting[id(held)]
        key = held.tenant.name
        self._waiting_of_key[key] -= 1
        if not self._waiting_of_key[key]:
            del self._waiting_of_key[key]

    async def _wait(self, call: Call, held: _Held, seconds: float) -> None:
        """Hold a call until it has a place, the pods change, or for at most `seconds`.

        Raises:
            ClientDisconnectedError: the client closed its connection.
        """
        model, until = call.model.id, self._clock() + seconds
        self._demand.add_waiting(model, call.body.sequences)
        try:
            while not held.woken.is_set() and (remaining := until - self._clock()) > 0:
                if call.events is None:
                    await wait_for_event(held.woken, remaining)
                else:
                    await call.events.comment_if_due()
                    await wait_for_event(held.woken, min(remaining, call.events.until_comment()))
            held.woken.clear()
        finally:
            self._demand.add_waiting(model, -call.body.sequences)

    def _pods_changed(self) -> None:
        """Give places to those that wait, and wake the others: their models may have changed."""
        for turns in self._turns.values():
            turns.dispatch()
        for held in self._waiting.values():
            held.woken.set()

    def _wake(self, served: list[Waiter[tuple[Backend, str]]]) -> None:
        for held in served:
            if isinstance(held, _Held):
                held.woken.set()

    def _turns_of(self, call: Call) -> Turns[tuple[Backend, str]]:
        return self._turns.setdefault(call.model.pool or _NO_POOL, Turns())

    def _shares_of(self, backend: Backend) -> PodShares:
        shares = self._shares.get(backend)
        if shares is None:
            shares = self._shares[backend] = PodShares(self._clock)
        return shares
