"""`tunesmith status`: the order of resources, and the sentence about all of them."""

from __future__ import annotations

import pytest

from tunesmith.cli.rows import ResourceRow
from tunesmith.cli.status import Urgency, by_urgency, counts, urgency


def row(kind: str, name: str, state: str) -> ResourceRow:
    return ResourceRow(kind, "team", name, state, "1m", "")


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("Failed", Urgency.PROBLEM),
        ("Degraded", Urgency.PROBLEM),
        ("Stalled", Urgency.PROBLEM),
        ("RollingOut", Urgency.IN_PROGRESS),
        ("Unknown", Urgency.PROBLEM),
        *((state, Urgency.IN_PROGRESS) for state in ("Pending", "Validating", "Queued", "Running", "Suspended")),
        *((state, Urgency.IN_PROGRESS) for state in ("Waiting", "Loading")),
        *((state, Urgency.DONE) for state in ("Complete", "Ready", "Available")),
    ],
)
def test_every_state_has_its_place(state: str, expected: Urgency) -> None:
    assert urgency(row("job", "a", state)) is expected


def test_problems_come_first_and_serving_before_training() -> None:
    rows = [
        row("job", "done", "Complete"),
        row("job", "broken", "Failed"),
        row("adapter", "loading", "Loading"),
        row("adapter", "broken", "Failed"),
        row("pool", "fine", "Available"),
        row("pool", "broken", "Degraded"),
    ]
    ordered = [f"{entry.kind} {entry.name}" for entry in by_urgency(rows)]
    assert ordered == ["pool broken", "adapter broken", "job broken", "adapter loading", "pool fine", "job done"]
    assert counts(rows) == "3 need action, 1 is in progress, 2 are fine."
