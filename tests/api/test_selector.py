"""Label selectors, held to the cases of Kubernetes' own."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from tunesmith.api.selector import LabelSelector
from tunesmith.api.servingpool import AllowedNamespaces

PAID = {"matchLabels": {"tier": "paid"}}


def requirement(operator: str, *values: str) -> dict[str, Any]:
    found: dict[str, Any] = {"key": "tier", "operator": operator}
    return {"matchExpressions": [found | ({"values": list(values)} if values else {})]}


@pytest.mark.parametrize(
    ("selector", "paid", "free", "none"),
    [
        ({}, True, True, True),
        (PAID, True, False, False),
        (requirement("In", "paid", "trial"), True, False, False),
        (requirement("NotIn", "paid"), False, True, True),
        (requirement("Exists"), True, True, False),
        (requirement("DoesNotExist"), False, False, True),
        ({**PAID, **requirement("NotIn", "paid")}, False, False, False),
    ],
    ids=["empty", "matchLabels", "In", "NotIn", "Exists", "DoesNotExist", "all must hold"],
)
def test_labels_match_as_in_kubernetes(selector: dict[str, Any], paid: bool, free: bool, none: bool) -> None:  # noqa: FBT001
    parsed = LabelSelector.model_validate(selector)
    found = [parsed.matches(labels) for labels in ({"tier": "paid", "a": "b"}, {"tier": "free"}, {})]
    assert found == [paid, free, none]


@pytest.mark.parametrize(
    "document",
    [
        {"from": "Selector"},
        {"from": "All", "selector": PAID},
        {"selector": PAID},
        {"from": "Selector", "selector": requirement("In")},
        {"from": "Selector", "selector": requirement("Exists", "paid")},
        {"from": "Selector", "selector": {"matchExpressions": [{"key": "a b", "operator": "Exists"}]}},
        {"from": "Selector", "selector": {"matchLabels": {"tier": "a b"}}},
    ],
)
def test_contradictory_selectors_are_refused(document: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AllowedNamespaces.model_validate(document)


@pytest.mark.parametrize(
    ("document", "admitted"),
    [({"from": "Same"}, False), ({"from": "All"}, True), ({"from": "Selector", "selector": PAID}, True)],
    ids=["Same", "All", "Selector"],
)
def test_a_pool_admits_its_own_namespace_and_those_that_it_names(document: dict[str, Any], admitted: bool) -> None:  # noqa: FBT001
    allowed = AllowedNamespaces.model_validate(document)
    assert allowed.admits("platform", "platform", None)
    assert allowed.admits("platform", "team", {"tier": "paid"}) is admitted
    assert allowed.admits("platform", "team", None) is (document["from"] == "All")
