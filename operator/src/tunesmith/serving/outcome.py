"""Outcomes of a pool's and an adapter's conditions, and the list of conditions that follows."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from tunesmith.api.conditions import Condition, ConditionStatus, set_condition
from tunesmith.contracts.sentence import one_line

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

Outcome = tuple[ConditionStatus, str, str]
"""Status, reason and message of a condition."""
Type = TypeVar("Type", bound=str)
LONGEST_MESSAGE = 2000


def conditions_of(
    before: Sequence[Condition], outcomes: Mapping[Type, Outcome], generation: int | None, now: datetime
) -> list[Condition]:
    """Return the conditions of the outcomes; those before that have no outcome are dropped.

    Args:
        before: the observed conditions.
        outcomes: by condition type.
        generation: the metadata.generation that the outcomes are about.
        now: the time of what changed.
    """
    return updated([condition for condition in before if condition.type in outcomes], outcomes, generation, now)


def updated(
    before: Sequence[Condition], outcomes: Mapping[Type, Outcome], generation: int | None, now: datetime
) -> list[Condition]:
    """Return the conditions with those of the outcomes in place of the ones before; the others stay."""
    conditions = list(before)
    for type_, (status, reason, message) in outcomes.items():
        new = Condition(
            type=type_,
            status=status,
            reason=reason,
            message=one_line(message, LONGEST_MESSAGE),
            last_transition_time=now,
            observed_generation=generation,
        )
        conditions = set_condition(conditions, new)
    return conditions
