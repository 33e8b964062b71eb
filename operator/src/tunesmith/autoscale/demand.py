"""Requests that gateways report as running and waiting, per model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tunesmith.contracts.agent import GATEWAY_INTERNAL_PORT
from tunesmith.contracts.traffic import MAX_COMPARISONS

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from tunesmith.contracts.agent import AdapterDemand, GatewayDemand
    from tunesmith.contracts.traffic import Comparison

_REPORT_SILENCE_SECONDS = 10.0
"""Seconds of silence after which a gateway is reported; a shorter silence only keeps sizes from shrinking."""
DRAIN_SECONDS = 30.0
"""Time in which waiting requests are to be served. While a pod starts they accumulate; if each of them needed a place
of its own, as running ones do, a slow start would create many more pods than the arrivals need."""


@dataclass(frozen=True)
class Demand:
    """Requests for some models at one moment.

    Attributes:
        requests: those running and waiting.
        complete: True if every gateway reported. Otherwise the figures are lower bounds: they may raise a size but
            never lower one.
        active: number of models with requests.
        running: requests on pods.
        offered: requests that would be on pods at once if none had to wait, by Little's law: the arrival rate times the
            service time; 0 where the service time is not known yet.
        backlog: requests on pods at once that are needed to serve the waiting ones within `DRAIN_SECONDS`.
    """

    requests: int = 0
    complete: bool = False
    active: int = 0
    running: int = 0
    offered: float = 0.0
    backlog: float = 0.0

    def __add__(self, other: Demand) -> Demand:
        """Return the demand for both sets of models, which have none in common."""
        return Demand(
            self.requests + other.requests,
            self.complete and other.complete,
            self.active + other.active,
            self.running + other.running,
            self.offered + other.offered,
            self.backlog + other.backlog,
        )


@dataclass
class _Gateway:
    name: str
    last_report_at: float
    """Time of the last line, in seconds on a monotonic clock; before the first line, time at which the gateway
    appeared."""
    models: Mapping[str, AdapterDemand] | None = None
    """Latest line's demand by global id; None before the first line."""
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    """Latest comparison of each shadow, by its name in the engine."""
    error: str = ""
    """Cause of the last failed connection; empty after a line."""


class DemandTracker:
    """The latest line of each gateway's demand stream."""

    def __init__(self, silence_seconds: float, on_first_requests: Callable[[str], None] = lambda _: None) -> None:
        """Create an empty tracker.

        Args:
            silence_seconds: seconds without a line after which a gateway's demand is unknown.
            on_first_requests: called with the global id of a model when a gateway reports its first requests.
        """
        self._silence = silence_seconds
        self._on_first_requests = on_first_requests
        self._gateways: dict[str, _Gateway] = {}
        self._first_read_at: float | None = None
        self._listed = False

    def expect(self, gateways: Mapping[str, str], now: float) -> None:
        """Set the existing gateways, as names by UID, and discard the lines of all others."""
        self._listed = True
        self._gateways = {
            uid: self._gateways.get(uid) or _Gateway(name, last_report_at=now) for uid, name in gateways.items()
        }

    def record(self, uid: str, line: GatewayDemand, now: float) -> None:
        """Record a line of an existing gateway. `now`: seconds on a monotonic clock."""
        gateway = self._gateways.get(uid)
        if gateway is None:
            return
        before = gateway.models or {}
        gateway.last_report_at, gateway.error = now, ""
        gateway.models = line.models
        for model, demand in line.models.items():
            if _requests(demand) and not (model in before and _requests(before[model])):
                self._on_first_requests(model)
        gateway.comparisons |= line.comparisons
        while len(gateway.comparisons) > MAX_COMPARISONS:
            del gateway.comparisons[next(iter(gateway.comparisons))]

    def record_error(self, uid: str, error: str) -> None:
        """Record why a gateway could not be read."""
        gateway = self._gateways.get(uid)
        if gateway is not None:
            gateway.error = error

    def comparisons(self, engine_name: str) -> dict[str, Comparison]:
        """Return the comparison of a shadow at each gateway that has reported one, by the gateway's UID."""
        return {
            uid: gateway.comparisons[engine_name]
            for uid, gateway in self._gateways.items()
            if engine_name in gateway.comparisons
        }

    def read(self, models: Collection[str], now: float) -> Demand:
        """Return the requests for some models, from gateways with a line in the last `silence_seconds`."""
        fresh = [
            gateway.models
            for gateway in self._gateways.values()
            if gateway.models is not None and now - gateway.last_report_at <= self._silence
        ]
        complete = bool(fresh) and len(fresh) == len(self._gateways)
        found: dict[str, list[AdapterDemand]] = {}
        for line in fresh:
            if len(models) == 1:
                names: Iterable[str] = (model for model in models if model in line)
            else:
                names = line.keys() & models
            for model in names:
                found.setdefault(model, []).append(line[model])
        total = Demand(complete=complete)
        for reports in found.values():
            total += _sum(reports)
        return total

    def unknown_reason(self, now: float) -> str | None:
        """Return a sentence on why demand is not completely known; None if it is, or was until a moment ago."""
        self._first_read_at = now if self._first_read_at is None else self._first_read_at
        if not self._gateways:
            waited = self._listed or now - self._first_read_at > _REPORT_SILENCE_SECONDS
            return "no gateway is running" if waited else None
        silent = self._silent(now)
        if not silent:
            return None
        more = f" (and {len(silent) - 1} more)" if len(silent) > 1 else ""
        error = f": {silent[0].error}" if silent[0].error else ""
        return f"{silent[0].name} does not report its requests on port {GATEWAY_INTERNAL_PORT}{more}{error}"

    def silent(self, now: float) -> int:
        """Return the number of existing gateways that are silent."""
        return len(self._silent(now))

    def _silent(self, now: float) -> list[_Gateway]:
        silent = (
            gateway for gateway in self._gateways.values() if now - gateway.last_report_at > _REPORT_SILENCE_SECONDS
        )
        return sorted(silent, key=lambda gateway: gateway.name)


def demand_of(running: int, waiting: int, rate: float, service_seconds: float | None) -> Demand:
    """Return the demand for one model.

    Args:
        running: requests on pods.
        waiting: requests in gateways.
        rate: requests that arrive per second.
        service_seconds: mean time of a request on a pod; None if it is not known yet.
    """
    share = 1.0 if service_seconds is None else min(1.0, service_seconds / DRAIN_SECONDS)
    requests = running + waiting
    offered = rate * (service_seconds or 0.0)
    return Demand(
        requests, complete=True, active=int(requests > 0), running=running, offered=offered, backlog=waiting * share
    )


def _sum(reports: Sequence[AdapterDemand]) -> Demand:
    """Return the demand for one model over gateways, of which some may not know its service time yet."""
    rate = sum(report.arrival_rate for report in reports)
    known = [report for report in reports if report.service_seconds is not None]
    weight = sum(report.arrival_rate for report in known)
    seconds = None
    if known:
        parts = [(report.arrival_rate if weight else 1.0, report.service_seconds or 0.0) for report in known]
        seconds = sum(share * value for share, value in parts) / sum(share for share, _ in parts)
    running, waiting = sum(report.running for report in reports), sum(report.waiting for report in reports)
    return demand_of(running, waiting, rate, seconds)


def _requests(demand: AdapterDemand) -> int:
    return demand.running + demand.waiting
