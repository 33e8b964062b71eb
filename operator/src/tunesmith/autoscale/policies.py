"""Policies of the simulation: the operator's own decisions, and those that they are compared with. Pure."""

from __future__ import annotations

from collections import deque
from datetime import timedelta
from math import ceil
from typing import TYPE_CHECKING

from tunesmith.autoscale.decide import decide_copies, decide_pods, pods_for_copies, seconds_until_next
from tunesmith.autoscale.schedule import minimum
from tunesmith.autoscale.window import Sample, Window

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime

    from tunesmith.api.autoscaling import Autoscaling
    from tunesmith.autoscale.simulate import Policy, State, Timing

HPA_SECONDS = 15.0
HPA_TOLERANCE = 0.1
HPA_DOWN_SECONDS = 300.0
"""Defaults of Kubernetes' HorizontalPodAutoscaler: period, tolerance and stabilisation window for scaling down."""
DYNAMO_SECONDS = 3.0
DYNAMO_WINDOW_SECONDS = 90.0
DYNAMO_COOLDOWN_TICKS = 3
DYNAMO_SMOOTHING = 0.3
"""Defaults of NVIDIA Dynamo's controller of LoRA replicas (lib/llm/src/lora/config.rs): time between two decisions,
window of arrivals, ticks between two reductions of one adapter, and weight of the newest window in the mean."""


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
        rule, window = self._rules[model], self._windows[model]
        low = minimum(rule, self._clock(now))
        if now > window.newest.at:
            window.add(Sample.of(state.demand(now, model), now), rule.scale_down_delay_seconds)
        copies = decide_copies(window, self._copies[model], rule, low).replicas
        if copies != self._copies[model]:
            self._copies = {**self._copies, model: copies}
        self._due[model] = now + seconds_until_next(window, copies, rule, low)

    def _decided(self, now: float, state: State) -> tuple[int, Mapping[str, int]]:
        floor, why = pods_for_copies(self._copies, self._timing.capacity)
        if now > self._window.newest.at:
            self._window.add(Sample.of(state.total(now), now, floor), self._pool.scale_down_delay_seconds)
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
        self._copies = dict.fromkeys(self._models, self._pods)

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
            pods = max(self._lowest, min(self._highest, size if wanted > self._pods else min(self._pods, size)))
            if pods != self._pods:
                self._pods, self._copies = pods, dict.fromkeys(self._models, pods)
        return self._pods, self._copies

    def wake(self, now: float, model: str, state: State) -> None:
        """Wait for the next second."""


class Dynamo:
    """Copies in proportion to each adapter's share of the arrivals, as NVIDIA Dynamo's controller computes them.

    It sizes no pool: the pods are those of another policy. Every adapter keeps one copy.

    Args:
        pool: decides the number of pods.
        slots: adapters that compute on one pod at once.
    """

    def __init__(self, pool: Policy, slots: int) -> None:
        self._pool, self._slots = pool, slots
        self._due, self._tick = 0.0, 0
        self._arrived: dict[str, deque[int]] = {}
        self._means: dict[str, float] = {}
        self._lowered: dict[str, int] = {}
        self._copies: Mapping[str, int] = {}

    def sizes(self, now: float, state: State) -> tuple[int, Mapping[str, int]]:
        """Decide every 3 s."""
        pods, every = self._pool.sizes(now, state)
        if now >= self._due:
            self._due, self._tick = now + DYNAMO_SECONDS, self._tick + 1
            self._count(state)
            total = sum(self._means.values())
            copies = {model: self._of(model, total, pods) for model in every}
            if copies != self._copies:
                self._copies = copies
        return pods, self._copies

    def wake(self, now: float, model: str, state: State) -> None:
        """Wait for the next decision."""

    def _count(self, state: State) -> None:
        length = ceil(DYNAMO_WINDOW_SECONDS / DYNAMO_SECONDS)
        for model, count in state.take_arrivals().items():
            self._arrived.setdefault(model, deque([0] * length, maxlen=length))[-1] += count
        for model, counts in self._arrived.items():
            before = self._means.get(model, 0.0)
            mean = before + DYNAMO_SMOOTHING * (sum(counts) - before)
            self._means[model] = mean if mean >= DYNAMO_SMOOTHING / 2 else 0.0
            counts.append(0)

    def _of(self, model: str, total: float, pods: int) -> int:
        before = self._copies.get(model, 1)
        mean = self._means.get(model, 0.0)
        wanted = max(1, min(pods, ceil(mean / total * pods * self._slots))) if total else 1
        if wanted >= before:
            return wanted
        if before <= pods and self._tick - self._lowered.get(model, -DYNAMO_COOLDOWN_TICKS) < DYNAMO_COOLDOWN_TICKS:
            return before
        self._lowered[model] = self._tick
        return wanted
