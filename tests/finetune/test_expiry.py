"""Deletion of finished jobs (spec.ttlSecondsAfterFinished)."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from tests.finetune.worlds import ARTIFACT, NOW, STORE, condition, job, kube_job, observed, pod
from tunesmith.finetune.observe import base_job, users_of
from tunesmith.finetune.plan import StopJob, plan

TTL = timedelta(hours=1)


def finished(age: timedelta, outcome: str = "Complete", **spec: Any) -> Any:
    status = {
        "conditions": [condition("Validated"), condition(outcome, reason=outcome)],
        "completionTime": (NOW - age).isoformat(),
        "phase": outcome,
        **({"artifact": ARTIFACT} if outcome == "Complete" else {}),
    }
    return job(status, **({"ttlSecondsAfterFinished": int(TTL.total_seconds())} | spec))


@pytest.mark.parametrize("outcome", ["Complete", "Failed"])
def test_a_job_is_deleted_once_its_time_has_passed(outcome: str) -> None:
    early = plan(observed(finished(TTL - timedelta(seconds=20), outcome)), STORE)
    assert (early.deletion, early.requeue_after) == (None, timedelta(seconds=20))
    due = plan(observed(finished(TTL, outcome)), STORE)
    assert due.deletion is not None
    assert "finished more than 3600 s ago (spec.ttlSecondsAfterFinished)" in due.deletion
    assert (ARTIFACT["uri"] in due.deletion) is (outcome == "Complete")


def test_a_job_is_kept_without_a_limit_and_while_it_is_named() -> None:
    kept = plan(observed(finished(timedelta(days=99), ttlSecondsAfterFinished=None)), STORE)
    assert (kept.deletion, kept.requeue_after) == (None, None)
    named = plan(observed(finished(TTL), users=("AdapterDeployment tone",)), STORE)
    assert named.deletion is None
    assert named.requeue_after is not None


def test_a_job_that_runs_is_not_deleted() -> None:
    running = plan(observed(job(ttlSecondsAfterFinished=0)), STORE)
    assert running.deletion is None


def test_running_jobs_of_a_finished_one_are_stopped_first() -> None:
    left = plan(observed(finished(TTL), attempts={1: kube_job("1", pod(running=True))}), STORE)
    assert [type(action) for action in left.actions] == [StopJob]
    assert left.deletion is None


def test_a_distant_deletion_is_checked_daily() -> None:
    assert plan(observed(finished(TTL, ttlSecondsAfterFinished=2**31 - 1)), STORE).requeue_after == timedelta(days=1)


def deployment(name: str, source: str, **metadata: str) -> dict[str, Any]:
    spec = {"adapterFrom": {"fineTuneJob": {"name": source}}}
    return {"kind": "AdapterDeployment", "metadata": {"name": name, **metadata}, "spec": spec}


def continuing(name: str, source: dict[str, Any], *conditions: dict[str, Any]) -> dict[str, Any]:
    spec = {"continueFrom": source}
    return {"kind": "FineTuneJob", "metadata": {"name": name}, "spec": spec, "status": {"conditions": [*conditions]}}


def test_deployments_and_unfinished_jobs_that_name_a_job_need_it() -> None:
    deployments = [
        deployment("a", "tone"),
        deployment("b", "wren"),
        deployment("leaving", "tone", deletionTimestamp="2026-11-24T11:00:00Z"),
    ]
    tone = {"fineTuneJob": {"name": "tone"}}
    jobs = [
        continuing("c", tone, condition("Validated")),
        continuing("done", tone, condition("Complete")),
        continuing("d", {"artifact": {"uri": "s3://a/tone"}}),
        {"kind": "FineTuneJob", "metadata": {"name": "e"}, "spec": {}},
    ]
    pool = {"kind": "ServingPool", "metadata": {"name": "p", "namespace": "team"}}
    assert users_of("tone", deployments, jobs) == ("AdapterDeployment a", "FineTuneJob c")
    assert users_of("tone", [], [], [pool]) == ("ServingPool p",)


def test_a_pool_names_the_job_of_its_base_model() -> None:
    pool: dict[str, Any] = {"metadata": {"namespace": "platform"}, "spec": {"baseModel": {"uri": "s3://a/b"}}}
    assert base_job(pool) is None
    pool["spec"]["baseModel"] = {"from": {"fineTuneJob": {"name": "tone"}}}
    assert base_job(pool) == ("platform", "tone")
    pool["spec"]["baseModel"]["from"]["fineTuneJob"]["namespace"] = "team"
    assert base_job(pool) == ("team", "tone")
