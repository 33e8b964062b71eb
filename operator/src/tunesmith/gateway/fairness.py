"""Turns of API keys at the pods: who of those that wait is next, and how much of a pod one key may use. Pure.

Next is the key that has got least for its weight: start-time fair queueing (P. Goyal, H. M. Vin, H. Cheng, 1996). A
part of each pod is kept for keys that use less than their share of it, while other keys than the busiest are active, so
that their requests start at once although one key floods the pod.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from tunesmith.contracts.apikey import Priority

if TYPE_CHECKING:
    from collections.abc import Callable

ACTIVE_SECONDS = 30.0
"""Time for which a part of a pod is kept for a key after its last request."""
KEPT_SHARE = 1 / 8
"""Fraction of a pod that is kept for keys that use less than their share."""
WEIGHTS = {Priority.HIGH: 4, Priority.NORMAL: 2, Priority.LOW: 1}
_MAX_FINISHED = 1024

Place = TypeVar("Place")


class Tenant(NamedTuple):
    """An API key.

    Attributes:
        name: name of the key.
        weight: its part of a busy pod, relative to those of the other keys.
    """

    name: str
    weight: int


@dataclass(slots=True)
class _Use:
    weight: int
    running: int = 0
    last_at: float = 0.0


class PodShares:
    """Sequences that a pod is generating for this gateway, by key.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._keys: OrderedDict[str, _Use] = OrderedDict()
        self._weights = 0
        self.running = 0

    def is_open_to(self, tenant: Tenant, places: int) -> bool:
        """Return True if a request of the key may start on the pod.

        A request may exceed the number of places by its own sequences, so that one with many does not wait forever.
        """
        if self.running >= places:
            return False
        self._forget_idle()
        if not self._keys or (len(self._keys) == 1 and tenant.name in self._keys):
            return True
        if self.running < places - math.ceil(places * KEPT_SHARE):
            return True
        use = self._keys.get(tenant.name)
        running = use.running if use is not None else 0
        # Its share with one more key at work: the one for which the rest is kept.
        weights = self._weights + (0 if running else tenant.weight) + WEIGHTS[Priority.NORMAL]
        return running * weights < places * tenant.weight

    def add(self, tenant: Tenant, count: int) -> None:
        """Change the number of running sequences of a key."""
        use = self._keys.get(tenant.name)
        if use is None:
            use = self._keys[tenant.name] = _Use(tenant.weight)
        self._keys.move_to_end(tenant.name)
        use.last_at = self._clock()
        before = use.weight if use.running else 0
        use.weight = tenant.weight
        use.running += count
        self.running += count
        self._weights += (use.weight if use.running else 0) - before

    def _forget_idle(self) -> None:
        """Forget keys whose last request ended long ago; a running one is moved to the end."""
        oldest_kept = self._clock() - ACTIVE_SECONDS
        for _ in range(len(self._keys)):
            name, use = next(iter(self._keys.items()))
            if use.last_at > oldest_kept:
                return
            if use.running:
                use.last_at = self._clock()
                self._keys.move_to_end(name)
            else:
                del self._keys[name]


@dataclass(slots=True)
class Waiter(Generic[Place]):
    """A request that waits for its turn.

    Attributes:
        tenant: its key.
        flow: key and model; requests of one flow start in the order of their arrival.
        cost: its sequences.
        take: takes a place and returns it, or returns None if none is open to the request.
        place: the place that it got.
        start: virtual time at which its turn is due.
    """

    tenant: Tenant
    flow: tuple[str, str]
    cost: int
    take: Callable[[], Place | None]
    place: Place | None = None
    start: float = field(default=0.0)


class Turns(Generic[Place]):
    """The requests that wait for the pods of one pool."""

    def __init__(self) -> None:
        self._now = 0.0
        self._finished: dict[str, float] = {}
        self._flows: dict[tuple[str, str], deque[Waiter[Place]]] = {}

    def has_waiting(self, flow: tuple[str, str]) -> bool:
        """Return True if an earlier request of the key for the model waits."""
        return flow in self._flows

    @property
    def is_empty(self) -> bool:
        """True if nothing waits."""
        return not self._flows

    def charge(self, tenant: Tenant, cost: int) -> float:
        """Count the sequences of a request of a key, and return the virtual time at which its turn is due."""
        start = max(self._now, self._finished.get(tenant.name, 0.0))
        if len(self._finished) >= _MAX_FINISHED:
            self._finished = {name: time for name, time in self._finished.items() if time > self._now}
        self._finished[tenant.name] = start + cost / tenant.weight
        return start

    def started(self, start: float) -> None:
        """Advance the virtual time to that of a request that started."""
        self._now = max(self._now, start)

    def enter(self, waiter: Waiter[Place]) -> None:
        """Let a request wait for its turn."""
        waiter.start = self.charge(waiter.tenant, waiter.cost)
        self._flows.setdefault(waiter.flow, deque()).append(waiter)

    def leave(self, waiter: Waiter[Place]) -> None:
        """Remove a request that has not got a place."""
        queue = self._flows.get(waiter.flow)
        if queue is not None and waiter in queue:
            queue.remove(waiter)
            if not queue:
                del self._flows[waiter.flow]

    def dispatch(self, places: int | None = None) -> list[Waiter[Place]]:
        """Give places to those that wait, in the order of their turns, and return those that got one.

        `places` is the number of places that became free; None: it is not known.
        """
        served: list[Waiter[Place]] = []
        blocked: set[tuple[str, str]] = set()
        while len(blocked) < len(self._flows) and (places is None or len(served) < places):
            heads = (queue[0] for flow, queue in self._flows.items() if flow not in blocked)
            waiter = min(heads, key=lambda head: head.start)
            waiter.place = waiter.take()
            if waiter.place is None:
                blocked.add(waiter.flow)
                continue
            self.leave(waiter)
            self.started(waiter.start)
            served.append(waiter)
        return served
