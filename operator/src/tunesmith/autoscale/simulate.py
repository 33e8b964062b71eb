"""Simulation of autoscaling on a trace of requests, with the operator's own decisions. Pure: time is simulated.

The model: a pod serves its first request `start_seconds` after it was created, and an adapter `load_seconds` after it
was placed on a ready pod. A pod computes at most `concurrency` requests at once, and each takes the time that the trace
says. Requests for at most `slots` adapters compute on a pod at once. Further requests wait, first come, first served.
A pod that is removed finishes its requests first. GPU-hours count from the creation of a pod to its end.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from tunesmith.autoscale.demand import Demand, demand_of
from tunesmith.contracts.load import NEGLIGIBLE_RATE, Load

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_READY, _END, _LEAVE = range(3)
"""Kinds of events, in the order in which events of the same time happen; decisions are before, arrivals after them."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of the trace. `at`: seconds since the trace's start. `seconds`: time that it takes on a pod."""

    at: float
    model: str
    seconds: float


@dataclass(frozen=True)
class Timing:
    """Times and sizes of the simulated pool.

    Attributes:
        start_seconds: time from the creation of a pod until it serves.
        load_seconds: time from the placement of an adapter on a ready pod until it answers.
        concurrency: requests that a pod computes at once.
        capacity: adapters that a pod holds.
        slots: adapters that compute on a pod at once.
        gpus: GPUs of a pod; GPU-hours of a pool without GPUs are pod-hours.
    """

    start_seconds: float = 60.0
    load_seconds: float = 1.0
    concurrency: int = 32
    capacity: int = 64
    slots: int = 8
    gpus: int = 1


@dataclass(frozen=True)
class Outcome:
    """Result of a simulation.

    Attributes:
        gpu_hours: sum over all pods.
        waits: seconds that each request waited for a pod, sorted.
        worst: highest wait in seconds of the requests that arrived in each minute.
        unserved: requests that still waited at the end.
        sizes: time in seconds and number of pods, at each change.
        changes: number of changes of the desired number of pods.
    """

    gpu_hours: float
    waits: Sequence[float]
    worst: Sequence[float]
    unserved: int
    sizes: Sequence[tuple[float, int]]
    changes: int

    def wait(self, share: float) -> float:
        """Return the wait in seconds below which a share of the requests, from 0 to 1, is; 0 without requests."""
        return self.waits[min(len(self.waits) - 1, int(share * len(self.waits)))] if self.waits else 0.0


@dataclass(eq=False, slots=True)
class _Pod:
    number: int
    created: float
    ready_at: float
    running: int = 0
    leaving: bool = False
    serves_until: float = float("inf")
    """Time at which a pod that is removed stops accepting requests."""
    adapters: dict[str, float] = field(default_factory=dict)
    """Times from which its adapters answer."""
    active: dict[str, int] = field(default_factory=dict)
    """Running requests by adapter."""


class State:
    """What a policy may read: the demand and the pods at one moment."""

    def __init__(self, models: Sequence[str]) -> None:
        self.pods: list[_Pod] = []
        """Pods that are not leaving."""
        self.running: Counter[str] = Counter()
        self.waiting: Counter[str] = Counter()
        self.requests = 0
        """Requests running or waiting, over all models."""
        self._loads = {model: Load() for model in models}
        self._arriving: set[str] = set()
        self._arrived: Counter[str] = Counter()

    def demand(self, now: float, model: str) -> Demand:
        """Return the demand for a model, as a gateway measures it."""
        load = self._loads[model]
        rate = load.rate(now)
        return demand_of(
            self.running[model],
            self.waiting[model],
            rate if rate >= NEGLIGIBLE_RATE else 0.0,
            load.service_seconds,
        )

    def total(self, now: float) -> Demand:
        """Return the demand for all models."""
        total = Demand(complete=True)
        for model in list(self._arriving):
            demand = self.demand(now, model)
            total += demand
            if not demand.requests and not demand.offered and self._loads[model].rate(now) < NEGLIGIBLE_RATE:
                self._arriving.discard(model)
        return total

    def take_arrivals(self) -> Mapping[str, int]:
        """Return the requests that arrived since the last call, by model."""
        arrived, self._arrived = self._arrived, Counter()
        return arrived

    def ready_pods(self, now: float) -> int:
        """Return the number of pods that serve."""
        return sum(1 for pod in self.pods if pod.ready_at <= now)

    def arrive(self, now: float, model: str) -> None:
        """Record a new request."""
        self._loads[model].arrive(1, now)
        self._arriving.add(model)
        self._arrived[model] += 1
        self.waiting[model] += 1
        self.requests += 1

    def start(self, model: str) -> None:
        """Record that a pod accepted a request."""
        self.waiting[model] -= 1
        self.running[model] += 1

    def finish(self, now: float, model: str, seconds: float) -> None:
        """Record that a pod finished a request."""
        self._loads[model].finish(1, seconds, now)
        self.running[model] -= 1
        self.requests -= 1


