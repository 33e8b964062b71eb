"""Prometheus metrics of the agent. docs/reference/metrics.md is generated from them."""

from __future__ import annotations

from collections import Counter as Count
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from tunesmith.contracts.agent import PodState, ResidencyState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client import Metric

    from tunesmith_server.engine import EngineState


class EngineTotals(Collector):
    """Totals by model as reported by the engine; they restart at 0 with the engine, as Prometheus expects."""

    def __init__(self) -> None:
        self.state: EngineState | None = None

    def describe(self) -> Iterator[Metric]:
        """Yield the families without samples."""
        yield from self._families()

    def collect(self) -> Iterator[Metric]:
        """Yield the families with the latest samples; without samples if the engine has not answered."""
        running, requests, tokens = self._families()
        if self.state is not None:
            for model, number in self.state.in_flight.items():
                running.add_metric([model], number)
            for model, total in self.state.totals.items():
                requests.add_metric([model], total.requests)
                tokens.add_metric([model, "prompt"], total.prompt_tokens)
                tokens.add_metric([model, "completion"], total.completion_tokens)
        yield from (running, requests, tokens)

    @staticmethod
    def _families() -> tuple[GaugeMetricFamily, CounterMetricFamily, CounterMetricFamily]:
        return (
            GaugeMetricFamily("tunesmith_agent_engine_requests_running", "Requests in vLLM.", labels=["model"]),
            CounterMetricFamily(
                "tunesmith_agent_engine_requests", "Requests that vLLM answered since its start.", labels=["model"]
            ),
            CounterMetricFamily(
                "tunesmith_agent_engine_tokens",
                "Tokens that vLLM processed since its start, by kind: prompt or completion.",
                labels=["model", "kind"],
            ),
        )


class AdapterFigures(Collector):
    """Figures of each revision on the pod, from the state that the agent publishes."""

    def __init__(self) -> None:
        self.state = PodState()

    def describe(self) -> Iterator[Metric]:
        """Yield the families without samples."""
        yield from self._families()

    def collect(self) -> Iterator[Metric]:
        """Yield the families with a sample for each revision that has the figure."""
        resident, loads, seconds, size, verdict, distance, gap = self._families()
        for adapter in self.state.adapters:
            name = adapter.engine_name
            resident.add_metric([name], adapter.state is ResidencyState.RESIDENT)
            if adapter.loads:
                loads.add_metric([name], adapter.loads)
                seconds.add_metric([name], adapter.load_seconds)
            if adapter.size_bytes:
                size.add_metric([name], adapter.size_bytes)
            if adapter.parity is None:
                continue
            verdict.add_metric([name, adapter.parity.verdict.value], 1)
            if adapter.parity.distance is not None:
                distance.add_metric([name], adapter.parity.distance)
            if adapter.parity.gap is not None:
                gap.add_metric([name], adapter.parity.gap)
        yield from (resident, loads, seconds, size, verdict, distance, gap)

    @staticmethod
    def _families() -> tuple[
        GaugeMetricFamily,
        CounterMetricFamily,
        GaugeMetricFamily,
        GaugeMetricFamily,
        GaugeMetricFamily,
        GaugeMetricFamily,
        GaugeMetricFamily,
    ]:
        return (
            GaugeMetricFamily(
                "tunesmith_agent_adapter_resident",
                "1 if the revision receives requests on this pod, otherwise 0.",
                labels=["model"],
            ),
            CounterMetricFamily(
                "tunesmith_agent_adapter_loads",
                "Loads of the revision into vLLM since the agent's start.",
                labels=["model"],
            ),
            GaugeMetricFamily(
                "tunesmith_agent_adapter_latest_load_seconds",
                "Seconds in which vLLM loaded the revision the last time.",
                labels=["model"],
            ),
            GaugeMetricFamily(
                "tunesmith_agent_adapter_file_bytes", "Bytes of the revision's files on this pod.", labels=["model"]
            ),
            GaugeMetricFamily(
                "tunesmith_agent_adapter_parity",
                "1 for the verdict of the revision's latest parity check: Passed, Unfinished, NotRecorded, Undecided "
                "or Failed.",
                labels=["model", "verdict"],
            ),
            GaugeMetricFamily(
                "tunesmith_agent_adapter_parity_distance_nats",
                "Distance of the engine's answers from the trained model's: greatest difference of log-probabilities.",
                labels=["model"],
            ),
            GaugeMetricFamily(
                "tunesmith_agent_adapter_parity_gap_nats",
                "Distance of the base model's answers from the trained model's, as recorded by the trainer.",
                labels=["model"],
            ),
        )


