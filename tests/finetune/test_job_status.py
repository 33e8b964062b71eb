from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tests.finetune.plan_cases import DENIED, DONE, EXPORTS, FAR, NO_SCORES, UNSCORED, exported, result, terminated_pod
from tests.finetune.worlds import ARTIFACT, NOW, STORE, attempt, condition, job, kube_job, observed, pod, validated
from tunesmith.api.conditions import find
from tunesmith.api.finetunejob_status import ProgressStatus
from tunesmith.contracts.transitions import new_events
from tunesmith.finetune.plan import plan
from tunesmith.finetune.status import status_events, without_reports

if TYPE_CHECKING:
    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith.jobs.observe import JobView, PodView


def test_the_whole_status_of_a_complete_job() -> None:
    attempts = {1: kube_job("1", terminated_pod(0, DONE, started=NOW - FAR, node="node1"), succeeded=True)}
    status = plan(observed(job(validated(attempt(1))), attempts=attempts), STORE).status
    assert status.artifact is not None
    assert status.artifact.uri == ARTIFACT["uri"]
    assert status.start_time == NOW - FAR
    assert status.completion_time == NOW
    assert status.attempts[0].node == "node1"
    assert status.attempts[0].end_time == NOW
    assert status.evaluation is not None
    assert status.evaluation.loss == 1.5


def test_rows_that_are_scored_and_trained_on_are_reported_once_as_a_warning() -> None:
    trained = {"rows": 12, "scoredRows": 200, "examples": ["held-out.jsonl line 3"]}
    message = result(outcome="Succeeded", preflight={"rows": 90, "validationRows": 200, "alsoTrained": [trained]})
    before = job()
    status = plan(
        observed(before, validation=kube_job("validate", terminated_pod(0, message), succeeded=True)), STORE
    ).status
    assert status.preflight is not None
    assert status.preflight.manifest()["alsoTrained"] == [trained]
    sentence = "12 of 200 held-out rows are also trained on, so evaluation.loss overrates the adapter"
    warnings = [notice for notice in status_events(before.status, status) if notice.type == "Warning"]
    assert [(notice.reason, sentence in notice.message) for notice in warnings] == [("ScoredRowsTrained", True)]
    assert sentence in next(entry.message for entry in status.conditions if entry.type == "Validated")
    assert [notice for notice in status_events(status, status) if notice.type == "Warning"] == []


def test_a_suite_without_scores_is_reported_once_as_a_warning() -> None:
    attempts = {1: kube_job("1", terminated_pod(0, UNSCORED), succeeded=True)}
    before = job(validated(attempt(1)))
    status = plan(observed(before, attempts=attempts), STORE).status
    warnings = [notice for notice in status_events(before.status, status) if notice.type == "Warning"]
    assert [(notice.reason, notice.message) for notice in warnings] == [("SuiteFailed", NO_SCORES)]
    assert [notice for notice in status_events(status, status) if notice.type == "Warning"] == []


def test_the_status_has_the_outcome_of_each_export() -> None:
    """Destinations come from the spec; those that a pod reports are ignored."""
    forged = {**DENIED, "uri": "s3://elsewhere"}
    attempts = {1: kube_job("1", terminated_pod(0, exported({}, forged, {})), succeeded=True)}
    before = job(validated(attempt(1)), output={"exports": EXPORTS})
    status = plan(observed(before, attempts=attempts), STORE).status
    assert status.artifact is not None
    assert status.artifact.manifest()["exports"] == [
        {"uri": "s3://copies/tone", "exported": True},
        {"hub": "org/tone", "exported": False, **DENIED},
    ]
    changed = new_events("FineTuneJob", before.status.conditions, status.conditions)
    warnings = [notice for notice in changed if notice.type == "Warning"]
    assert [(notice.reason, "access to the export was denied" in notice.message) for notice in warnings] == [
        ("ExportFailed", True)
    ]


