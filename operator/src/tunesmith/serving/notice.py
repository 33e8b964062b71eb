"""What changed between two lists of conditions, for Events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tunesmith.api.conditions import AdapterDeploymentCondition, ConditionStatus, ServingPoolCondition, find

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tunesmith.api.conditions import Condition

_GOOD = {
    ServingPoolCondition.AVAILABLE: ConditionStatus.TRUE,
    ServingPoolCondition.DEGRADED: ConditionStatus.FALSE,
    ServingPoolCondition.UPDATED: ConditionStatus.TRUE,
    ServingPoolCondition.SCALING_ACTIVE: ConditionStatus.TRUE,
    AdapterDeploymentCondition.RESOLVED: ConditionStatus.TRUE,
    AdapterDeploymentCondition.READY: ConditionStatus.TRUE,
}
_QUIET = frozenset({ServingPoolCondition.DEGRADED, ServingPoolCondition.UPDATED, ServingPoolCondition.SCALING_ACTIVE})
"""Conditions whose first observation is no news while it is a good one."""
_WAITING = frozenset(
    {
        "UpdatePending",
        "RollingOut",
        "FineTuneJobNotFound",
        "FineTuneJobRunning",
        "PoolNotReported",
        "PoolNotReady",
        "Loading",
        "NoPodReady",
    }
)


@dataclass(frozen=True)
class Notice:
    """An Event to write."""

    reason: str
    message: str
    type: Literal["Normal", "Warning"]


def notices(old: Sequence[Condition], new: Sequence[Condition]) -> list[Notice]:
    """One for each condition whose status or reason is another, and each sentence once."""
    found: dict[str, Notice] = {}
    for condition in new:
        good = next((status for type_, status in _GOOD.items() if type_ == condition.type), None)
        before = find(old, condition.type)
        if good is None or (
            before is not None and (before.status, before.reason) == (condition.status, condition.reason)
        ):
            continue
        if condition.type in _QUIET and before is None and condition.status is good:
            continue
        harmless = condition.status is good or condition.reason in _WAITING
        found[condition.message] = Notice(condition.reason, condition.message, "Normal" if harmless else "Warning")
    return list(found.values())
