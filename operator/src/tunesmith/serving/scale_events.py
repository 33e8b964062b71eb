"""Events about the size of a pool or an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.api.conditions import EventReason
from tunesmith.contracts.transitions import NewEvent

if TYPE_CHECKING:
    from tunesmith.api.adapterdeployment import AdapterDeploymentStatus
    from tunesmith.api.servingpool import ServingPoolStatus


def scale_events(unit: str, before: int | None, status: AdapterDeploymentStatus | ServingPoolStatus) -> list[NewEvent]:
    """Return the Event about a changed number of desired pods or copies; empty if it did not change or is the first.

    Args:
        unit: `pods` or `copies`.
        before: previous desired number; None for a new resource.
        status: the status that is written now.
    """
    after = status.desired_replicas
    if before is None or after is None or after == before:
        return []
    reason = EventReason.SCALED_UP if after > before else EventReason.SCALED_DOWN
    return [NewEvent(reason, f"{before} → {after} {unit}: {status.desired_reason}")]
