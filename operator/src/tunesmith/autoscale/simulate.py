"""Simulation of autoscaling on a trace of requests, with the operator's own decisions. Pure: time is simulated.

The model: a pod serves its first request `start_seconds` after it was created, and an adapter `load_seconds` after it
was placed on a ready pod. A pod computes at most `concurrency` requests at once, and each takes the time that the trace
says. Further requests wait, first come, first served. A pod that is removed finishes its requests first. GPU-hours
count from the creation of a pod to its end.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from dataclasses import dataclass, field
from datetime import timedelta
from math import ceil
from typing import TYPE_CHECKING, Protocol

from tunesmith.autoscale.decide import decide_copies, decide_pods, pods_for_copies
from tunesmith.autoscale.schedule import minimum
from tunesmith.autoscale.window import Sample, Window

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime

    from tunesmith.api.autoscaling import Autoscaling

IDLE_TICK_SECONDS = 9.0
"""Time between two decisions about an adapter that is at its minimum and has no requests, as in the operator."""
HPA_SECONDS = 15.0
HPA_TOLERANCE = 0.1
HPA_DOWN_SECONDS = 300.0
"""Defaults of Kubernetes' HorizontalPodAutoscaler: period, tolerance and stabilisation window for scaling down."""
_DECIDE, _READY, _END, _ARRIVE = range(4)
"""Kinds of events, in the order in which events of the same time happen."""


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
        unserved: requests that still waited at the end.
        sizes: time in seconds and number of pods, at each change.
        changes: number of changes of the desired number of pods.
    """

    gpu_hours: float
    waits: Sequence[float]
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
    adapters: dict[str, float] = field(default_factory=dict)
    """Times from which its adapters answer."""


class State:
    """What a policy may read: the demand and the pods at one moment."""

    def __init__(self, models: Sequence[str]) -> None:
        self.demand: dict[str, int] = dict.fromkeys(models, 0)
        """Requests running or waiting."""
        self.pods: list[_Pod] = []
        """Pods that are not leaving."""

    @property
    def requests(self) -> int:
        """Requests running or waiting, over all models."""
        return sum(self.demand.values())

    def ready_pods(self, now: float) -> int:
        """Return the number of pods that serve."""
        return sum(1 for pod in self.pods if pod.ready_at <= now)


class Policy(Protocol):
    """Decision about sizes, taken every second."""

    def sizes(self, now: float, state: State) -> tuple[int, Mapping[str, int]]:
        """Return the number of pods and the number of copies of each model."""

    def wake(self, now: float, model: str, state: State) -> tuple[int, Mapping[str, int]] | None:
        """Return new sizes on the first request for a model without copies; None if they wait for the next second."""


class Tunesmith:
    """The operator's decisions: copies by adapter, then pods.

    Args:
        start: time of the trace's start, for schedules.
        pool: rule of the pool.
        adapters: rules by model.
        timing: capacity and slots of the pods.
    """

    def __init__(self, start: datetime, pool: Autoscaling, adapters: Mapping[str, Autoscaling], timing: Timing) -> None:
        self._start, self._pool, self._rules, self._timing = start, pool, adapters, timing
        self._windows = {model: Window() for model in adapters}
        self._window = Window()
        self._copies = {model: minimum(rule, start).replicas for model, rule in adapters.items()}
        self._due = dict.fromkeys(adapters, 0.0)
        self._pods: int | None = None

    def sizes(self, now: float, state: State) -> tuple[int, Mapping[str, int]]:
        """Decide about the adapters that are due, and about the pool."""
        for model, due in self._due.items():
            if due <= now:
                self._decide(now, model, state)
        return self._decided(now, state)

    def wake(self, now: float, model: str, state: State) -> tuple[int, Mapping[str, int]]:
        """Decide about one adapter at once, and about the pool."""
        self._decide(now, model, state)
        return self._decided(now, state)

    def _decide(self, now: float, model: str, state: State) -> None:
        rule, window, requests = self._rules[model], self._windows[model], state.demand[model]
        low = minimum(rule, self._clock(now))
        if now > window.newest.at:
            window.add(Sample(now, requests), rule.scale_down_delay_seconds)
        self._copies[model] = decide_copies(window, self._copies[model], rule, low).replicas
        idle = not requests and self._copies[model] <= low.replicas
        self._due[model] = now + (IDLE_TICK_SECONDS if idle else 1.0)

    def _decided(self, now: float, state: State) -> tuple[int, Mapping[str, int]]:
        floor, why = pods_for_copies(self._copies, self._timing.capacity)
        active = sum(1 for count in state.demand.values() if count)
        if now > self._window.newest.at:
            sample = Sample(now, state.requests, floor=floor, active=active)
            self._window.add(sample, self._pool.scale_down_delay_seconds)
        low = minimum(self._pool, self._clock(now))
        self._pods = decide_pods(self._window, self._pods, self._pool, low, why, self._timing.slots).replicas
        return self._pods, self._copies

    def _clock(self, now: float) -> datetime:
        return self._start + timedelta(seconds=now)


class Fixed:
    """A pool of one size, whose pods all hold every adapter."""

    def __init__(self, pods: int, models: Iterable[str]) -> None:
        self._sizes = pods, dict.fromkeys(models, pods)

    def sizes(self, now: float, state: State) -> tuple[int, Mapping[str, int]]:  # noqa: ARG002 - of the protocol
        """Return the same sizes always."""
        return self._sizes

    def wake(self, now: float, model: str, state: State) -> None:
        """Wait for the next second."""


class Hpa:
    """One HorizontalPodAutoscaler on the pool's requests per pod, whose pods all hold every adapter."""

    def __init__(self, target: float, lowest: int, highest: int, models: Iterable[str]) -> None:
        self._target, self._lowest, self._highest = target, max(1, lowest), highest
        self._models = tuple(models)
        self._pods, self._due = self._lowest, 0.0
        self._wanted: deque[tuple[float, int]] = deque()

    def sizes(self, now: float, state: State) -> tuple[int, Mapping[str, int]]:
        """Decide every 15 s."""
        if now >= self._due:
            self._due = now + HPA_SECONDS
            ready = max(1, state.ready_pods(now))
            ratio = state.requests / ready / self._target
            wanted = self._pods if abs(ratio - 1) <= HPA_TOLERANCE else ceil(ratio * ready)
            self._wanted.append((now, wanted))
            while self._wanted[0][0] < now - HPA_DOWN_SECONDS:
                self._wanted.popleft()
            # Growth by at most 4 pods or 100 % per period; shrinking to the highest wish of the window.
            grown = min(wanted, max(self._pods + 4, 2 * self._pods))
            size = grown if wanted > self._pods else max(value for _, value in self._wanted)
            self._pods = max(self._lowest, min(self._highest, size if wanted > self._pods else min(self._pods, size)))
        return self._pods, dict.fromkeys(self._models, self._pods)

    def wake(self, now: float, model: str, state: State) -> None:
        """Wait for the next second."""


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