class Policy(Protocol):
    """Decision about sizes, taken every second."""

    def sizes(self, now: float, state: State) -> tuple[int, Mapping[str, int]]:
        """Return the number of pods and the number of copies of each model."""

    def wake(self, now: float, model: str, state: State) -> tuple[int, Mapping[str, int]] | None:
        """Return new sizes on the first request for a model without copies; None if they wait for the next second."""


def simulate(trace: Sequence[Arrival], policy: Policy, timing: Timing, seconds: float | None = None) -> Outcome:
    """Return what a policy does with a trace.

    Args:
        trace: requests, sorted by time.
        policy: takes the decisions.
        timing: times and sizes of the pool.
        seconds: length of the simulation; None: until a minute after the last request.
    """
    run = _Run(sorted({arrival.model for arrival in trace}), policy, timing)
    end = seconds if seconds is not None else (trace[-1].at + 60.0 if trace else 0.0)
    return run.outcome(trace, end)


def smallest(
    trace: Sequence[Arrival],
    policy_of: Callable[[int], Policy],
    timing: Timing,
    wait: float,
    unserved: int,
    most: int,
) -> tuple[int, Outcome] | None:
    """Return the smallest size with which requests wait no longer, and its outcome; None if there is none.

    Args:
        trace: requests, sorted by time.
        policy_of: returns the policy of a size.
        timing: times and sizes of the pool.
        wait: highest 99th percentile of the waits, in seconds.
        unserved: highest number of requests that still wait at the end.
        most: highest size.
    """
    low, high, found = 1, most, None
    while low <= high:
        size = (low + high) // 2
        outcome = simulate(trace, policy_of(size), timing)
        if outcome.unserved <= unserved and outcome.wait(0.99) <= wait:
            found, high = (size, outcome), size - 1
        else:
            low = size + 1
    return found


