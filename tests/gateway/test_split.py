"""Revisions share requests by weight."""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from tests.gateway.gateway_rig import adapter_manifest, eventually
from tunesmith.gateway.split import Points, in_order, session_point

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.gateway.gateway_rig import Rig

NEW, OLD = "team/pirate@bbbbbbbbbbbb", "team/pirate@aaaaaaaaaaaa"


@pytest.mark.parametrize("weight", [0, 1, 5, 10, 33, 50, 90, 99, 100])
def test_weights_hold_within_2_percent_of_any_thousand_requests(weight: int) -> None:
    points = Points(lambda _: True)
    chosen = [in_order((NEW, OLD), (weight, 100 - weight), points.next("team/pirate"))[0] for _ in range(3000)]
    for start in (0, 333, 2000):
        assert chosen[start : start + 1000].count(NEW) == pytest.approx(10 * weight, abs=20)


def test_models_and_replicas_have_points_of_their_own() -> None:
    points, other = Points(lambda _: True), Points(lambda _: True)
    assert len({points.next("team/a"), points.next("team/b"), other.next("team/a")}) == 3


def test_points_of_deleted_models_are_forgotten() -> None:
    points = Points(lambda _: False)
    for number in range(10_000):
        points.next(f"team/{number}")
    assert len(points._points) < 300


def test_a_higher_weight_moves_sessions_only_to_the_newest_revision() -> None:
    sessions = [f"session-{number}".encode() for number in range(5000)]
    on_new: set[bytes] = set()
    for weight in (0, 1, 5, 20, 50, 100):
        found = {
            session
            for session in sessions
            if in_order((NEW, OLD), (weight, 100 - weight), session_point(session, NEW))[0] == NEW
        }
        assert on_new <= found
        assert len(found) == pytest.approx(50 * weight, abs=100)
        on_new = found


def test_another_rollout_begins_with_other_sessions() -> None:
    sessions = [f"session-{number}".encode() for number in range(5000)]
    first = {session for session in sessions if session_point(session, NEW) < 0.1}
    second = {session for session in sessions if session_point(session, OLD) < 0.1}
    assert len(first & second) < 0.3 * len(first)


@pytest.mark.parametrize(
    ("weights", "point", "expected"),
    [
        ((100, 0, 0), 0.99, ["n"]),
        ((0, 100, 0), 0.0, ["m"]),
        ((10, 20, 70), 0.05, ["n", "o", "m"]),
        ((10, 20, 70), 0.15, ["m", "o", "n"]),
        ((10, 20, 70), 0.95, ["o", "m", "n"]),
        ((10, 0, 90), 0.5, ["o", "n"]),
        ((1, 0, 1), 0.5, ["o", "n"]),
        ((1, 1, 1), 1 - 1e-17, ["o", "m", "n"]),
    ],
)
def test_a_revision_without_a_weight_never_answers(weights: tuple[int, ...], point: float, expected: list[str]) -> None:
    assert in_order(("n", "m", "o"), weights, point) == expected


def rollout(weight: int) -> dict[str, Any]:
    """An adapter whose newest revision has a weight."""
    return adapter_manifest("pirate", digests=("b", "a"), weights=(weight, 100 - weight))


async def put(rig: Rig, document: dict[str, Any]) -> None:
    """Change the adapter, and wait until the gateway knows."""
    before = rig.gateway.catalog._models.get("team/pirate")
    rig.watches.put(document)
    await eventually(lambda: rig.gateway.catalog._models.get("team/pirate") is not before, "the change is known")


async def answered_by(rig: Rig, count: int, **options: Any) -> Counter[str]:
    found: Counter[str] = Counter()
    for _ in range(count):
        status, answer = await rig.chat("pirate", **options)
        assert status == 200
        found[answer["model"]] += 1
    return found


async def test_requests_are_divided_by_weight(rig: Rig) -> None:
    await rig.add_pod(NEW, OLD)
    await put(rig, rollout(20))
    assert (await answered_by(rig, 1000))[NEW] == pytest.approx(200, abs=20)
    await put(rig, rollout(0))
    assert await answered_by(rig, 20) == {OLD: 20}


async def test_a_session_stays_with_its_revision(rig: Rig) -> None:
    await rig.add_pod(NEW, OLD)
    await put(rig, rollout(50))
    for session in (f"someone-{number}" for number in range(8)):
        assert len(await answered_by(rig, 10, user=session)) == 1
        assert len(await answered_by(rig, 10, session=session)) == 1
    assert len(await answered_by(rig, 40, user=7)) == 2  # only a string names a session
    assert len({tuple(await answered_by(rig, 1, session=f"{number}")) for number in range(40)}) == 2


async def test_an_explicit_revision_ignores_the_weights(rig: Rig) -> None:
    await rig.add_pod(NEW, OLD)
    await put(rig, rollout(0))
    for name in (NEW, OLD):
        status, answer = await rig.chat(name)
        assert (status, answer["model"]) == (200, name)


@pytest.mark.parametrize("problem", ["not resident", "refuses", "gone"])
async def test_the_other_revision_answers_if_the_chosen_one_cannot(
    start: Callable[..., Awaitable[Rig]], problem: str
) -> None:
    rig = await start(hold_seconds=0.5)
    await rig.add_pod(OLD)
    second = await rig.add_pod(*(() if problem == "not resident" else (NEW,)))
    await put(rig, rollout(50))
    if problem == "refuses":
        second.draining = True
    elif problem == "gone":
        await second.stop("engine")
    assert await answered_by(rig, 20) == {OLD: 20}
    status, _ = await rig.chat(NEW)
    assert status in {502, 503}


async def test_random_weights_never_lose_a_request(rig: Rig) -> None:
    await rig.add_pod(NEW, OLD)
    numbers = random.Random(5)  # noqa: S311 - repeatable, no secret
    for _ in range(60):
        await put(rig, rollout(numbers.randrange(101)))
        assert sum((await answered_by(rig, 5)).values()) == 5
