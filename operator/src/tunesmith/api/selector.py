"""Label selector, as in Kubernetes' `metav1.LabelSelector`."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from tunesmith.api.model import ApiModel, Rule, StringPattern
from tunesmith.api.placement import LabelValue

if TYPE_CHECKING:
    from collections.abc import Mapping

_NAME = r"[a-zA-Z0-9]([-a-zA-Z0-9._]{0,61}[a-zA-Z0-9])?"
LabelKey = Annotated[
    str,
    Field(min_length=1, max_length=317),
    StringPattern(
        rf"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?{_NAME}$",
        "a label's key is a name, or a domain and a name, such as team or example.com/team",
    ),
]


class SelectorOperator(StrEnum):
    """Operator of a requirement."""

    IN = "In"
    NOT_IN = "NotIn"
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"


_WITH_VALUES = (SelectorOperator.IN, SelectorOperator.NOT_IN)


class SelectorRequirement(ApiModel):
    """Requirement on one label."""

    rules = (
        Rule(
            "(self.operator in ['In', 'NotIn']) == (has(self.values) && size(self.values) > 0)",
            "In and NotIn require values, Exists and DoesNotExist must not have any: change operator or values",
            lambda self: (self.operator in _WITH_VALUES) == bool(self.values),
        ),
    )

    key: LabelKey = Field(description="Key of the label.")
    operator: SelectorOperator = Field(
        description="Operator. In: the label's value is in values. NotIn: the label's value is not in "
        "values, or the label is absent. Exists: the label is present. DoesNotExist: the label is absent."
    )
    values: list[LabelValue] | None = Field(default=None, max_length=32, description="Values for In and NotIn.")

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Return True if the labels meet the requirement."""
        value = labels.get(self.key)
        if self.operator is SelectorOperator.EXISTS:
            return value is not None
        if self.operator is SelectorOperator.DOES_NOT_EXIST:
            return value is None
        return (value in (self.values or ())) == (self.operator is SelectorOperator.IN)


class LabelSelector(ApiModel):
    """Selector of objects by labels. All requirements must be met; without any, every object matches."""

    match_labels: dict[Annotated[str, Field(max_length=317)], LabelValue] | None = Field(
        default=None, max_length=32, description="Labels that must have exactly these values."
    )
    match_expressions: list[SelectorRequirement] | None = Field(
        default=None, max_length=16, description="Further requirements."
    )

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Return True if the labels meet every requirement."""
        exact = (self.match_labels or {}).items()
        return all(labels.get(key) == value for key, value in exact) and all(
            requirement.matches(labels) for requirement in self.match_expressions or ()
        )
