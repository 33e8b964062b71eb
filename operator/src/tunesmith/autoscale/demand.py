"""Requests that gateways report as running and waiting, per model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tunesmith.contracts.agent import GATEWAY_INTERNAL_PORT
from tunesmith.contracts.traffic import MAX_COMPARISONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from tunesmith.contracts.agent import GatewayDemand
    from tunesmith.contracts.traffic import Comparison

_REPORT_SILENCE_SECONDS = 10.0
"""Seconds of silence after which a gateway is reported; a shorter silence only keeps sizes from shrinking."""


@dataclass(frozen=True)
class Demand:
    """Requests running and waiting for some models at one moment.

    `active`: number of models with requests. `complete`: True if every gateway reported. Otherwise the figures are
    lower bounds: they may raise a size but never lower one.
    """

    requests: int = 0
    complete: bool = False
    active: int = 0


@dataclass
class _Gateway:
    name: str
    last_report_at: float
    """Time of the last line, in seconds on a monotonic clock; before the first line, time at which the gateway
    appeared."""
    counts: Mapping[str, int] | None = None
    """Requests by global id; None before the first line."""
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
        before = gateway.counts or {}
        gateway.last_report_at, gateway.error = now, ""
        gateway.counts = {model: demand.running + demand.waiting for model, demand in line.models.items()}
        for model, count in gateway.counts.items():
            if count and not before.get(model):
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

    def read(self, models: Iterable[str], now: float) -> Demand:
        """Return the requests for some models, from gateways with a line in the last `silence_seconds`."""
        fresh = [
            gateway.counts
            for gateway in self._gateways.values()
            if gateway.counts is not None and now - gateway.last_report_at <= self._silence
        ]
        complete = bool(fresh) and len(fresh) == len(self._gateways)
        by_model = [sum(counts.get(model, 0) for counts in fresh) for model in models]
        return Demand(sum(by_model), complete, sum(1 for count in by_model if count))

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
