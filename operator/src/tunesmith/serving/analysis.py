"""Analysis of a new revision during its rollout: the traffic of a step, and the results of the checks. Pure.

Missing data never passes a check. A check fails only on a known value.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tunesmith.api.parity import ParityVerdict
from tunesmith.api.rollout import (
    MAX_MEASURED_PODS,
    STATIC_MEASURES,
    Measure,
    MeasuredTraffic,
    MeasureStatus,
    PodTraffic,
    ShadowComparison,
)
from tunesmith.contracts.sentence import one_line
from tunesmith.contracts.traffic import Traffic, TrafficCounts, quantile, served_between, shadow_between

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from tunesmith.api.parity import RevisionParity
    from tunesmith.api.rollout import AnalysisCheck
    from tunesmith.contracts.traffic import Comparison

_MAX_MESSAGE = 500
_P95 = 0.95


@dataclass(frozen=True)
class QueryResult:
    """Result of a PromQL expression.

    Attributes:
        at: time of its evaluation.
        value: the number; None if there is none.
        problem: reason for a missing number; empty if there is one.
    """

    at: datetime
    value: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class PodMeasure:
    """Report of a pod that holds the new revision, or has held it.

    Attributes:
        uid: UID of the pod.
        name: its name.
        traffic: counters of the revision, without a `start` if it has none; None if they are not known now.
    """

    uid: str
    name: str
    traffic: Traffic | None


@dataclass(frozen=True)
class Evidence:
    """Facts about a new revision.

    Attributes:
        pods: the pods that are to answer its requests, and others that have counters of it.
        parity: result of the parity check; None: there is none yet.
        missed_gates: number of evaluation gates that the artifact missed; None: unknown.
        queries: results of PromQL expressions, as in the spec.
        no_queries: reason why there are no results of expressions; empty if they are evaluated.
        comparisons: comparisons of its answers as a shadow, of each gateway.
    """

    pods: Sequence[PodMeasure] = ()
    parity: RevisionParity | None = None
    missed_gates: int | None = None
    queries: Mapping[str, QueryResult] = field(default_factory=dict)
    no_queries: str = ""
    comparisons: Sequence[Comparison] = ()


@dataclass(frozen=True)
class StepTraffic:
    """Traffic of a revision since the start of a step, and the counters to continue from."""

    total: MeasuredTraffic = field(default_factory=MeasuredTraffic)
    pods: Sequence[PodTraffic] = ()

    def followed_by(self, reports: Sequence[PodMeasure], *, shadow: bool) -> StepTraffic:
        """Return the traffic with what the pods have counted since.

        The first report of a pod is where its count begins: what it counted earlier may belong to an earlier rollout.
        If its engine restarted, what it has counted since the restart is added. A pod reports no counters after a
        restart, and until it has sent them.

        Args:
            reports: current reports of the pods.
            shadow: True to count the mirrored requests instead of those whose answers clients get.
        """
        known = {pod.uid: pod for pod in self.pods}
        total, pods = self.total, dict(known)
        for report in reports:
            last = known.get(report.uid)
            if report.traffic is None or (last is not None and not report.traffic.start):
                continue
            if last is None and len(pods) >= MAX_MEASURED_PODS:
                continue
            if last is not None:
                between = shadow_between if shadow else served_between
                period = between(_as_traffic(last, shadow=shadow), report.traffic)
                total = MeasuredTraffic(
                    requests=total.requests + period.requests,
                    errors=total.errors + period.errors,
                    first_token=_sum(total.first_token, period.first_token),
                    per_output_token=_sum(total.per_output_token, period.per_output_token),
                )
            pods[report.uid] = _as_status(report.uid, report.traffic, shadow=shadow)
        return StepTraffic(total, tuple(pods.values()))


def beginning(reports: Sequence[PodMeasure], *, shadow: bool) -> StepTraffic:
    """Return the traffic of a step that begins now: none."""
    return StepTraffic().followed_by(reports, shadow=shadow)


def compare(comparisons: Sequence[Comparison]) -> ShadowComparison | None:
    """Return the comparison over all gateways; None if none has reported one."""
    if not comparisons:
        return None

    def total(figure: str) -> float:
        return float(sum(getattr(comparison, figure) for comparison in comparisons))

    def mean(figure: str, count: str) -> float | None:
        return total(figure) / total(count) if total(count) else None

    return ShadowComparison(
        answers=int(total("answers")),
        failures=int(total("failures")),
        dropped=int(total("dropped")),
        **{
            figure: mean(figure, "answers")
            for figure in ("shadow_tokens", "served_tokens", "shadow_refusals", "served_refusals")
        },
        **{figure: mean(figure, "logprob_answers") for figure in ("shadow_logprob", "served_logprob")},
    )


def analyse(
    checks: Sequence[AnalysisCheck],
    evidence: Evidence,
    traffic: StepTraffic,
    min_requests: int,
    since: datetime | None,
) -> list[MeasureStatus]:
    """Return the result of each check.

    Args:
        checks: the checks of the spec.
        evidence: facts about the revision.
        traffic: its traffic in the current step.
        min_requests: number of observations from which on a measure of requests counts.
        since: start of the step; None if it has not begun.
    """
    return [_result(check, evidence, traffic, min_requests, since) for check in checks]


def may_begin(results: Sequence[MeasureStatus]) -> MeasureStatus | None:
    """Return the first result that keeps a revision from getting its first requests; None if there is none."""
    return next((found for found in results if found.measure in STATIC_MEASURES and not found.passed), None)


def first_failure(results: Sequence[MeasureStatus]) -> MeasureStatus | None:
    """Return the first failed check; None if none has failed."""
    return next((found for found in results if found.passed is False), None)


def first_unknown(results: Sequence[MeasureStatus]) -> MeasureStatus | None:
    """Return the first check without a result; None if all have one."""
    return next((found for found in results if found.passed is None), None)


def _result(
    check: AnalysisCheck, evidence: Evidence, traffic: StepTraffic, min_requests: int, since: datetime | None
) -> MeasureStatus:
    if check.measure is Measure.SERVED_PARITY:
        return _parity(check, evidence.parity)
    if check.measure is Measure.EVALUATION_GATE:
        if evidence.missed_gates is None:
            return _unknown(check, "the artifact records no outcome of evaluation.gates: remove the check, or promote")
        return _compared(check, float(evidence.missed_gates), check.max or 0.0)
    if since is None:
        return _unknown(check, "measured once a step has begun")
    if check.measure is Measure.QUERY:
        return _query(check, evidence, traffic, min_requests, since)
    return _measured(check, evidence, traffic, min_requests)


def _measured(check: AnalysisCheck, evidence: Evidence, traffic: StepTraffic, min_requests: int) -> MeasureStatus:
    total, max_value = traffic.total, check.max
    assert max_value is not None  # noqa: S101 - a rule of the spec
    if check.measure is Measure.ERROR_RATE:
        seen, noun = total.requests, "requests"
        value = total.errors / total.requests if total.requests else None
    else:
        counts = total.first_token if check.measure is Measure.TIME_TO_FIRST_TOKEN else total.per_output_token
        buckets = {int(number): count for number, count in counts.items()}
        seen, noun = sum(buckets.values()), "streamed answers"
        value = quantile(buckets, _P95)
    if value is None or seen < min_requests:
        return _unknown(check, f"{seen} of at least {min_requests} {noun} in this step", value)
    result = _compared(check, value, max_value)
    silent = next((pod.name for pod in evidence.pods if pod.traffic is None), None)
    # The others' requests may fail the check, but without all pods' it does not pass.
    if result.passed and silent is not None:
        return _unknown(check, f"pod {silent} does not report its requests", value)
    return result


def _parity(check: AnalysisCheck, parity: RevisionParity | None) -> MeasureStatus:
    if parity is None:
        return _unknown(check, "no pod has compared its answers (spec.parity must not be Off)")
    limit = check.max if check.max is not None else parity.tolerance
    if parity.distance is not None and limit is not None and parity.verdict is not ParityVerdict.UNFINISHED:
        if check.max is not None or parity.verdict in (ParityVerdict.PASSED, ParityVerdict.FAILED):
            result = _compared(check, parity.distance, limit)
            if check.max is None and parity.verdict is ParityVerdict.FAILED:
                return _failed(check, parity.distance, limit, f"pod {parity.pod}: {parity.message or 'Failed'}")
            return result
    elif parity.verdict is ParityVerdict.FAILED:
        return _failed(check, None, limit, f"pod {parity.pod}: {parity.message or 'Failed'}")
    return _unknown(check, f"pod {parity.pod}: {parity.message or parity.verdict}", parity.distance)


def _query(
    check: AnalysisCheck, evidence: Evidence, traffic: StepTraffic, min_requests: int, since: datetime
) -> MeasureStatus:
    assert check.query is not None  # noqa: S101 - rules of the spec
    assert check.max is not None  # noqa: S101
    if evidence.no_queries:
        return _unknown(check, evidence.no_queries)
    found = evidence.queries.get(check.query)
    if found is None or found.at < since:
        return _unknown(check, "the expression has not been evaluated in this step")
    if found.value is None:
        return _unknown(check, found.problem or "the expression has no result")
    seen = traffic.total.requests
    if seen < min_requests:
        return _unknown(check, f"{seen} of at least {min_requests} requests in this step", found.value)
    return _compared(check, found.value, check.max)


def _compared(check: AnalysisCheck, value: float, limit: float) -> MeasureStatus:
    if value <= limit:
        return MeasureStatus(measure=check.measure, query=check.query, value=value, max=limit, passed=True)
    return _failed(check, value, limit, f"{value:.4g} is above the max, {limit:.4g}")


def _failed(check: AnalysisCheck, value: float | None, limit: float | None, message: str) -> MeasureStatus:
    return MeasureStatus(
        measure=check.measure,
        query=check.query,
        value=value,
        max=limit,
        passed=False,
        message=one_line(message, _MAX_MESSAGE),
    )


def _unknown(check: AnalysisCheck, message: str, value: float | None = None) -> MeasureStatus:
    return MeasureStatus(
        measure=check.measure,
        query=check.query,
        value=value,
        max=check.max,
        message=one_line(message, _MAX_MESSAGE),
    )


def _sum(total: Mapping[str, int], more: Mapping[int, int]) -> dict[str, int]:
    counts = Counter({int(number): count for number, count in total.items()})
    counts.update(more)
    return {str(number): counts[number] for number in sorted(counts)}


def _as_status(uid: str, traffic: Traffic, *, shadow: bool) -> PodTraffic:
    counts = traffic.shadow if shadow else traffic.served
    return PodTraffic(
        uid=uid,
        start=traffic.start,
        requests=counts.requests,
        errors=counts.errors,
        first_token=_sum({}, counts.first_token),
        per_output_token=_sum({}, counts.per_output_token),
    )


def _as_traffic(pod: PodTraffic, *, shadow: bool) -> Traffic:
    counts = TrafficCounts(
        requests=pod.requests,
        errors=pod.errors,
        first_token={int(number): count for number, count in pod.first_token.items()},
        per_output_token={int(number): count for number, count in pod.per_output_token.items()},
    )
    return Traffic(start=pod.start, shadow=counts) if shadow else Traffic(start=pod.start, served=counts)
