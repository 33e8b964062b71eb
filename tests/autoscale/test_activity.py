from __future__ import annotations

from tunesmith.autoscale.activity import Activity


def observe(activity: Activity, active: dict[str, int], start: int, seconds: int) -> list[frozenset[str]]:
    """Observe twice a second; each adapter is active in every n-th observation."""
    sets = []
    for step in range(2 * start, 2 * (start + seconds)):
        activity.observe([name for name, every in active.items() if step % every == 0], step / 2)
        sets.append(activity.busy)
    return sets


def test_adapters_that_are_active_much_of_the_time_are_busy() -> None:
    activity = Activity()
    observe(activity, {"always": 1, "rarely": 10}, 0, 120)
    assert activity.busy == {"always"}
    observe(activity, {"rarely": 10}, 120, 60)
    assert activity.busy == frozenset()


def test_a_short_use_makes_no_adapter_busy() -> None:
    activity = Activity()
    assert set(observe(activity, {"a": 1}, 0, 10)) == {frozenset()}


def test_an_adapter_between_the_thresholds_stays_as_it_is() -> None:
    activity = Activity()
    assert set(observe(activity, {"a": 3}, 0, 200)) == {frozenset()}
    observe(activity, {"a": 1}, 200, 60)
    assert set(observe(activity, {"a": 3}, 260, 200)) == {frozenset({"a"})}


def test_the_set_is_the_same_object_until_it_changes() -> None:
    activity = Activity()
    first, *rest = observe(activity, {"a": 1}, 0, 120)[100:]
    assert all(busy is first for busy in rest)


def test_a_clock_that_stands_still_changes_nothing() -> None:
    activity = Activity()
    for _ in range(1000):
        activity.observe(["a"], 5.0)
    assert activity.busy == frozenset()