class Metrics:
    """Counters and gauges of one agent, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._adapters = Gauge(
            "tunesmith_agent_adapters", "Revisions on this pod, by state.", ["state"], registry=self.registry
        )
        self._ready = Gauge(
            "tunesmith_agent_engine_ready", "1 while vLLM answers, otherwise 0.", registry=self.registry
        )
        self._loads = Histogram(
            "tunesmith_agent_adapter_load_seconds",
            "Seconds in which vLLM loaded an adapter.",
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 120),
            registry=self.registry,
        )
        self._active = Gauge(
            "tunesmith_agent_adapters_active",
            "Adapters with requests in vLLM, by state: running (in a slot) or waiting (for a slot).",
            ["state"],
            registry=self.registry,
        )
        self._slots = Gauge("tunesmith_agent_adapter_slots", "Adapter slots of vLLM.", registry=self.registry)
        self._size = Gauge(
            "tunesmith_agent_adapter_bytes",
            "Bytes that adapters occupy, by place: disk (all on this pod) or memory (vLLM's cache).",
            ["place"],
            registry=self.registry,
        )
        self._size_limit = Gauge(
            "tunesmith_agent_adapter_limit_bytes", "Highest number of those bytes.", ["place"], registry=self.registry
        )
        self._reloads = Gauge(
            "tunesmith_agent_adapter_reloads",
            "Times since vLLM's start that it read the files of an adapter again, which its cache no longer had.",
            registry=self.registry,
        )
        self._crashes = Counter(
            "tunesmith_agent_engine_crashes",
            "Exits of vLLM that the agent had not requested, and restarts of a vLLM that hung.",
            registry=self.registry,
        )
        self._start = Gauge(
            "tunesmith_agent_engine_start_seconds",
            "Time from the latest start of vLLM's process until it accepted adapters; 0 before it was measured.",
            registry=self.registry,
        )
        self._failures = Counter(
            "tunesmith_agent_adapter_failures",
            "Failed downloads, checks and loads of adapters; permanent: true if repeating them cannot help.",
            ["permanent"],
            registry=self.registry,
        )
        self._bytes = Counter("tunesmith_agent_downloaded_bytes", "Bytes read from the store.", registry=self.registry)
        self._engine = EngineTotals()
        self.registry.register(self._engine)
        self._figures = AdapterFigures()
        self.registry.register(self._figures)

    def loaded(self, seconds: float) -> None:
        """Record a load and its duration."""
        self._loads.observe(seconds)

    def failed(self, *, permanent: bool) -> None:
        """Count a failed attempt."""
        self._failures.labels(permanent=str(permanent).lower()).inc()

    def downloaded(self, size: int) -> None:
        """Count bytes from the store."""
        self._bytes.inc(size)

    def crashed(self) -> None:
        """Count a crash of vLLM."""
        self._crashes.inc()

    def engine_start_seconds(self, seconds: float | None) -> None:
        """Record how long vLLM's latest start took."""
        self._start.set(seconds or 0.0)

    def engine_ready(self, *, ready: bool) -> None:
        """Record whether vLLM answers."""
        self._ready.set(ready)

    def engine_totals(self, state: EngineState) -> None:
        """Record what vLLM reports, by model."""
        self._engine.state = state

    def residencies(self, state: PodState) -> None:
        """Record the figures of each revision, the number of revisions in each state, and what they use."""
        self._figures.state = state
        counts = Count(residency.state for residency in state.adapters)
        for kind in ResidencyState:
            self._adapters.labels(kind.value).set(counts[kind])
        use = state.use
        self._active.labels("running").set(use.running)
        self._active.labels("waiting").set(use.waiting)
        self._slots.set(use.slots or 0)
        for place, size, limit in (
            ("disk", use.disk_bytes, use.disk_limit_bytes),
            ("memory", use.memory_bytes, use.memory_limit_bytes),
        ):
            self._size.labels(place).set(size)
            self._size_limit.labels(place).set(float("inf") if limit is None else limit)
        self._reloads.set(use.reloads)

    def text(self) -> bytes:
        """Return the metrics in Prometheus's text format."""
        return generate_latest(self.registry)
