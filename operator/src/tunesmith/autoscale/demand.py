"""What the gateways say is running and waiting, per model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tunesmith.contracts.agent import GatewayDemand


@dataclass(frozen=True)
class Demand:
    """Requests running and waiting at one moment.

    `models`: by global id, `<namespace>/<modelName>`; an absent id has none. `complete`: whether every gateway was
    heard. When it is False the figures are a lower bound: they may raise a size and never lower one.
    """

    models: Mapping[str, int] = field(default_factory=dict)
    complete: bool = False

    def of(self, models: Iterable[str]) -> int:
        """Requests for these models together."""
        return sum(self.models.get(model, 0) for model in models)


class DemandBoard:
    """The last line of each gateway's demand stream."""

    def __init__(self, silence_seconds: float) -> None:
        """`silence_seconds`: after this long without a line, a gateway's demand is unknown."""
        self._silence = silence_seconds
        self._lines: dict[str, tuple[float, dict[str, int]] | None] = {}
        self._errors: dict[str, str] = {}

    def expect(self, gateways: Iterable[str]) -> None:
        """Set which gateways exist; what others said is forgotten."""
        names = set(gateways)
        self._lines = {name: self._lines.get(name) for name in names}
        self._errors = {name: error for name, error in self._errors.items() if name in names}

    def record(self, gateway: str, line: GatewayDemand, now: float) -> None:
        """Keep a line of a gateway that exists. `now`: seconds on a monotonic clock."""
        if gateway in self._lines:
            self._lines[gateway] = (
                now,
                {model: demand.running + demand.waiting for model, demand in line.models.items()},
            )

    def fail(self, gateway: str, error: str) -> None:
        """Record why a gateway could not be heard."""
        if gateway in self._lines:
            self._errors[gateway] = error

    def read(self, now: float) -> Demand:
        """The sum over the gateways that were heard in the last `silence_seconds`."""
        models: dict[str, int] = {}
        fresh = [entry[1] for entry in self._lines.values() if entry is not None and now - entry[0] <= self._silence]
        for line in fresh:
            for model, count in line.items():
                models[model] = models.get(model, 0) + count
        return Demand(models, complete=bool(self._lines) and len(fresh) == len(self._lines))
