"""The agent's Prometheus metrics."""

from __future__ import annotations

from collections import Counter as Count
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from tunesmith.contracts.agent import PodState, ResidencyState

if TYPE_CHECKING:
    from tunesmith_server.engine import EngineState


class Metrics:
    """Counters and gauges of one agent, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._adapters = Gauge("tunesmith_agent_adapters", "Revisions on this pod.", ["state"], registry=self._registry)
        self._ready = Gauge("tunesmith_agent_engine_ready", "1 while vLLM answers.", registry=self._registry)
        self._loads = Counter("tunesmith_agent_loads", "Adapters loaded into vLLM.", registry=self._registry)
        self._failures = Counter(
            "tunesmith_agent_failures", "Failed downloads, checks and loads.", ["permanent"], registry=self._registry
        )
        self._bytes = Counter("tunesmith_agent_download_bytes", "Read from the store.", registry=self._registry)
        self._in_flight = Gauge("tunesmith_engine_in_flight", "Requests in vLLM.", ["model"], registry=self._registry)
        self._requests = Gauge(
            "tunesmith_engine_requests", "Answered since vLLM's start.", ["model"], registry=self._registry
        )
        self._tokens = Gauge(
            "tunesmith_engine_tokens", "Tokens since vLLM's start.", ["model", "kind"], registry=self._registry
        )

    def loaded(self) -> None:
        """Count a load."""
        self._loads.inc()

    def failed(self, *, permanent: bool) -> None:
        """Count a failed attempt."""
        self._failures.labels(permanent=str(permanent).lower()).inc()

    def downloaded(self, size: int) -> None:
        """Count bytes from the store."""
        self._bytes.inc(size)

    def engine_ready(self, *, ready: bool) -> None:
        """Whether vLLM answers."""
        self._ready.set(ready)

    def engine_totals(self, state: EngineState) -> None:
        """What vLLM did and does, by model."""
        for gauge in (self._in_flight, self._requests, self._tokens):
            gauge.clear()
        for model, running in state.in_flight.items():
            self._in_flight.labels(model).set(running)
        for model, total in state.totals.items():
            self._requests.labels(model).set(total.requests)
            self._tokens.labels(model, "prompt").set(total.prompt_tokens)
            self._tokens.labels(model, "completion").set(total.completion_tokens)

    def residencies(self, state: PodState) -> None:
        """How many revisions are in which state."""
        counts = Count(residency.state for residency in state.adapters)
        for kind in ResidencyState:
            self._adapters.labels(kind.value).set(counts[kind])

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self._registry)
