"""Minimum that the schedules of an autoscaling rule ask for. Pure: the time is an argument."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

from tunesmith.api.autoscaling import Weekday

if TYPE_CHECKING:
    from datetime import datetime

    from tunesmith.api.autoscaling import Autoscaling, Schedule

_DAYS = tuple(Weekday)
"""Days as `datetime.weekday` numbers them."""


@dataclass(frozen=True)
class Minimum:
    """Lowest size, and where it comes from: `minReplicas`, or a schedule as words."""

    replicas: int
    source: str = "minReplicas"


def minimum(rule: Autoscaling, now: datetime) -> Minimum:
    """Return the lowest size at a time. `now`: with a time zone.

    A schedule whose time zone is unknown has no effect; see `unknown_time_zone`.
    """
    found = [Minimum(rule.min_replicas)]
    applying = (schedule for schedule in rule.schedules or () if _applies(schedule, now))
    found += [Minimum(schedule.min_replicas, _words(schedule)) for schedule in applying]
    return max(found, key=lambda entry: entry.replicas)


def unknown_time_zone(rule: Autoscaling) -> str | None:
    """Return a sentence about the first time zone that does not exist; None if all exist."""
    for index, schedule in enumerate(rule.schedules or ()):
        if _zone(schedule.time_zone) is None:
            return (
                f"spec.autoscaling.schedules[{index}].timeZone {schedule.time_zone} does not exist, so this schedule "
                "has no effect: use a name of the IANA database, such as Europe/Berlin"
            )
    return None


def _applies(schedule: Schedule, now: datetime) -> bool:
    zone = _zone(schedule.time_zone)
    if zone is None:
        return False
    local = now.astimezone(zone)
    time, today = local.strftime("%H:%M"), _DAYS[local.weekday()]
    yesterday = _DAYS[(local - timedelta(days=1)).weekday()]
    days = schedule.days or _DAYS
    if schedule.start < schedule.end:
        return today in days and schedule.start <= time < schedule.end
    return (today in days and time >= schedule.start) or (yesterday in days and time < schedule.end)


def _words(schedule: Schedule) -> str:
    days = "" if schedule.days is None else f" on {', '.join(schedule.days)}"
    return f"the schedule from {schedule.start} to {schedule.end} {schedule.time_zone}{days}"


@lru_cache(maxsize=1024)
def _zone(name: str) -> ZoneInfo | None:
    try:
        return ZoneInfo(name)
    except (KeyError, OSError, ValueError):  # unknown names are a KeyError, names of folders an OSError
        return None