@pytest.mark.parametrize(
    ("code", "message", "fields"),
    [
        (0, {"outcome": "Succeeded", "artifact": ARTIFACT}, {"succeeded": True}),
        (143, {"outcome": "Preempted", "retryable": True}, {"failed": True}),
        (3, {"outcome": "Failed", "reason": "StoreUnavailable", "retryable": True}, {"failed": True}),
    ],
    ids=["succeeded", "pre-empted", "failed"],
)
@pytest.mark.parametrize("step", [None, 12])
def test_an_attempt_has_the_step_from_which_it_resumed(
    step: int | None, code: int, message: dict[str, Any], fields: dict[str, Any]
) -> None:
    attempts = {1: kube_job("1", terminated_pod(code, result(**message, resumedFromStep=step)), **fields)}
    status = plan(observed(job(validated(attempt(1))), attempts=attempts), STORE).status
    assert status.attempts[0].resumed_from_step == step


def test_values_that_were_resolved_first_are_kept() -> None:
    first = {"learningRate": 1e-4, "batchSize": 8}
    done = result(outcome="Succeeded", artifact=ARTIFACT, resolved={"learningRate": 5e-4, "totalSteps": 30})
    attempts = {1: kube_job("1", terminated_pod(0, done), succeeded=True)}
    status = plan(observed(job(validated(attempt(1), resolved=first)), attempts=attempts), STORE).status
    assert status.resolved is not None
    assert (status.resolved.learning_rate, status.resolved.batch_size, status.resolved.total_steps) == (1e-4, 8, 30)


@pytest.mark.parametrize(
    ("name", "recorded", "sample", "step"),
    [
        ("the first", None, {"step": 1}, 1),
        ("too soon", {"step": 1, "stage": "Training", "updateTime": 0}, {"step": 2, "updateTime": 9}, 1),
        ("after 10 s", {"step": 1, "stage": "Training", "updateTime": 0}, {"step": 2, "updateTime": 10}, 2),
        ("another stage", {"step": 1, "stage": "Loading", "updateTime": 0}, {"step": 2, "updateTime": 1}, 2),
        ("a loss that is not a number", None, {"step": 1, "loss": float("nan")}, 1),
    ],
)
def test_progress_is_recorded_every_10_seconds_and_at_each_stage(
    name: str, recorded: dict[str, Any] | None, sample: dict[str, Any], step: int
) -> None:
    def stamped(document: dict[str, Any]) -> dict[str, Any]:
        seconds = document.get("updateTime", 0)
        return {"stage": "Training", **document, "updateTime": (NOW + timedelta(seconds=seconds)).isoformat()}

    progress = {"progress": stamped(recorded)} if recorded is not None else {}
    observation = observed(
        job(validated(attempt(1), **progress)),
        attempts={1: kube_job("1", pod(running=True))},
        progress=ProgressStatus.model_validate(stamped(sample)),
    )
    status = plan(replace(observation, now=NOW + timedelta(seconds=10)), STORE).status
    assert status.progress is not None, name
    assert status.progress.step == step
    assert "NaN" not in json.dumps(status.manifest())


def test_a_pods_clock_does_not_affect_gpu_seconds() -> None:
    """A pod that reports 2020, then 2099, then 2020 again neither adds GPU seconds nor blocks the count."""
    current = job(validated(attempt(1)), resources={"gpus": 1})
    attempts = {1: kube_job("1", pod(started=NOW, running=True))}
    found = []
    for seconds, year in ((10, "2020"), (20, "2099"), (30, "2020"), (40, "2099"), (50, "0001")):
        sample = ProgressStatus.model_validate({"step": seconds, "updateTime": f"{year}-01-01T00:00:00+14:00"})
        now = NOW + timedelta(seconds=seconds)
        status = plan(replace(observed(current, attempts=attempts, progress=sample), now=now), STORE).status
        assert status.progress is not None
        assert status.progress.update_time is not None
        assert status.progress.update_time <= now
        found.append(status.gpu_seconds)
        current = current.model_copy(update={"status": status})
    assert found == sorted(found, key=lambda value: value or 0.0)
    assert found[-1] is not None
    assert found[-1] <= 50


