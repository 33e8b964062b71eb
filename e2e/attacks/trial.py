"""An attack and its outcome: observations, effect on the victim, and the row of the table."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from e2e.installation import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from e2e.attacks.victim import Figures, Victim

STATUS_SECONDS = 10.0
RECOVERY_SECONDS = 60.0
TOLERANCE = 1.5
"""Factor by which the victim's 95th percentile may grow."""
GRAIN_SECONDS = 0.25
"""Growth below this is ignored: on two cores, a neighbour's tokens and the attacker itself cause as much."""
MIN_REQUESTS = 12
"""Requests of the victim for a figure of an attack that takes no time."""


@dataclass
class Outcome:
    """Row of the table."""

    row: str
    attack: str
    seen: list[str] = field(default_factory=list)
    before: Figures | None = None
    during: Figures | None = None
    status_seconds: float | None = None
    recovery_seconds: float | None = None
    reason: str = ""
    verdict: str = "not run"
    proof: str = "cluster"

    def cells(self) -> list[str]:
        """Return the row's texts, in the order of HEADER."""
        right = f"{self.during.right}/{self.during.total}" if self.during else "–"
        p95 = f"{self.before.p95:.2f} / {self.during.p95:.2f}" if self.before and self.during else "–"
        factor = (
            f"{self.during.p95 / self.before.p95:.1f} ×" if self.before and self.during and self.before.p95 else "–"
        )
        return [
            self.row,
            self.attack,
            "; ".join(self.seen) or "–",
            right,
            p95,
            factor,
            seconds(self.status_seconds),
            seconds(self.recovery_seconds),
            self.proof,
            self.verdict,
        ]


HEADER = (
    "Row",
    "Attack",
    "Observed",
    "Victim right",
    "p95 s before / during",
    "Factor",
    "Status after s",
    "Recovered after s",
    "Proved by",
    "Verdict",
)


def seconds(value: float | None) -> str:
    """Return a duration as text for the table."""
    return "–" if value is None else f"{value:.1f}"


def table(outcomes: list[Outcome]) -> str:
    """Return the outcomes as a Markdown table."""
    lines = [" | ".join(HEADER), " | ".join("---" for _ in HEADER)]
    lines += [" | ".join(_cell(text) for text in outcome.cells()) for outcome in outcomes]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())[:600]


class Trial:
    """Measurement of the victim while an attack runs, with the observations."""

    def __init__(self, outcome: Outcome, victim: Victim) -> None:
        self.outcome = outcome
        self._victim = victim
        self.began = time.monotonic()

    def observe(self, text: object) -> None:
        """Record an observation for the table."""
        self.outcome.seen.append(str(text))

    @contextmanager
    def attack(self, *, tolerance: float = TOLERANCE, outage_seconds: float = 0.0, reason: str = "") -> Iterator[None]:
        """Run the block as the attack, and check the replies that the victim got meanwhile.

        Args:
            tolerance: how much the victim's 95th percentile may grow.
            outage_seconds: how long the victim's requests may be refused, where the attack ends the process that
                serves both. Wrong answers are never tolerated.
            reason: why more than TOLERANCE or an outage is right, for the table.

        Raises:
            AssertionError: the victim was harmed.
        """
        self.outcome.before = before = self._victim.undisturbed()
        self.outcome.reason = reason or self.outcome.reason
        self.began = time.monotonic()
        try:
            yield
            enough = self.began + MIN_REQUESTS * self._victim.period
            until("the victim's requests", lambda: time.monotonic() >= enough, 60)
        finally:
            during = self._victim.between(self.began, time.monotonic())
            self.outcome.during = during
            self._victim.disturbed()
        assert not during.wrong, f"{during.wrong} wrong answers to the victim: {during.examples}"
        if outage_seconds:
            took = self._victim.outage(self.began)
            assert took <= outage_seconds, f"the victim was refused for {took:.0f} s: {during.examples}"
        else:
            assert not during.refused, f"{during.refused} of the victim's requests failed: {during.examples}"
        limit = before.p95 * tolerance + GRAIN_SECONDS
        if not outage_seconds:
            assert during.p95 <= limit, f"the victim's p95 rose from {before.p95:.2f} s to {during.p95:.2f} s"

    def status(self, name: str, probe: Callable[[], Any], within: float = STATUS_SECONDS, timeout: float = 60) -> Any:  # noqa: ANN401 - the probe's value
        """Wait until a status shows the fault, and record the time since the attack began.

        Raises:
            AssertionError: it took longer than `within`.
        """
        value = until(name, probe, timeout, interval=0.25)
        took = time.monotonic() - self.began
        self.outcome.status_seconds = took
        assert took <= within, f"{name}: only after {took:.1f} s"
        return value

    def recovered(
        self, name: str, probe: Callable[[], Any], within: float = RECOVERY_SECONDS, timeout: float = 240
    ) -> Any:  # noqa: ANN401 - the probe's value
        """Wait for the recovery, and record the time since the attack began.

        Raises:
            AssertionError: it took longer than `within`.
        """
        value = until(name, probe, timeout, interval=0.25)
        took = time.monotonic() - self.began
        self.outcome.recovery_seconds = took
        assert took <= within, f"{name}: only after {took:.1f} s"
        return value

    def victim_recovers(self, within: float = RECOVERY_SECONDS) -> None:
        """Wait until the victim gets correct answers again."""
        begin = self.began
        self.recovered("the victim is answered right again", lambda: self._victim.recovered(begin), within)
