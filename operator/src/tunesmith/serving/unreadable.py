"""Status of a ServingPool or AdapterDeployment whose spec does not fit this release's schema."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from tunesmith.api.conditions import (
    AdapterDeploymentCondition,
    Condition,
    ConditionStatus,
    ServingPoolCondition,
    ServingPoolReason,
)
from tunesmith.serving.outcome import updated

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

_CONDITIONS: dict[str, dict[str, ConditionStatus]] = {
    "ServingPool": {
        ServingPoolCondition.AVAILABLE: ConditionStatus.UNKNOWN,
        ServingPoolCondition.DEGRADED: ConditionStatus.TRUE,
    },
    "AdapterDeployment": {
        AdapterDeploymentCondition.RESOLVED: ConditionStatus.FALSE,
        AdapterDeploymentCondition.READY: ConditionStatus.FALSE,
    },
}


def unreadable_status(manifest: Mapping[str, Any], message: str, now: datetime) -> dict[str, Any]:
    """Return the observed status with the conditions of an invalid spec.

    The pods of such a pool keep running, unobserved; such an adapter is not served.
    """
    status = manifest.get("status")
    kept = dict(status) if isinstance(status, dict) else {}
    conditions = _readable(kept.get("conditions"))
    outcomes = {
        type_: (value, ServingPoolReason.INVALID_SPEC, message)
        for type_, value in _CONDITIONS[manifest["kind"]].items()
    }
    conditions = updated(conditions, outcomes, manifest["metadata"].get("generation"), now)
    return {**kept, "conditions": [condition.manifest() for condition in conditions]}


def _readable(conditions: object) -> list[Condition]:
    found = []
    for condition in conditions if isinstance(conditions, list) else ():
        try:
            found.append(Condition.model_validate(condition))
        except ValidationError:
            continue
    return found
