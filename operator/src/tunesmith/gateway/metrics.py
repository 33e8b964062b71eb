"""The gateway's Prometheus metrics.

Metrics by model are rendered in this module, not by prometheus_client, which takes seconds for thousands of models and
blocks the event loop meanwhile. The exposition is rendered in pieces that take about a millisecond each.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from prometheus_client import Metric

    from tunesmith.gateway.demand import Demand

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_BOUNDS = (*map(str, _SECONDS), "+Inf")
_MODELS_PER_PIECE = 25
_PRUNE_INTERVAL = 256
"""Series of deleted models are removed at each exposition, and each time this many series have been added."""


RUNNING = GaugeMetricFamily(
    "tunesmith_gateway_sequences_running", "Sequences that pods are generating.", labels=["model"]
)
WAITING = GaugeMetricFamily("tunesmith_gateway_sequences_waiting", "Sequences that wait for a pod.", labels=["model"])
REQUESTS = CounterMetricFamily(
    "tunesmith_gateway_requests",
    "Requests that finished, by model and HTTP status (499: the client closed its connection).",
    labels=["code", "model"],
)
DURATION = HistogramMetricFamily(
    "tunesmith_gateway_request_duration_seconds",
    "Time from a request's arrival to the end of its answer.",
    labels=["model"],
)
FIRST_BYTE = HistogramMetricFamily(
    "tunesmith_gateway_time_to_first_byte_seconds",
    "Time from a request's arrival to the first byte of its answer.",
    labels=["model"],
)
BY_MODEL = (RUNNING, WAITING, REQUESTS, DURATION, FIRST_BYTE)


class _Histogram:
    """Histogram of durations in seconds."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * len(_BOUNDS)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(_SECONDS, seconds)] += 1
        self.total += seconds

    def lines(self, name: str, label: str) -> Iterator[str]:
        """Yield the lines of the exposition; `label` names the model."""
        if not any(self.counts):
            return
        below = 0
        for bound, below in zip(_BOUNDS, accumulate(self.counts), strict=True):
            yield f'{name}_bucket{{le="{bound}",{label}}} {below}.0\n'
        yield f"{name}_count{{{label}}} {below}.0\n{name}_sum{{{label}}} {self.total!r}\n"


class _Series:
    """Counts and histograms of one model."""

    __slots__ = ("codes", "first_byte", "label", "seconds")

    def __init__(self, model: str) -> None:
        self.label = _label(model)
        self.codes: dict[int, int] = {}
        self.seconds = _Histogram()
        self.first_byte = _Histogram()


class Metrics:
    """Counters and histograms by model; the label is empty for requests that name no known model.

    Args:
        demand: running and waiting sequences.
        exists: returns True if there is a model with this id; series of others are removed.
    """

    def __init__(self, demand: Demand, exists: Callable[[str], bool]) -> None:
        self._demand = demand
        self._exists = exists
        self._series: dict[str, _Series] = {}
        self.registry = CollectorRegistry()
        self._malformed = Counter(
            "tunesmith_gateway_malformed_requests", "Requests that are not valid HTTP.", registry=self.registry
        )
        self._retries = Counter(
            "tunesmith_gateway_failed_attempts",
            "Attempts that failed before a pod accepted the request, by reason; another pod gets the request.",
            ["reason"],
            registry=self.registry,
        )

    def malformed(self) -> None:
        """Count a request that is not HTTP."""
        self._malformed.inc()

    def finished(self, model: str, code: int, seconds: float) -> None:
        """Count a request that finished."""
        series = self._of(model)
        series.codes[code] = series.codes.get(code, 0) + 1
        series.seconds.observe(seconds)

    def first_byte(self, model: str, seconds: float) -> None:
        """Record the time to the first byte of a pod's answer."""
        self._of(model).first_byte.observe(seconds)

    def not_started(self, reason: str) -> None:
        """Count an attempt that a pod did not accept."""
        self._retries.labels(reason).inc()

    def exposition(self) -> Iterator[bytes]:
        """Yield the text format in pieces; the caller may run other tasks between them."""
        self._prune()
        yield generate_latest(self.registry)
        yield from _gauges(RUNNING, self._demand.running)
        yield from _gauges(WAITING, self._demand.waiting)
        series = list(self._series.values())
        name = f"{REQUESTS.name}_total"
        yield _head(REQUESTS, name)
        yield from _pieces(
            series,
            lambda model: (f'{name}{{code="{code}",{model.label}}} {count}.0\n' for code, count in model.codes.items()),
        )
        yield _head(DURATION, DURATION.name)
        yield from _pieces(series, lambda model: model.seconds.lines(DURATION.name, model.label))
        yield _head(FIRST_BYTE, FIRST_BYTE.name)
        yield from _pieces(series, lambda model: model.first_byte.lines(FIRST_BYTE.name, model.label))

    def _of(self, model: str) -> _Series:
        series = self._series.get(model)
        if series is None:
            if len(self._series) % _PRUNE_INTERVAL == _PRUNE_INTERVAL - 1:
                self._prune()
            series = self._series[model] = _Series(model)
        return series

    def _prune(self) -> None:
        for model in [model for model in self._series if model and not self._exists(model)]:
            del self._series[model]


def _label(model: str) -> str:
    escaped = model.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'model="{escaped}"'


def _head(family: Metric, name: str) -> bytes:
    return f"# HELP {name} {family.documentation}\n# TYPE {name} {family.type}\n".encode()


def _pieces(series: list[_Series], lines: Callable[[_Series], Iterable[str]]) -> Iterator[bytes]:
    for start in range(0, len(series), _MODELS_PER_PIECE):
        yield "".join(
            line for model_series in series[start : start + _MODELS_PER_PIECE] for line in lines(model_series)
        ).encode()


def _gauges(family: GaugeMetricFamily, values: Mapping[str, int]) -> Iterator[bytes]:
    yield _head(family, family.name)
    yield "".join(f"{family.name}{{{_label(model)}}} {value}.0\n" for model, value in list(values.items())).encode()