class _Run:
    def __init__(self, models: Sequence[str], policy: Policy, timing: Timing) -> None:
        self._policy, self._timing = policy, timing
        self._state = State(models)
        self._events: list[tuple[float, int, int, object]] = []
        self._count = 0
        self._queues: dict[str, deque[Arrival]] = {}
        """Waiting requests; models without any have no entry."""
        self._holders: dict[str, set[_Pod]] = defaultdict(set)
        self._leaving: list[_Pod] = []
        self._applied: tuple[Mapping[str, int] | None, int] = (None, -1)
        """The latest copies, and the version of the pods on which they are placed."""
        self._version = 0
        self._waits: list[float] = []
        self._worst: dict[int, float] = {}
        self._sizes: list[tuple[float, int]] = []
        self._desired, self._changes, self._pod_seconds, self._number = -1, 0, 0.0, 0

    def outcome(self, trace: Sequence[Arrival], end: float) -> Outcome:
        arrivals, due = iter(trace), 0
        arrival = next(arrivals, None)
        while True:
            event = self._events[0][0] if self._events else end
            now = min(event, float(due), arrival.at if arrival is not None else end)
            if now >= end:
                break
            if due <= now:
                self._apply(now, self._policy.sizes(now, self._state))
                due += 1
            elif event <= now:
                _, kind, _, what = heapq.heappop(self._events)
                self._handle(now, kind, what)
            elif arrival is not None:
                self._arrive(now, arrival)
                arrival = next(arrivals, None)
        for pod in (*self._state.pods, *self._leaving):
            self._pod_seconds += end - pod.created
        unserved = sum(len(queue) for queue in self._queues.values())
        hours = self._pod_seconds * max(1, self._timing.gpus) / 3600
        return Outcome(hours, sorted(self._waits), self._worst_waits(), unserved, self._sizes, self._changes)

    def _worst_waits(self) -> list[float]:
        return [self._worst.get(minute, 0.0) for minute in range(max(self._worst, default=-1) + 1)]

    def _push(self, at: float, kind: int, what: object) -> None:
        self._count += 1
        heapq.heappush(self._events, (at, kind, self._count, what))

    def _handle(self, now: float, kind: int, what: object) -> None:
        if kind == _END and isinstance(what, tuple):
            pod, model, seconds = what
            pod.running -= 1
            pod.active[model] -= 1
            if not pod.active[model]:
                del pod.active[model]
            self._state.finish(now, model, seconds)
            if pod.serves_until <= now:
                self._end_if_empty(now, pod)
            else:
                self._dispatch_oldest(now, pod)
        elif kind == _LEAVE and isinstance(what, _Pod):
            for model in what.adapters:
                self._holders[model].discard(what)
            self._end_if_empty(now, what)
        elif kind == _READY and isinstance(what, _Pod):
            self._dispatch_oldest(now, what)

    def _end_if_empty(self, now: float, pod: _Pod) -> None:
        if not pod.running and pod in self._leaving:
            self._leaving.remove(pod)
            self._pod_seconds += now - pod.created

    def _arrive(self, now: float, arrival: Arrival) -> None:
        model = arrival.model
        self._state.arrive(now, model)
        self._queues.setdefault(model, deque()).append(arrival)
        if not self._holders[model]:
            woken = self._policy.wake(now, model, self._state)
            if woken is not None:
                self._apply(now, woken)
        self._dispatch(now, model)

    def _apply(self, now: float, sizes: tuple[int, Mapping[str, int]]) -> None:
        pods, copies = sizes
        if pods != self._desired:
            self._changes += self._desired >= 0
            self._desired = pods
        state = self._state
        while len(state.pods) < pods:
            self._number += 1
            pod = _Pod(self._number, now, now + self._timing.start_seconds)
            state.pods.append(pod)
            self._version += 1
        while len(state.pods) > pods:
            self._remove(now)
        if not self._sizes or self._sizes[-1][1] != len(state.pods):
            self._sizes.append((now, len(state.pods)))
        before, version = self._applied
        if copies is before and version == self._version:
            return
        for model, count in copies.items():
            if version != self._version or before is None or before.get(model) != count:
                self._place(now, model, min(count, len(state.pods)))
        self._applied = (copies, self._version)

    def _remove(self, now: float) -> None:
        """Remove a pod that is not ready, otherwise the one with the fewest adapters, otherwise the newest.

        A pod that serves continues to until its adapters had the time to load on the others.
        """
        pod = min(self._state.pods, key=lambda pod: (pod.ready_at <= now, len(pod.adapters), -pod.number))
        self._state.pods.remove(pod)
        self._version += 1
        pod.leaving = True
        self._leaving.append(pod)
        pod.serves_until = now + self._timing.load_seconds if pod.ready_at <= now else now
        self._push(pod.serves_until, _LEAVE, pod)

    def _place(self, now: float, model: str, count: int) -> None:
        holders = self._holders[model]
        staying = [pod for pod in holders if not pod.leaving]
        while len(staying) > count:
            pod = max(staying, key=lambda pod: (len(pod.adapters), pod.number))
            staying.remove(pod)
            holders.discard(pod)
            del pod.adapters[model]
        while len(staying) < count:
            free = [pod for pod in self._state.pods if pod not in holders]
            pod = min(free, key=lambda pod: (len(pod.adapters) >= self._timing.capacity, len(pod.adapters), pod.number))
            staying.append(pod)
            holders.add(pod)
            pod.adapters[model] = max(now, pod.ready_at) + self._timing.load_seconds
            self._push(pod.adapters[model], _READY, pod)

    def _room(self, pod: _Pod, model: str) -> bool:
        return pod.running < self._timing.concurrency and (model in pod.active or len(pod.active) < self._timing.slots)

    def _dispatch(self, now: float, model: str) -> None:
        queue = self._queues.get(model)
        while queue:
            pods = [
                pod
                for pod in self._holders[model]
                if pod.adapters[model] <= now and now < pod.serves_until and self._room(pod, model)
            ]
            if not pods:
                return
            # As the gateway does, prefer a pod on which the adapter is active already.
            pod = min(pods, key=lambda pod: (model not in pod.active, pod.running, pod.number))
            self._start(now, pod, queue.popleft())
        self._queues.pop(model, None)

    def _dispatch_oldest(self, now: float, pod: _Pod) -> None:
        """Start the oldest requests for the adapters of a pod, as far as it has room."""
        while self._queues and pod.running < self._timing.concurrency:
            ready = [
                model
                for model in self._queues
                if pod.adapters.get(model, float("inf")) <= now and self._room(pod, model)
            ]
            if not ready:
                return
            model = min(ready, key=lambda name: self._queues[name][0].at)
            queue = self._queues[model]
            self._start(now, pod, queue.popleft())
            if not queue:
                del self._queues[model]

    def _start(self, now: float, pod: _Pod, arrival: Arrival) -> None:
        self._waits.append(now - arrival.at)
        minute = int(arrival.at // 60)
        self._worst[minute] = max(self._worst.get(minute, 0.0), now - arrival.at)
        pod.running += 1
        pod.active[arrival.model] = pod.active.get(arrival.model, 0) + 1
        self._state.start(arrival.model)
        self._push(now + arrival.seconds, _END, (pod, arrival.model, arrival.seconds))
