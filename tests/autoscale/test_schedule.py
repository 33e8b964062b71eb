from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from pydantic import ValidationError

from tunesmith.api.autoscaling import AdapterAutoscaling
from tunesmith.autoscale.schedule import Minimum, minimum, unknown_time_zone

OFFICE = {
    "minReplicas": 2,
    "start": "08:00",
    "end": "18:00",
    "days": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"],
    "timeZone": "Europe/Berlin",
}
NIGHT = {"minReplicas": 3, "start": "22:30", "end": "01:00", "days": ["Friday"]}


def rule(*schedules: dict[str, Any], maximum: int = 8) -> AdapterAutoscaling:
    return AdapterAutoscaling.model_validate({"minReplicas": 0, "maxReplicas": maximum, "schedules": list(schedules)})


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("2026-11-30T06:59:59+00:00", 0),
        ("2026-11-30T07:00:00+00:00", 2),  # a Monday, 8:00 in Berlin
        ("2026-11-30T16:59:59+00:00", 2),
        ("2026-11-30T17:00:00+00:00", 0),
        ("2026-11-29T10:00:00+00:00", 0),  # a Sunday
        ("2026-07-06T06:00:00+00:00", 2),  # summer time
        ("2026-07-06T16:00:00+00:00", 0),
    ],
)
def test_office_hours(time: str, expected: int) -> None:
    assert minimum(rule(OFFICE), datetime.fromisoformat(time)).replicas == expected


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("2026-12-04T22:29:59+00:00", 0),  # a Friday
        ("2026-12-04T22:30:00+00:00", 3),
        ("2026-12-05T00:59:59+00:00", 3),  # began on Friday
        ("2026-12-05T01:00:00+00:00", 0),
        ("2026-12-05T22:30:00+00:00", 0),
        ("2026-12-04T00:30:00+00:00", 0),
    ],
)
def test_a_schedule_may_end_on_the_next_day(time: str, expected: int) -> None:
    assert minimum(rule(NIGHT), datetime.fromisoformat(time)).replicas == expected


def test_the_highest_of_several_counts_and_is_named() -> None:
    both = rule(OFFICE, {"minReplicas": 1, "start": "00:00", "end": "00:00"})
    assert minimum(both, datetime.fromisoformat("2026-11-30T10:00:00+00:00")) == Minimum(
        2, "the schedule from 08:00 to 18:00 Europe/Berlin on Monday, Tuesday, Wednesday, Thursday, Friday"
    )
    assert minimum(both, datetime.fromisoformat("2026-11-29T10:00:00+00:00")) == Minimum(
        1, "the schedule from 00:00 to 00:00 UTC"
    )


@pytest.mark.parametrize("zone", ["Europe/Nowhere", "America", "UTC/x"])
def test_an_unknown_time_zone_is_reported(zone: str) -> None:
    wrong = rule(OFFICE, OFFICE | {"timeZone": zone})
    assert (unknown_time_zone(wrong) or "").startswith(f"spec.autoscaling.schedules[1].timeZone {zone} does not exist")
    assert minimum(rule(OFFICE | {"timeZone": zone}), datetime.fromisoformat("2026-11-30T10:00:00+00:00")).replicas == 0
    assert unknown_time_zone(rule(OFFICE)) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": "8:00"}, "a time of day is quoted"),
        ({"end": "24:00"}, "a time of day is quoted"),
        ({"timeZone": "../etc/passwd"}, "a time zone is a name"),
        ({"days": []}, "at least 1"),
        ({"minReplicas": 9}, "must not be above autoscaling.maxReplicas"),
    ],
)
def test_a_wrong_schedule_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        rule(OFFICE | changes)
