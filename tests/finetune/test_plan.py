from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tests.finetune import cases_of_attempts, cases_of_endings, cases_of_pauses, cases_of_refusals, cases_of_validation
from tests.finetune.worlds import STORE
from tunesmith.finetune.plan import plan

if TYPE_CHECKING:
    from tests.finetune.plan_cases import Case

CASES = [
    pytest.param(case, id=name)
    for subject in (cases_of_validation, cases_of_attempts, cases_of_pauses, cases_of_refusals, cases_of_endings)
    for name, case in subject.CASES.items()
]


@pytest.mark.parametrize("case", CASES)
def test_plan(case: Case) -> None:
    decided = plan(case.observation, STORE)
    assert decided.actions == case.actions
    status = decided.status
    assert {entry.type: (entry.status, entry.reason) for entry in status.conditions} == case.conditions
    assert status.phase == case.phase
    assert status.reason in {entry.reason for entry in status.conditions}
    assert case.message in " | ".join(entry.message for entry in status.conditions)
    assert tuple(entry.outcome for entry in status.attempts) == case.outcomes


@pytest.mark.parametrize("case", CASES)
def test_a_second_plan_does_not_change_the_status(case: Case) -> None:
    """The written status is stable while nothing else changes."""
    first = plan(case.observation, STORE)
    if first.actions:
        return
    again = replace(case.observation, job=case.observation.job.model_copy(update={"status": first.status}))
    second = plan(again, STORE)
    assert second.status.manifest() == first.status.manifest()
