"""The gateway's Prometheus metrics.

Metrics by model are rendered in this module, not by prometheus_client, which takes seconds for thousands of models and
blocks the event loop meanwhile. The exposition is rendered in pieces that take about a millisecond each.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from prometheus_client import Metric

    from tunesmith.gateway.demand import Demand
    from tunesmith.gateway.usage import TokenCounts

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_MODELS_PER_PIECE = 25
_PRUNE_INTERVAL = 256
"""Series of deleted models are removed at each exposition, and each time this many series have been added."""


_REVISION = ["model", "revision"]
RUNNING = GaugeMetricFamily(
    "tunesmith_gateway_sequences_running",
    "Sequences that pods are generating, by model and revision.",
    labels=_REVISION,
)
WAITING = GaugeMetricFamily("tunesmith_gateway_sequences_waiting", "Sequences that wait for a pod.", labels=["model"])
REQUESTS = CounterMetricFamily(
    "tunesmith_gateway_requests",
    "Requests that finished, by model, revision and HTTP status (499: the client closed its connection; 5xx: also "
    "streams that broke). The revision is empty for base models and for requests that no pod got.",
    labels=["code", *_REVISION],
)
DURATION = HistogramMetricFamily(
    "tunesmith_gateway_request_duration_seconds",
    "Time from a request's arrival to the end of its answer.",
    labels=_REVISION,
)
FIRST_TOKEN = HistogramMetricFamily(
    "tunesmith_gateway_time_to_first_token_seconds",
    "Time from the arrival of a request for a stream to the first event of its answer. Only complete streams count.",
    labels=_REVISION,
)
PER_OUTPUT_TOKEN = HistogramMetricFamily(
    "tunesmith_gateway_time_per_output_token_seconds",
    "Time per token of a sequence after the first one, in complete streams; each answer counts once, with its mean.",
    labels=_REVISION,
)
TOKENS = CounterMetricFamily(
    "tunesmith_gateway_tokens",
    "Tokens of requests that pods answered, by kind: prompt or completion. Of an answer that was cut off, an estimate.",
    labels=["kind", *_REVISION],
)
SHADOW_REQUESTS = CounterMetricFamily(
    "tunesmith_gateway_shadow_requests",
    "Requests in the share of a shadow, by result: compared, failed (the shadow answered with an error) or dropped "
    "(not mirrored, or cancelled).",
    labels=[*_REVISION, "result"],
)
SHADOW_TOKENS = CounterMetricFamily(
    "tunesmith_gateway_shadow_tokens",
    "Tokens of compared answers: those that clients got (served) and those of the shadow.",
    labels=["answer", *_REVISION],
)
SHADOW_REFUSALS = CounterMetricFamily(
    "tunesmith_gateway_shadow_refusals", "Compared answers that count as refusals.", labels=["answer", *_REVISION]
)
SHADOW_LOGPROB_ANSWERS = CounterMetricFamily(
    "tunesmith_gateway_shadow_logprob_answers", "Compared answers with log-probabilities.", labels=_REVISION
)
SHADOW_LOGPROB = CounterMetricFamily(
    "tunesmith_gateway_shadow_negative_logprob_nats",
    "Sum over these answers of the negative mean log-probability of their tokens.",
    labels=["answer", *_REVISION],
)
BY_MODEL = (
    RUNNING,
    WAITING,
    REQUESTS,
    DURATION,
    FIRST_TOKEN,
    PER_OUTPUT_TOKEN,
    TOKENS,
    SHADOW_REQUESTS,
    SHADOW_TOKENS,
    SHADOW_REFUSALS,
    SHADOW_LOGPROB_ANSWERS,
    SHADOW_LOGPROB,
)


class _Histogram:
    """Histogram of durations in seconds."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    def lines(self, name: str, label: str) -> Iterator[str]:
        """Yield the lines of the exposition; `label` names the model and the revision."""
        if not any(self.counts):
            return
        below = 0
        for bound, below in zip((*map(str, self.bounds), "+Inf"), accumulate(self.counts), strict=True):
            yield f'{name}_bucket{{le="{bound}",{label}}} {below}.0\n'
        yield f"{name}_count{{{label}}} {below}.0\n{name}_sum{{{label}}} {self.total!r}\n"


class _Series:
    """Counts and histograms of one revision, or of requests for a model that were sent to none."""

    __slots__ = ("codes", "completion", "first_token", "label", "per_token", "prompt", "seconds")

    def __init__(self, name: str) -> None:
        self.label = _revision_label(name)
        self.codes: dict[int, int] = {}
        self.seconds = _Histogram(_SECONDS)
        self.first_token = _Histogram(_SECONDS)
        self.per_token = _Histogram(_TOKEN_SECONDS)
        self.prompt = self.completion = 0


