"""Autoscaling of an adapter's copies and of a pool's pods."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from tunesmith.api.model import ApiModel, Rule, StringPattern

MAX_SCHEDULES = 16
min_below_max = Rule(
    "self.minReplicas <= self.maxReplicas",
    "autoscaling.minReplicas must not be above autoscaling.maxReplicas",
    lambda self: self.min_replicas <= self.max_replicas,
)
_schedules_below_max = Rule(
    "!has(self.schedules) || self.schedules.all(s, s.minReplicas <= self.maxReplicas)",
    "autoscaling.schedules[].minReplicas must not be above autoscaling.maxReplicas",
    lambda self: all(schedule.min_replicas <= self.max_replicas for schedule in self.schedules or ()),
)
replicas_or_autoscaling = Rule(
    # While autoscaling is set, replicas does not change; when autoscaling is added, replicas is the default or
    # unchanged.
    "!has(self.autoscaling) || (oldSelf.hasValue() && self.replicas == oldSelf.value().replicas) || "
    "(self.replicas == 1 && !(oldSelf.hasValue() && has(oldSelf.value().autoscaling)))",
    "replicas is set by autoscaling: remove autoscaling first",
    old=True,
)
TimeOfDay = Annotated[
    str,
    Field(max_length=5),
    StringPattern(r"^([01][0-9]|2[0-3]):[0-5][0-9]$", 'a time of day is quoted and has four digits, such as "08:30"'),
]
TimeZone = Annotated[
    str,
    Field(max_length=64),
    StringPattern(
        r"^[A-Za-z][A-Za-z0-9_+-]*(/[A-Za-z0-9_+-]+){0,2}$",
        "a time zone is a name of the IANA database, such as Europe/Berlin or UTC",
    ),
]


class Weekday(StrEnum):
    """Day of the week."""

    MONDAY = "Monday"
    TUESDAY = "Tuesday"
    WEDNESDAY = "Wednesday"
    THURSDAY = "Thursday"
    FRIDAY = "Friday"
    SATURDAY = "Saturday"
    SUNDAY = "Sunday"


class Schedule(ApiModel):
    """Higher minimum at certain times."""

    min_replicas: int = Field(ge=1, le=1000, description="Minimum between start and end.")
    start: TimeOfDay = Field(description="Start, by the clock of the time zone.")
    end: TimeOfDay = Field(
        description="End, by the clock of the time zone; on the next day if it is not after the start. The minimum "
        "falls back at this time."
    )
    days: list[Weekday] | None = Field(
        default=None, min_length=1, max_length=7, description="Days on which it starts. Absent: every day."
    )
    time_zone: TimeZone = Field(default="UTC", description="Time zone, such as Europe/Berlin.")


class Autoscaling(ApiModel):
    """Bounds, times and target of autoscaling."""

    rules = (min_below_max, _schedules_below_max)

    min_replicas: int = Field(default=1, ge=0, le=1000)
    max_replicas: int = Field(ge=1, le=1000, description="Maximum number of pods.")
    target_concurrency: int = Field(default=8, ge=1, le=10000)
    scale_down_delay_seconds: int = Field(
        default=120, ge=0, le=86400, description="Seconds for which a smaller number must suffice before it is lowered."
    )
    idle_seconds: int = Field(
        default=300, ge=10, le=86400, description="Seconds without a request before the number falls to 0."
    )
    schedules: list[Schedule] | None = Field(
        default=None,
        max_length=MAX_SCHEDULES,
        description="Times at which the minimum is higher. Where several apply, the highest counts. Absent: none.",
    )


class AdapterAutoscaling(Autoscaling):
    """Bounds and target for the number of pods on which the adapter is resident."""

    min_replicas: int = Field(
        default=1,
        ge=0,
        le=1000,
        description="Minimum number of pods. 0: an idle adapter is unregistered. Its model name stays, and the next "
        "request waits until it is registered again.",
    )
    target_concurrency: int = Field(
        default=8,
        ge=1,
        le=10000,
        description="Target number of running and waiting requests per pod on which the adapter is resident.",
    )


class PoolAutoscaling(Autoscaling):
    """Bounds and target for the number of pods."""

    min_replicas: int = Field(
        default=1,
        ge=0,
        le=1000,
        description="Minimum number of pods. 0: an idle pool has no pods. The next request waits for one for up to "
        "holdSeconds.",
    )
    target_concurrency: int = Field(
        default=16,
        ge=1,
        le=10000,
        description="Target number of concurrent requests per pod, over all adapters and the base model.",
    )
