"""Metrics of the operator, for Prometheus. docs/reference/metrics.md is generated from them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector

BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """All metrics, in a separate registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.queue_depth = Gauge(
            "tunesmith_operator_queue_depth", "Keys that are due and wait for a worker.", registry=self.registry
        )
        self.reconcile_seconds = Histogram(
            "tunesmith_operator_reconcile_duration_seconds",
            "Duration of a reconcile.",
            ["kind"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.reconciles = Counter(
            "tunesmith_operator_reconciles",
            "Reconciles by result: ok, or the error's label.",
            ["kind", "result"],
            registry=self.registry,
        )
        self.api_requests = Counter(
            "tunesmith_operator_api_requests",
            "Requests to the API server by result: ok, or the error's label. Watches are not counted.",
            ["verb", "kind", "result"],
            registry=self.registry,
        )
        self.cached = Gauge(
            "tunesmith_operator_cached_objects",
            "Objects in the caches at the last complete list.",
            ["kind"],
            registry=self.registry,
        )
        self.leading = Gauge(
            "tunesmith_operator_leader", "1 while this replica leads, otherwise 0.", registry=self.registry
        )
        self.silent_gateways = Gauge(
            "tunesmith_operator_silent_gateways",
            "Gateways that report no demand to the leader; while there are any, nothing is scaled down.",
            registry=self.registry,
        )
        self.watch_restarts = Counter(
            "tunesmith_operator_watch_restarts", "Restarts of the watches of the API server.", registry=self.registry
        )

    def api_request(self, verb: str, kind: str, result: str) -> None:
        """Count a request to the API server."""
        self.api_requests.labels(verb, kind, result).inc()