class Metrics:
    """Counters and histograms by engine name of a revision, by model, or of the empty name.

    Requests that were sent to no pod count under their model, and under the empty name if they name no known model.

    Args:
        demand: running and waiting sequences.
        exists: returns True if there is a model with this id, or a revision with this engine name; series of others are
            removed.
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
        self._limits_shared = Gauge(
            "tunesmith_gateway_limits_shared",
            "1 while the limits are counted in Redis for all gateways, 0 while this gateway applies its share.",
            registry=self.registry,
        )

    def limits_are_shared(self, shared: bool) -> None:  # noqa: FBT001 - the state
        """Record where the limits are counted."""
        self._limits_shared.set(shared)

    def malformed(self) -> None:
        """Count a request that is not HTTP."""
        self._malformed.inc()

    def finished(self, name: str, code: int, seconds: float) -> None:
        """Count a request that finished."""
        series = self._of(name)
        series.codes[code] = series.codes.get(code, 0) + 1
        series.seconds.observe(seconds)

    def generated(self, name: str, tokens: TokenCounts) -> None:
        """Count the tokens of a request that a pod answered."""
        series = self._of(name)
        series.prompt += tokens.prompt
        series.completion += tokens.completion

    def streamed(self, name: str, first_token: float, per_token: float | None) -> None:
        """Record the latencies of a stream, in seconds; `per_token`: None if it has a single token."""
        series = self._of(name)
        series.first_token.observe(first_token)
        if per_token is not None:
            series.per_token.observe(per_token)

    def not_started(self, reason: str) -> None:
        """Count an attempt that a pod did not accept."""
        self._retries.labels(reason).inc()

    def exposition(self) -> Iterator[bytes]:
        """Yield the text format in pieces; the caller may run other tasks between them."""
        self._prune()
        yield generate_latest(self.registry)
        yield from _gauges(RUNNING, self._demand.running_by_revision, _revision_label)
        yield from _gauges(WAITING, self._demand.waiting, _label)
        series = list(self._series.values())
        name = f"{REQUESTS.name}_total"
        yield _head(REQUESTS, name)
        yield from _pieces(
            series,
            lambda model: (f'{name}{{code="{code}",{model.label}}} {count}.0\n' for code, count in model.codes.items()),
        )
        yield _head(DURATION, DURATION.name)
        yield from _pieces(series, lambda entry: entry.seconds.lines(DURATION.name, entry.label))
        yield _head(FIRST_TOKEN, FIRST_TOKEN.name)
        yield from _pieces(series, lambda entry: entry.first_token.lines(FIRST_TOKEN.name, entry.label))
        yield _head(PER_OUTPUT_TOKEN, PER_OUTPUT_TOKEN.name)
        yield from _pieces(series, lambda entry: entry.per_token.lines(PER_OUTPUT_TOKEN.name, entry.label))
        yield _head(TOKENS, f"{TOKENS.name}_total")
        yield from _pieces(series, _token_lines)
        yield from self._shadows()

    def _shadows(self) -> Iterator[bytes]:
        compared = self._demand.comparisons.since(0)[1]
        found = [(_revision_label(shadow), comparison) for shadow, comparison in compared.items()]
        yield from _counters(
            SHADOW_REQUESTS,
            ((f'{label},result="compared"', entry.answers) for label, entry in found),
            ((f'{label},result="failed"', entry.failures) for label, entry in found),
            ((f'{label},result="dropped"', entry.dropped) for label, entry in found),
        )
        for family, figure, sign in (
            (SHADOW_TOKENS, "tokens", 1),
            (SHADOW_REFUSALS, "refusals", 1),
            (SHADOW_LOGPROB, "logprob", -1),
        ):
            yield from _counters(
                family,
                ((f'answer="served",{label}', sign * getattr(entry, f"served_{figure}")) for label, entry in found),
                ((f'answer="shadow",{label}', sign * getattr(entry, f"shadow_{figure}")) for label, entry in found),
            )
        yield from _counters(SHADOW_LOGPROB_ANSWERS, ((label, entry.logprob_answers) for label, entry in found))

    def _of(self, name: str) -> _Series:
        series = self._series.get(name)
        if series is None:
            if len(self._series) % _PRUNE_INTERVAL == _PRUNE_INTERVAL - 1:
                self._prune()
            series = self._series[name] = _Series(name)
        return series

    def _prune(self) -> None:
        for name in [name for name in self._series if name and not self._exists(name)]:
            del self._series[name]
        self._demand.keep(self._exists)


def _label(model: str) -> str:
    escaped = model.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'model="{escaped}"'


def _revision_label(name: str) -> str:
    """Return the labels of a revision, given its engine name, or of a model."""
    model, _, revision = name.partition("@")
    return f'{_label(model)},revision="{revision}"'


def _head(family: Metric, name: str) -> bytes:
    return f"# HELP {name} {family.documentation}\n# TYPE {name} {family.type}\n".encode()


def _token_lines(series: _Series) -> Iterator[str]:
    if series.prompt or series.completion:
        yield f'{TOKENS.name}_total{{kind="prompt",{series.label}}} {series.prompt}.0\n'
        yield f'{TOKENS.name}_total{{kind="completion",{series.label}}} {series.completion}.0\n'


def _pieces(series: list[_Series], lines: Callable[[_Series], Iterable[str]]) -> Iterator[bytes]:
    for start in range(0, len(series), _MODELS_PER_PIECE):
        yield "".join(
            line for model_series in series[start : start + _MODELS_PER_PIECE] for line in lines(model_series)
        ).encode()


def _counters(family: CounterMetricFamily, *samples: Iterable[tuple[str, float]]) -> Iterator[bytes]:
    name = f"{family.name}_total"
    yield _head(family, name)
    yield "".join(f"{name}{{{labels}}} {float(value)!r}\n" for group in samples for labels, value in group).encode()


def _gauges(family: GaugeMetricFamily, values: Mapping[str, int], label: Callable[[str], str]) -> Iterator[bytes]:
    yield _head(family, family.name)
    yield "".join(f"{family.name}{{{label(name)}}} {value}.0\n" for name, value in list(values.items())).encode()
