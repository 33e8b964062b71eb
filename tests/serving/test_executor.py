from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from tunesmith.cluster.errors import ForbiddenError, InvalidError, UnavailableError
from tunesmith.contracts.refusal import RefusalCause
from tunesmith.controller.executor import Executor

MANIFEST = {"kind": "Secret", "metadata": {"name": "keys", "namespace": "team"}, "data": {}}


@dataclass
class Writes:
    """The part of the controller's context that applies, with refusals from an admission policy or a quota."""

    refusal: Exception | None = None
    applied: list[Any] = field(default_factory=list)
    deleted: list[Any] = field(default_factory=list)

    async def apply(self, manifest: Any) -> Any:
        self.applied.append(manifest)
        if self.refusal is not None:
            raise self.refusal
        return {"metadata": {"generation": len(self.applied)}}

    async def create(self, manifest: Any) -> Any:
        await self.apply(manifest)
        return manifest

    async def delete(self, item: Any, _: str) -> bool:
        self.deleted.append(item)
        return True


@pytest.fixture
def writes() -> Writes:
    return Writes()


@pytest.fixture
def clock() -> list[float]:
    return [0.0]


@pytest.fixture
def executor(writes: Writes, clock: list[float]) -> Executor:
    return Executor(cast("Any", writes), lambda: clock[0])


async def test_a_recently_applied_object_is_not_applied_again(
    executor: Executor, writes: Writes, clock: list[float]
) -> None:
    for _ in range(3):
        assert await executor.apply("uid", MANIFEST) is None
    assert len(writes.applied) == 1
    await executor.apply("uid", {**MANIFEST, "data": {"x": "y"}})
    assert len(writes.applied) == 2
    clock[0] = 301.0
    await executor.apply("uid", {**MANIFEST, "data": {"x": "y"}})
    assert len(writes.applied) == 3


async def test_a_changed_watched_object_is_applied_again(executor: Executor, writes: Writes) -> None:
    await executor.apply("uid", MANIFEST, -1)
    await executor.apply("uid", MANIFEST, 1)
    assert len(writes.applied) == 1
    await executor.apply("uid", MANIFEST, 2)
    assert len(writes.applied) == 2


async def test_a_refusal_is_returned_and_the_write_repeated_with_growing_delays(
    executor: Executor, writes: Writes, clock: list[float]
) -> None:
    writes.refusal = ForbiddenError("exceeded quota: pods")
    attempts = []
    for second in range(120):
        clock[0] = float(second)
        refused = await executor.apply("uid", MANIFEST)
        assert refused is not None
        assert refused.message == "the API server refuses Secret team/keys: exceeded quota: pods"
        assert refused.sentence.endswith("; retrying within 30 s")
        attempts.append(len(writes.applied))
    assert [attempts.count(number) for number in (1, 2, 3, 4)] == [5, 10, 20, 30]
    writes.refusal = None
    changed = {**MANIFEST, "data": {"other": "x"}}
    assert await executor.apply("uid", changed) is None, "a changed object is tried at once"


async def test_an_accepted_write_discards_the_refusal(executor: Executor, writes: Writes, clock: list[float]) -> None:
    writes.refusal = ForbiddenError("exceeded quota: pods")
    assert await executor.create("uid", MANIFEST) is not None
    assert len(writes.applied) == 1
    writes.refusal = None
    assert await executor.create("uid", MANIFEST) is not None, "its delay is not over"
    clock[0] = 5.0
    assert await executor.create("uid", MANIFEST) is None
    writes.refusal = ForbiddenError("exceeded quota: pods")
    assert await executor.create("uid", MANIFEST) is not None
    assert len(writes.applied) == 3


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ForbiddenError('pods "x" is forbidden: exceeded quota: none, requested: pods=1'), RefusalCause.QUOTA),
        (ForbiddenError('pods "x" is forbidden: failed quota: cpu: must specify limits.cpu'), RefusalCause.QUOTA),
        (
            InvalidError(
                "jobs.batch \"x\" is invalid: : ValidatingAdmissionPolicy 'p' with binding 'b' denied request: no"
            ),
            RefusalCause.POLICY,
        ),
        (InvalidError('admission webhook "a.b" denied the request: no'), RefusalCause.POLICY),
        (UnavailableError('failed calling webhook "a.b": context deadline exceeded'), RefusalCause.POLICY),
        (ForbiddenError('pods "x" is forbidden: violates PodSecurity "restricted:latest"'), RefusalCause.POLICY),
        (ForbiddenError('User "u" cannot create resource "jobs" in API group "batch"'), RefusalCause.PERMISSION),
        (InvalidError('Job.batch "x" is invalid: spec.template.spec: Required value'), RefusalCause.INVALID),
    ],
)
async def test_a_refusal_has_a_cause(executor: Executor, writes: Writes, error: Exception, cause: RefusalCause) -> None:
    writes.refusal = error
    refused = await executor.create("uid", MANIFEST)
    assert refused is not None
    assert (refused.verb, refused.kind, refused.cause) == ("create", "Secret", cause)
    assert cause.fix in refused.sentence


async def test_a_job_whose_image_the_api_server_removes_is_deleted_and_refused(
    executor: Executor, writes: Writes, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = {"name": "image-0", "image": {"reference": "registry/doors:1"}}
    job = {
        "kind": "Job",
        "metadata": {"name": "import", "namespace": "team"},
        "spec": {"template": {"spec": {"volumes": [volume]}}},
    }
    assert await executor.create("uid", job) is None
    stored = {**job, "spec": {"template": {"spec": {"volumes": [{"name": "image-0", "emptyDir": {}}]}}}}

    async def create(manifest: Any) -> Any:
        await writes.apply(manifest)
        return stored

    monkeypatch.setattr(writes, "create", create)
    for _ in range(3):
        refusal = await executor.create("uid", job)
        assert refusal is not None
        assert refusal.cause is RefusalCause.IMAGE_VOLUME
    assert (len(writes.applied), writes.deleted) == (2, [stored])


async def test_temporary_errors_are_raised_for_the_queue(executor: Executor, writes: Writes) -> None:
    writes.refusal = UnavailableError("503")
    with pytest.raises(UnavailableError):
        await executor.apply("uid", MANIFEST)


async def test_a_long_refusal_keeps_one_line_and_its_fix(executor: Executor, writes: Writes) -> None:
    hostile = 'admission webhook "x" denied the request: \x1b[2J' + "secret\nline " * 100_000
    writes.refusal = ForbiddenError(hostile)
    refusal = await executor.create("uid", MANIFEST)
    assert refusal is not None
    assert refusal.cause is RefusalCause.POLICY
    assert len(refusal.sentence) < 4096
    assert refusal.sentence.endswith("or ask its owner; retrying within 30 s")
    assert refusal.sentence.isprintable()
