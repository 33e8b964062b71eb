from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.api.conditions import Condition, ConditionStatus
from tunesmith.serving.notice import Notice, notices

if TYPE_CHECKING:
    from datetime import datetime


def test_what_changed_is_told_once_and_as_a_warning_where_somebody_must_act(start: datetime) -> None:
    def condition(type_: str, status: str, reason: str, message: str) -> Condition:
        return Condition(
            type=type_, status=ConditionStatus(status), reason=reason, message=message, last_transition_time=start
        )

    waits = [
        condition("Resolved", "False", "FineTuneJobNotFound", "waits for job"),
        condition("Ready", "False", "FineTuneJobNotFound", "waits for job"),
        condition("Progressing", "False", "FineTuneJobNotFound", "waits for job"),
    ]
    assert notices([], waits) == [Notice("FineTuneJobNotFound", "waits for job", "Normal")]
    assert notices(waits, waits) == []
    broken = [waits[0], condition("Ready", "False", "RevisionFailed", "flipped byte"), waits[2]]
    assert notices(waits, broken) == [Notice("RevisionFailed", "flipped byte", "Warning")]
    ready = [condition("Ready", "True", "Resident", "it answers")]
    assert notices(broken, ready) == [Notice("Resident", "it answers", "Normal")]


def test_a_pool_without_a_problem_says_nothing(start: datetime) -> None:
    well = Condition(type="Degraded", status=ConditionStatus.FALSE, reason="AsExpected", last_transition_time=start)
    assert notices([], [well]) == []
    bad = well.model_copy(update={"status": ConditionStatus.TRUE, "reason": "ImagePullFailed", "message": "no image"})
    assert notices([well], [bad]) == [Notice("ImagePullFailed", "no image", "Warning")]
