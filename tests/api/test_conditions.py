from __future__ import annotations

from datetime import UTC, datetime, timedelta

from tunesmith.api.conditions import Condition, ConditionStatus, find, is_true, set_condition

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LATER = NOW + timedelta(minutes=1)


def condition(status: ConditionStatus, time: datetime, type_: str = "Ready", message: str = "") -> Condition:
    return Condition(type=type_, status=status, reason="Because", message=message, last_transition_time=time)


def test_a_new_condition_is_appended() -> None:
    conditions = set_condition(
        [condition(ConditionStatus.TRUE, NOW, "Resolved")], condition(ConditionStatus.FALSE, NOW)
    )
    assert [each.type for each in conditions] == ["Resolved", "Ready"]
    assert is_true(conditions, "Resolved")
    assert not is_true(conditions, "Ready")
    assert find(conditions, "Progressing") is None


def test_the_transition_time_is_kept_while_the_status_is_unchanged() -> None:
    before = [condition(ConditionStatus.FALSE, NOW, message="one of two pods")]
    (after,) = set_condition(before, condition(ConditionStatus.FALSE, LATER, message="two of two pods"))
    assert (after.last_transition_time, after.message) == (NOW, "two of two pods")


def test_the_transition_time_changes_with_the_status() -> None:
    (after,) = set_condition([condition(ConditionStatus.FALSE, NOW)], condition(ConditionStatus.TRUE, LATER))
    assert after.last_transition_time == LATER