class _Run:
    def __init__(self, models: Sequence[str], policy: Policy, timing: Timing) -> None:
        self._policy, self._timing = policy, timing
        self._state = State(models)
        self._copies: Mapping[str, int] = {}
        self._events: list[tuple[float, int, int, object]] = []
        self._count = 0
        self._waiting: dict[str, deque[Arrival]] = defaultdict(deque)
        self._holders: dict[str, set[_Pod]] = defaultdict(set)
        self._leaving: list[_Pod] = []
        self._waits: list[float] = []
        self._sizes: list[tuple[float, int]] = []
        self._desired, self._changes, self._pod_seconds, self._number = -1, 0, 0.0, 0

    def outcome(self, trace: Sequence[Arrival], end: float) -> Outcome:
        for second in range(ceil(end)):
            self._push(float(second), _DECIDE, None)
        for arrival in trace:
            self._push(arrival.at, _ARRIVE, arrival)
        now = 0.0
        while self._events:
            now, kind, _, what = heapq.heappop(self._events)
            if now > end:
                break
            self._handle(now, kind, what)
        for pod in (*self._state.pods, *self._leaving):
            self._pod_seconds += end - pod.created
        unserved = sum(len(queue) for queue in self._waiting.values())
        hours = self._pod_seconds * max(1, self._timing.gpus) / 3600
        return Outcome(hours, sorted(self._waits), unserved, self._sizes, self._changes)

    def _push(self, at: float, kind: int, what: object) -> None:
        self._count += 1
        heapq.heappush(self._events, (at, kind, self._count, what))

    def _handle(self, now: float, kind: int, what: object) -> None:
        if kind == _DECIDE:
            self._apply(now, self._policy.sizes(now, self._state))
        elif kind == _ARRIVE and isinstance(what, Arrival):
            self._state.demand[what.model] += 1
            self._waiting[what.model].append(what)
            if not self._holders[what.model]:
                woken = self._policy.wake(now, what.model, self._state)
                if woken is not None:
                    self._apply(now, woken)
            self._dispatch(now, what.model)
        elif kind == _END and isinstance(what, tuple):
            pod, model = what
            pod.running -= 1
            self._state.demand[model] -= 1
            if pod.leaving and not pod.running:
                self._leaving.remove(pod)
                self._pod_seconds += now - pod.created
            elif not pod.leaving:
                self._dispatch_oldest(now, pod)
        elif kind == _READY and isinstance(what, _Pod) and not what.leaving:
            self._dispatch_oldest(now, what)

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
            self._push(pod.ready_at, _READY, pod)
        while len(state.pods) > pods:
            self._remove(now)
        if not self._sizes or self._sizes[-1][1] != len(state.pods):
            self._sizes.append((now, len(state.pods)))
        for model, count in copies.items():
            if len(self._holders[model]) != min(count, len(state.pods)):
                self._place(now, model, min(count, len(state.pods)))

    def _remove(self, now: float) -> None:
        """Remove the pod that is not ready yet, otherwise the one with the fewest requests, otherwise the newest."""
        pod = min(self._state.pods, key=lambda pod: (pod.ready_at <= now, pod.running, -pod.number))
        self._state.pods.remove(pod)
        pod.leaving = True
        for model in pod.adapters:
            self._holders[model].discard(pod)
        if pod.running:
            self._leaving.append(pod)
        else:
            self._pod_seconds += now - pod.created

    def _place(self, now: float, model: str, count: int) -> None:
        holders = self._holders[model]
        while len(holders) > count:
            pod = max(holders, key=lambda pod: (len(pod.adapters), pod.number))
            holders.discard(pod)
            del pod.adapters[model]
        while len(holders) < count:
            free = [pod for pod in self._state.pods if pod not in holders]
            pod = min(free, key=lambda pod: (len(pod.adapters) >= self._timing.capacity, len(pod.adapters), pod.number))
            holders.add(pod)
            pod.adapters[model] = max(now, pod.ready_at) + self._timing.load_seconds
            self._push(pod.adapters[model], _READY, pod)

    def _dispatch(self, now: float, model: str) -> None:
        queue = self._waiting[model]
        while queue:
            pods = [
                pod
                for pod in self._holders[model]
                if pod.adapters[model] <= now and pod.running < self._timing.concurrency
            ]
            if not pods:
                return
            self._start(now, min(pods, key=lambda pod: (pod.running, pod.number)), queue.popleft())

    def _dispatch_oldest(self, now: float, pod: _Pod) -> None:
        """Start the oldest requests for the adapters of a pod, as far as it has room."""
        while pod.running < self._timing.concurrency:
            ready = [
                model for model, queue in self._waiting.items() if queue and pod.adapters.get(model, now + 1) <= now
            ]
            if not ready:
                return
            model = min(ready, key=lambda name: self._waiting[name][0].at)
            self._start(now, pod, self._waiting[model].popleft())

    def _start(self, now: float, pod: _Pod, arrival: Arrival) -> None:
        self._waits.append(now - arrival.at)
        pod.running += 1
        self._push(now + arrival.seconds, _END, (pod, arrival.model))
