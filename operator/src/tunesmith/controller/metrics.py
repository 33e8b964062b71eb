"""Metrics of the operator, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector

BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """All metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.queue_depth = Gauge(
            "tunesmith_queue_depth", "Keys that are due and wait for a worker.", registry=self.registry
        )
        self.reconcile_seconds = Histogram(
            "tunesmith_reconcile_duration_seconds",
            "Time that one reconcile took.",
            ["kind"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.reconciles = Counter(
            "tunesmith_reconciles",
            "Reconciles by result: ok, or the error's label.",
            ["kind", "result"],
            registry=self.registry,
        )
        self.api_requests = Counter(
            "tunesmith_api_requests",
            "Requests to the API server by result: ok, or the error's label. Watches are kopf's and not counted.",
            ["verb", "kind", "result"],
            registry=self.registry,
        )
        self.cached = Gauge("tunesmith_cache_objects", "Objects in the caches.", ["kind"], registry=self.registry)
        self.leading = Gauge("tunesmith_leader", "1 while this replica leads.", registry=self.registry)
        self.silent_gateways = Gauge(
            "tunesmith_gateways_silent",
            "Gateways whose demand the leader does not hear: while there are any, nothing is scaled down.",
            registry=self.registry,
        )
        self.watch_restarts = Counter(
            "tunesmith_watch_restarts", "Times that the watches ended and were started again.", registry=self.registry
        )

    def api_request(self, verb: str, kind: str, result: str) -> None:
        """Count a request to the API server."""
        self.api_requests.labels(verb, kind, result).inc()
