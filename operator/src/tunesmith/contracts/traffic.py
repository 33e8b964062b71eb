"""Measured traffic of a model: counts, latencies, and the comparison of a shadow with the revision that answers.

The engine's middleware counts the requests of each model, and the agent's event stream carries the counts to the
operator. Gateways compare the answers of a shadow with those that clients get, and report the result in their demand
stream. All numbers are cumulative since the start of the process that counts, so a lost or repeated report changes
nothing: the traffic of a period is the difference of two snapshots.

Latencies are counted in buckets whose bounds grow by a factor of `BOUND_RATIO`, so a quantile is off by at most 12 %.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import ConfigDict, Field

from tunesmith.api.model import StatusModel

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FIRST_BOUND_SECONDS = 0.0005
"""Upper bound of the first bucket."""
BOUND_RATIO = 1.25
BOUND_COUNT = 64
BOUNDS_SECONDS = tuple(FIRST_BOUND_SECONDS * BOUND_RATIO**index for index in range(BOUND_COUNT))
"""Upper bounds of the buckets, inclusive; the last bucket, number `BOUND_COUNT`, has none (more than 10 minutes)."""
SHADOW_HEADER = "x-tunesmith-shadow"
"""Header, with the value `true`, of a mirrored request from a gateway to an engine. It is counted separately, and
refused with 503 `not_started` if it would have to wait for an adapter slot."""
MAX_TRAFFIC_PER_LINE = 256
"""Highest number of models whose traffic is in one line of an event stream; the others follow in the next line."""
MAX_COMPARISONS = 2048
"""Highest number of revisions whose comparison a gateway reports."""

_MAX_NUMBER = 2**53

Total = Annotated[int, Field(ge=0, le=_MAX_NUMBER)]
Buckets = dict[Annotated[int, Field(ge=0, le=BOUND_COUNT)], Total]
"""Number of observations by number of the bucket; buckets without any are absent."""
StartId = Annotated[str, Field(max_length=32, pattern=r"^[0-9a-f]*$")]
"""Random identity of the start of the process that counts; with another one, the counts began again at 0."""


class _WireModel(StatusModel):
    model_config = ConfigDict(strict=True, hide_input_in_errors=True)


class TrafficCounts(_WireModel):
    """Counts of one kind of requests.

    Attributes:
        requests: requests that the engine answered; those that it refused because of their content (4xx) are excluded.
        errors: those of them that failed: the engine answered 5xx, or its stream broke or reported an error. A client
            that leaves is not an error.
        first_token: times to the first token, from the arrival at the engine, of answers that are streams.
        per_output_token: times per output token after the first one, of streams with at least two tokens, each the mean
            of one answer.
    """

    requests: Total = 0
    errors: Total = 0
    first_token: Buckets = Field(default_factory=dict)
    per_output_token: Buckets = Field(default_factory=dict)


class Traffic(_WireModel):
    """Traffic of one engine name on one pod.

    Attributes:
        start: identity of the engine's process.
        served: requests whose answers clients get.
        shadow: mirrored requests, whose answers are discarded.
    """

    start: StartId
    served: TrafficCounts = Field(default_factory=TrafficCounts)
    shadow: TrafficCounts = Field(default_factory=TrafficCounts)


class Comparison(_WireModel):
    """Answers of a shadow revision beside the answers that clients got to the same requests, at one gateway.

    Attributes:
        start: identity of the gateway's process.
        answers: requests that both revisions answered completely. All following figures are sums over these.
        served_tokens: tokens of the answers that clients got.
        shadow_tokens: tokens of the shadow's answers.
        served_refusals: answers that clients got and that count as refusals, see docs/how-to/split-traffic.md.
        shadow_refusals: answers of the shadow that count as refusals.
        logprob_answers: those requests for which both answers contain log-probabilities.
        served_logprob: sum over these of the mean log-probability of the client's answer's tokens, in nats.
        shadow_logprob: the same of the shadow's answers.
        failures: mirrored requests that the shadow's engine answered with an error, or whose stream broke.
        dropped: requests that were chosen but not mirrored, or cancelled, because of load or because no pod had the
            shadow.
    """

    start: StartId
    answers: Total = 0
    served_tokens: Total = 0
    shadow_tokens: Total = 0
    served_refusals: Total = 0
    shadow_refusals: Total = 0
    logprob_answers: Total = 0
    served_logprob: float = Field(default=0.0, ge=-_MAX_NUMBER, le=0, allow_inf_nan=False)
    shadow_logprob: float = Field(default=0.0, ge=-_MAX_NUMBER, le=0, allow_inf_nan=False)
    failures: Total = 0
    dropped: Total = 0

    def since(self, before: Comparison | None) -> Comparison:
        """Return the sums since an earlier report; the complete ones if the gateway restarted or there is none."""
        if before is None or before.start != self.start or before.answers > self.answers:
            return self
        changes = {
            name: getattr(self, name) - getattr(before, name) for name in type(self).model_fields if name != "start"
        }
        return type(self).model_construct(start=self.start, **changes)


def bucket_of(seconds: float) -> int:
    """Return the number of the bucket of a duration."""
    return bisect_left(BOUNDS_SECONDS, seconds)


def quantile(buckets: Mapping[int, int], share: float) -> float | None:
    """Return the quantile of durations in seconds; None without observations.

    Args:
        buckets: observations by number of the bucket.
        share: share of the observations that are at most the result, such as 0.95.
    """
    total = sum(buckets.values())
    if not total:
        return None
    rank, seen = max(1, math.ceil(share * total)), 0
    for number in sorted(buckets):
        seen += buckets[number]
        if seen >= rank:
            break
    if number >= BOUND_COUNT:
        return BOUNDS_SECONDS[-1]
    return BOUNDS_SECONDS[number] / math.sqrt(BOUND_RATIO)


@dataclass(frozen=True)
class TrafficPeriod:
    """Traffic of one kind in a period, of one pod or several.

    Attributes:
        restarted: True if a counter restarted in the period: what was counted before the restart is missing.
    """

    requests: int = 0
    errors: int = 0
    first_token: Mapping[int, int] = field(default_factory=dict)
    per_output_token: Mapping[int, int] = field(default_factory=dict)
    restarted: bool = False

    @property
    def error_rate(self) -> float | None:
        """Errors per request, from 0 to 1; None without requests."""
        return self.errors / self.requests if self.requests else None

    @property
    def first_token_p95(self) -> float | None:
        """95th percentile of the time to the first token, in seconds; None if no answer was a stream."""
        return quantile(self.first_token, 0.95)

    @property
    def per_output_token_p95(self) -> float | None:
        """95th percentile of the time per output token, in seconds; None without streams of several tokens."""
        return quantile(self.per_output_token, 0.95)

    @classmethod
    def total(cls, periods: Iterable[TrafficPeriod]) -> Self:
        """Return the sum over several pods."""
        listed = list(periods)
        first_token: Counter[int] = Counter()
        per_output_token: Counter[int] = Counter()
        for period in listed:
            first_token.update(period.first_token)
            per_output_token.update(period.per_output_token)
        return cls(
            requests=sum(period.requests for period in listed),
            errors=sum(period.errors for period in listed),
            first_token=first_token,
            per_output_token=per_output_token,
            restarted=any(period.restarted for period in listed),
        )


def served_between(before: Traffic | None, after: Traffic) -> TrafficPeriod:
    """Return the traffic that clients caused between two snapshots of one pod.

    Args:
        before: the earlier snapshot; None: since the start of the engine.
        after: the later snapshot. If its counters restarted, the result is the traffic since then.
    """
    return _between(None if before is None else before.served, after.served, restarted=_restarted(before, after))


def shadow_between(before: Traffic | None, after: Traffic) -> TrafficPeriod:
    """Return the mirrored traffic between two snapshots of one pod; see `served_between`."""
    return _between(None if before is None else before.shadow, after.shadow, restarted=_restarted(before, after))


def _restarted(before: Traffic | None, after: Traffic) -> bool:
    if before is None:
        return False
    decreased = any(_decreased(getattr(before, kind), getattr(after, kind)) for kind in ("served", "shadow"))
    return before.start != after.start or decreased


def _decreased(before: TrafficCounts, after: TrafficCounts) -> bool:
    return (
        before.requests > after.requests
        or before.errors > after.errors
        or any(count > after.first_token.get(number, 0) for number, count in before.first_token.items())
        or any(count > after.per_output_token.get(number, 0) for number, count in before.per_output_token.items())
    )


def _between(before: TrafficCounts | None, after: TrafficCounts, *, restarted: bool) -> TrafficPeriod:
    if before is None or restarted:
        before = TrafficCounts()
    return TrafficPeriod(
        requests=after.requests - before.requests,
        errors=after.errors - before.errors,
        first_token=_difference(before.first_token, after.first_token),
        per_output_token=_difference(before.per_output_token, after.per_output_token),
        restarted=restarted,
    )


def _difference(before: Mapping[int, int], after: Mapping[int, int]) -> dict[int, int]:
    changed = {number: count - before.get(number, 0) for number, count in after.items()}
    return {number: count for number, count in changed.items() if count}
