"""Transitions of a resource's conditions: the next conditions from observed outcomes, and Events about the changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import ValidationError

from tunesmith.api.conditions import (
    AdapterDeploymentCondition,
    AdapterDeploymentReason,
    Condition,
    ConditionStatus,
    FailureReason,
    FineTuneJobCondition,
    ServingPoolCondition,
    ServingPoolReason,
    Severity,
    find,
    set_condition,
    severity_of,
)
from tunesmith.contracts.sentence import one_line

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from tunesmith.api.conditions import ConditionType, Reason

ConditionState = tuple[ConditionStatus, str, str]
"""Status, reason and message of a condition."""
Type = TypeVar("Type", bound=str)
MAX_MESSAGE = 4096
_UNREADABLE: Mapping[str, tuple[Reason, Mapping[ConditionType, ConditionStatus]]] = {
    "FineTuneJob": (FailureReason.INVALID_SPEC, {FineTuneJobCondition.VALIDATED: ConditionStatus.FALSE}),
    "ServingPool": (
        ServingPoolReason.INVALID_SPEC,
        {
            ServingPoolCondition.AVAILABLE: ConditionStatus.UNKNOWN,
            ServingPoolCondition.DEGRADED: ConditionStatus.TRUE,
        },
    ),
    "AdapterDeployment": (
        AdapterDeploymentReason.INVALID_SPEC,
        {
            AdapterDeploymentCondition.RESOLVED: ConditionStatus.FALSE,
            AdapterDeploymentCondition.READY: ConditionStatus.FALSE,
        },
    ),
}


def conditions_of(
    before: Sequence[Condition], outcomes: Mapping[Type, ConditionState], generation: int | None, now: datetime
) -> list[Condition]:
    """Return the conditions for the outcomes; previous conditions without an outcome are dropped.

    Args:
        before: the observed conditions.
        outcomes: by condition type.
        generation: the metadata.generation that was observed.
        now: the transition time of changed conditions.
    """
    return updated_conditions(
        [condition for condition in before if condition.type in outcomes], outcomes, generation, now
    )


def updated_conditions(
    before: Sequence[Condition], outcomes: Mapping[Type, ConditionState], generation: int | None, now: datetime
) -> list[Condition]:
    """Return the previous conditions, with those that have an outcome replaced."""
    conditions = list(before)
    for type_, (status, reason, message) in outcomes.items():
        new = Condition(
            type=type_,
            status=status,
            reason=reason,
            message=one_line(message, MAX_MESSAGE),
            last_transition_time=now,
            observed_generation=generation,
        )
        conditions = set_condition(conditions, new)
    return conditions


def unreadable_status(manifest: Mapping[str, Any], message: str, now: datetime) -> dict[str, Any]:
    """Return the status of a resource that does not fit this release's schema, with conditions that report it.

    The rest of the status is unchanged: a newer release may have written it. A FineTuneJob's Jobs and a pool's pods
    keep running, unobserved; an AdapterDeployment with such a status is not served.
    """
    kept = status_of(manifest)
    reason, types = _UNREADABLE[manifest["kind"]]
    outcomes = {type_: (value, reason, message) for type_, value in types.items()}
    conditions = updated_conditions(readable_conditions(kept), outcomes, manifest["metadata"].get("generation"), now)
    return {**kept, "reason": str(reason), "conditions": [condition.manifest() for condition in conditions]}


def status_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the status of a manifest; empty if it is missing or not an object."""
    status = manifest.get("status")
    return dict(status) if isinstance(status, dict) else {}


def readable_conditions(status: Mapping[str, Any]) -> list[Condition]:
    """Return the conditions of a status that fit this release's schema."""
    found = []
    conditions = status.get("conditions")
    for condition in conditions if isinstance(conditions, list) else ():
        try:
            found.append(Condition.model_validate(condition))
        except ValidationError:
            continue
    return found


@dataclass(frozen=True)
class NewEvent:
    """An Event to write."""

    reason: str
    message: str
    type: Literal["Normal", "Warning"] = "Normal"


def new_events(kind: str, before: Sequence[Condition], after: Sequence[Condition]) -> list[NewEvent]:
    """Return one Event for each reason among the conditions whose status or reason changed.

    The severity of the new reason decides: a warning becomes a Warning Event, news a Normal one, and a detail an Event
    only if it replaces a warning, which is then over.

    Args:
        kind: kind of the resource.
        before: conditions that were written last.
        after: conditions that are written now.
    """
    found: dict[str, NewEvent] = {}
    for condition in after:
        old = find(before, condition.type)
        if old is not None and (old.status, old.reason) == (condition.status, condition.reason):
            continue
        severity = severity_of(kind, condition.reason)
        replaces_warning = old is not None and severity_of(kind, old.reason) is Severity.WARNING
        if severity is Severity.DETAIL and not replaces_warning:
            continue
        type_: Literal["Normal", "Warning"] = "Warning" if severity is Severity.WARNING else "Normal"
        found.setdefault(condition.reason, NewEvent(condition.reason, condition.message, type_))
    return list(found.values())
