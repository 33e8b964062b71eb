from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from tunesmith.cluster.errors import ForbiddenError, UnavailableError
from tunesmith.controller.applied import AppliedObjects

MANIFEST = {"kind": "Secret", "metadata": {"name": "keys", "namespace": "team"}, "data": {}}


@dataclass
class Writes:
    """The part of the controller's context that applies, with refusals from an admission policy or a quota."""

    refusal: Exception | None = None
    applied: list[Any] = field(default_factory=list)

    async def apply(self, manifest: Any) -> Any:
        self.applied.append(manifest)
        if self.refusal is not None:
            raise self.refusal
        return {"metadata": {"generation": len(self.applied)}}


@pytest.fixture
def writes() -> Writes:
    return Writes()


@pytest.fixture
def clock() -> list[float]:
    return [0.0]


@pytest.fixture
def objects(writes: Writes, clock: list[float]) -> AppliedObjects:
    return AppliedObjects(cast("Any", writes), lambda: clock[0])


async def test_what_was_applied_a_moment_ago_is_not_applied_again(
    objects: AppliedObjects, writes: Writes, clock: list[float]
) -> None:
    for _ in range(3):
        assert await objects.ensure("uid", MANIFEST) is None
    assert len(writes.applied) == 1
    await objects.ensure("uid", {**MANIFEST, "data": {"x": "y"}})
    assert len(writes.applied) == 2
    clock[0] = 301.0
    await objects.ensure("uid", {**MANIFEST, "data": {"x": "y"}})
    assert len(writes.applied) == 3


async def test_a_watched_object_that_somebody_changed_is_applied_again(objects: AppliedObjects, writes: Writes) -> None:
    await objects.ensure("uid", MANIFEST, -1)
    await objects.ensure("uid", MANIFEST, 1)
    assert len(writes.applied) == 1
    await objects.ensure("uid", MANIFEST, 2)
    assert len(writes.applied) == 2


async def test_a_refusal_is_reported_and_repeated_with_growing_delays(
    objects: AppliedObjects, writes: Writes, clock: list[float]
) -> None:
    writes.refusal = ForbiddenError("exceeded quota: pods")
    sentence = "the API server refuses Secret team/keys: exceeded quota: pods"
    attempts = []
    for second in range(40):
        clock[0] = float(second)
        assert await objects.ensure("uid", MANIFEST) == sentence
        attempts.append(len(writes.applied))
    assert attempts[0] == 1
    assert [attempts.count(number) for number in (1, 2)] == [5, 10]
    assert attempts[-1] == 4
    writes.refusal = None
    assert await objects.ensure("uid", {**MANIFEST, "data": {"other": "x"}}) is None, (
        "a changed object is tried at once"
    )


async def test_what_may_succeed_later_is_left_to_the_queue(objects: AppliedObjects, writes: Writes) -> None:
    writes.refusal = UnavailableError("503")
    with pytest.raises(UnavailableError):
        await objects.ensure("uid", MANIFEST)
