"""The gateway's Prometheus metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tunesmith.gateway.demand import Demand

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class _DemandCollector(Collector):
    """Gauges of the running and waiting requests."""

    def __init__(self, demand: Demand) -> None:
        self._demand = demand

    def collect(self) -> Iterator[GaugeMetricFamily]:
        yield _gauge("tunesmith_gateway_requests_running", "Requests that a pod works on.", self._demand.running)
        yield _gauge("tunesmith_gateway_requests_waiting", "Requests that wait for a pod.", self._demand.waiting)


def _gauge(name: str, documentation: str, values: Mapping[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, documentation, labels=["model"])
    for model, value in values.items():
        family.add_metric([model], value)
    return family


class Metrics:
    """Counters and histograms by model; the label is empty where no known model was named."""

    def __init__(self, demand: Demand) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_DemandCollector(demand))
        self._requests = Counter(
            "tunesmith_gateway_requests",
            "Requests that ended, by model and HTTP status (499: the client left).",
            ["model", "code"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "tunesmith_gateway_request_duration_seconds",
            "Seconds from a request's arrival to the end of its answer.",
            ["model"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._first = Histogram(
            "tunesmith_gateway_time_to_first_byte_seconds",
            "Seconds from a request's arrival to the first byte of its answer.",
            ["model"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._malformed = Counter(
            "tunesmith_gateway_malformed_requests", "Requests that are not valid HTTP.", registry=self.registry
        )
        self._retries = Counter(
            "tunesmith_gateway_not_started",
            "Attempts that a pod did not take up, by reason; the request went on to another pod.",
            ["reason"],
            registry=self.registry,
        )

    def malformed(self) -> None:
        """Count a request that is not HTTP."""
        self._malformed.inc()

    def ended(self, model: str, code: int, seconds: float) -> None:
        """A request ended."""
        self._requests.labels(model, code).inc()
        self._seconds.labels(model).observe(seconds)

    def first_byte(self, model: str, seconds: float) -> None:
        """The answer of a pod began."""
        self._first.labels(model).observe(seconds)

    def not_started(self, reason: str) -> None:
        """A pod did not take up a request."""
        self._retries.labels(reason).inc()