def test_a_status_that_is_refused_is_written_without_what_pods_reported() -> None:
    before = job(validated(attempt(1), resolved={"totalSteps": 30}))
    report = result(outcome="Failed", reason="DatasetInvalid", message="whatever the API server refuses")
    status = plan(observed(before, attempts={1: kube_job("1", terminated_pod(2, report), failed=True)}), STORE).status
    kept = without_reports(before.status, status)
    assert "whatever" not in json.dumps(kept.manifest())
    assert kept.phase == "Failed"
    assert [entry.outcome for entry in kept.attempts] == ["Failed"]
    assert kept.resolved == before.status.resolved
    assert {entry.type: entry.reason for entry in kept.conditions} == {
        "Validated": "Valid",
        "Failed": "DatasetInvalid",
    }


@pytest.mark.parametrize("pause", ["Suspended", "Admitted"])
def test_a_pause_is_added_once_it_is_over(pause: str) -> None:
    paused = condition(pause, "True" if pause == "Suspended" else "False", "Queued")
    status = validated(attempt(1), conditions=[paused], startTime="2026-11-24T11:30:00Z")
    observation = observed(
        job(status, activeDeadlineSeconds=60, scheduling={"queue": "team"}),
        attempts={1: kube_job("1", pod(running=True))},
    )
    decision = plan(observation, STORE)
    assert decision.status.phase == "Running"
    assert decision.status.paused_seconds == 30 * 60
    assert decision.requeue_after == timedelta(seconds=60)


TWO_GPUS = {"resources": {"gpus": 2, "nodes": 2}, "scheduling": {"queue": "team"}}


def test_gpu_seconds_are_those_of_all_attempts() -> None:
    """A minute in which an attempt runs, 30 s more until a queue takes its GPUs, an hour in the queue, then 10 s."""
    start = NOW

    def at(seconds: float) -> datetime:
        return start + timedelta(seconds=seconds)

    def next_job(
        of: FineTuneJob, seconds: float, attempts: dict[int, JobView], *, progress: bool = False
    ) -> FineTuneJob:
        sample = ProgressStatus(step=1, update_time=at(seconds)) if progress else None
        observation = replace(observed(of, attempts=attempts, progress=sample), now=at(seconds))
        return of.model_copy(update={"status": plan(observation, STORE).status})

    def pods(**fields: Any) -> tuple[PodView, ...]:
        return tuple(pod(index=index, **fields) for index in range(2))

    runs = {1: kube_job("1", *pods(started=at(0), running=True), size=2)}
    waits = {1: kube_job("1", suspended=True, size=2)}
    again = {1: kube_job("1", *pods(started=at(3690), running=True), size=2)}
    members = [terminated_pod(0, DONE, started=at(3690), index=index) for index in range(2)]
    done = {1: kube_job("1", *(replace(member, finished_at=at(3700)) for member in members), size=2, succeeded=True)}
    current = job(validated(attempt(1)), **TWO_GPUS)
    found = []
    for seconds, attempts, progress in (
        (0, runs, False),
        (60, runs, True),
        (60, runs, True),
        (90, waits, False),
        (1800, waits, False),
        (3690, again, False),
        (3700, done, False),
        (3800, done, False),
    ):
        current = next_job(current, seconds, attempts, progress=progress)
        found.append(current.status.gpu_seconds)
    assert found == [0, 240, 240, 360, 360, 360, 400, 400]


def test_a_job_without_gpus_has_no_gpu_seconds() -> None:
    attempts = {1: kube_job("1", terminated_pod(0, DONE, started=NOW - FAR), succeeded=True)}
    of = job(validated(attempt(1)), resources={"gpus": 0})
    assert plan(observed(of, attempts=attempts), STORE).status.gpu_seconds is None


def test_a_transition_time_stays_while_the_status_of_a_condition_does() -> None:
    observation = observed(job(validated(attempt(1))), attempts={1: kube_job("1", pod(running=True))})
    first = plan(observation, STORE).status
    later = replace(
        observation, job=observation.job.model_copy(update={"status": first}), now=NOW + timedelta(minutes=1)
    )
    second = plan(later, STORE).status
    started = find(second.conditions, "Started")
    assert started is not None
    assert started.last_transition_time == NOW
