from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from plan_cases import DENIED, DONE, EXPORTS, FAR, NO_SCORES, UNSCORED, ended, exported, result
from worlds import ARTIFACT, NOW, STORE, attempt, condition, job, kube_job, pod, seen, validated

from tunesmith.api.conditions import find
from tunesmith.api.finetunejob_status import ProgressStatus
from tunesmith.contracts.transitions import new_events
from tunesmith.finetune.plan import plan
from tunesmith.finetune.status import reports, without_reports

if TYPE_CHECKING:
    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith.finetune.observe import JobView, PodView


def test_the_whole_status_of_a_complete_job() -> None:
    attempts = {1: kube_job("1", ended(0, DONE, started=NOW - FAR, node="node1"), succeeded=True)}
    status = plan(seen(job(validated(attempt(1))), attempts=attempts), STORE).status
    assert status.artifact is not None
    assert status.artifact.uri == ARTIFACT["uri"]
    assert status.start_time == NOW - FAR
    assert status.completion_time == NOW
    assert status.attempts[0].node == "node1"
    assert status.attempts[0].end_time == NOW
    assert status.evaluation is not None
    assert status.evaluation.loss == 1.5


def test_rows_that_are_scored_and_trained_on_are_told_once_as_a_warning() -> None:
    trained = {"rows": 12, "scoredRows": 200, "examples": ["held-out.jsonl line 3"]}
    message = result(outcome="Succeeded", preflight={"rows": 90, "validationRows": 200, "alsoTrained": [trained]})
    before = job()
    status = plan(seen(before, validation=kube_job("validate", ended(0, message), succeeded=True)), STORE).status
    assert status.preflight is not None
    assert status.preflight.manifest()["alsoTrained"] == [trained]
    sentence = "12 of 200 held-out rows are also trained on: evaluation.loss flatters the adapter"
    told = [notice for notice in reports(before.status, status) if notice.type == "Warning"]
    assert [(notice.reason, sentence in notice.message) for notice in told] == [("ScoredRowsTrained", True)]
    assert sentence in next(one.message for one in status.conditions if one.type == "Validated")
    assert [notice for notice in reports(status, status) if notice.type == "Warning"] == []


def test_a_suite_without_scores_is_told_once_as_a_warning() -> None:
    attempts = {1: kube_job("1", ended(0, UNSCORED), succeeded=True)}
    before = job(validated(attempt(1)))
    status = plan(seen(before, attempts=attempts), STORE).status
    told = [notice for notice in reports(before.status, status) if notice.type == "Warning"]
    assert [(notice.reason, notice.message) for notice in told] == [("SuiteFailed", NO_SCORES)]
    assert [notice for notice in reports(status, status) if notice.type == "Warning"] == []


def test_the_status_tells_what_became_of_each_export() -> None:
    """Where it went is what the spec says: a pod that says more is not heard."""
    forged = {**DENIED, "uri": "s3://elsewhere"}
    attempts = {1: kube_job("1", ended(0, exported({}, forged, {})), succeeded=True)}
    before = job(validated(attempt(1)), output={"exports": EXPORTS})
    status = plan(seen(before, attempts=attempts), STORE).status
    assert status.artifact is not None
    assert status.artifact.manifest()["exports"] == [
        {"uri": "s3://copies/tone", "exported": True},
        {"hub": "org/tone", "exported": False, **DENIED},
    ]
    changed = new_events("FineTuneJob", before.status.conditions, status.conditions)
    told = [notice for notice in changed if notice.type == "Warning"]
    assert [(notice.reason, "access to the export was denied" in notice.message) for notice in told] == [
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
def test_an_attempt_tells_the_step_that_it_went_on_from(
    step: int | None, code: int, message: dict[str, Any], fields: dict[str, Any]
) -> None:
    attempts = {1: kube_job("1", ended(code, result(**message, resumedFromStep=step)), **fields)}
    status = plan(seen(job(validated(attempt(1))), attempts=attempts), STORE).status
    assert status.attempts[0].resumed_from_step == step


def test_what_was_resolved_first_stays() -> None:
    first = {"learningRate": 1e-4, "batchSize": 8}
    done = result(outcome="Succeeded", artifact=ARTIFACT, resolved={"learningRate": 5e-4, "totalSteps": 30})
    attempts = {1: kube_job("1", ended(0, done), succeeded=True)}
    status = plan(seen(job(validated(attempt(1), resolved=first)), attempts=attempts), STORE).status
    assert status.resolved is not None
    assert (status.resolved.learning_rate, status.resolved.batch_size, status.resolved.total_steps) == (1e-4, 8, 30)


@pytest.mark.parametrize(
    ("name", "told", "sample", "step"),
    [
        ("the first", None, {"step": 1}, 1),
        ("too soon", {"step": 1, "stage": "Training", "updateTime": 0}, {"step": 2, "updateTime": 9}, 1),
        ("after 10 s", {"step": 1, "stage": "Training", "updateTime": 0}, {"step": 2, "updateTime": 10}, 2),
        ("another stage", {"step": 1, "stage": "Loading", "updateTime": 0}, {"step": 2, "updateTime": 1}, 2),
        ("a loss that is no number", None, {"step": 1, "loss": float("nan")}, 1),
    ],
)
def test_progress_is_told_every_10_seconds_and_at_each_stage(
    name: str, told: dict[str, Any] | None, sample: dict[str, Any], step: int
) -> None:
    def stamped(document: dict[str, Any]) -> dict[str, Any]:
        seconds = document.get("updateTime", 0)
        return {"stage": "Training", **document, "updateTime": (NOW + timedelta(seconds=seconds)).isoformat()}

    progress = {"progress": stamped(told)} if told is not None else {}
    observation = seen(
        job(validated(attempt(1), **progress)),
        attempts={1: kube_job("1", pod(running=True))},
        progress=ProgressStatus.model_validate(stamped(sample)),
    )
    status = plan(replace(observation, now=NOW + timedelta(seconds=10)), STORE).status
    assert status.progress is not None, name
    assert status.progress.step == step
    assert "NaN" not in json.dumps(status.manifest())


def test_time_passes_as_it_does_for_the_operator() -> None:
    """A pod that says it is 2020, then 2099, then 2020 again gets no GPU seconds by that, and blocks nothing."""
    current = job(validated(attempt(1)), resources={"gpus": 1})
    attempts = {1: kube_job("1", pod(started=NOW, running=True))}
    found = []
    for seconds, said in ((10, "2020"), (20, "2099"), (30, "2020"), (40, "2099"), (50, "0001")):
        sample = ProgressStatus.model_validate({"step": seconds, "updateTime": f"{said}-01-01T00:00:00+14:00"})
        now = NOW + timedelta(seconds=seconds)
        status = plan(replace(seen(current, attempts=attempts, progress=sample), now=now), STORE).status
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
    words = result(outcome="Failed", reason="DatasetInvalid", message="whatever the API server refuses")
    status = plan(seen(before, attempts={1: kube_job("1", ended(2, words), failed=True)}), STORE).status
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
def test_a_pause_is_added_up_when_it_ends(pause: str) -> None:
    held = condition(pause, "True" if pause == "Suspended" else "False", "Queued")
    status = validated(attempt(1), conditions=[held], startTime="2026-11-24T11:30:00Z")
    observation = seen(
        job(status, activeDeadlineSeconds=60, scheduling={"queue": "team"}),
        attempts={1: kube_job("1", pod(running=True))},
    )
    decided = plan(observation, STORE)
    assert decided.status.phase == "Running"
    assert decided.status.paused_seconds == 30 * 60
    assert decided.look_again == timedelta(seconds=60)


TWO_GPUS = {"resources": {"gpus": 2, "nodes": 2}, "scheduling": {"queue": "team"}}


def test_gpu_seconds_are_those_of_all_attempts() -> None:
    """A minute in which an attempt runs, 30 s more until a queue takes its GPUs, an hour in the queue, then 10 s."""
    start = NOW

    def at(seconds: float) -> datetime:
        return start + timedelta(seconds=seconds)

    def told(of: FineTuneJob, seconds: float, attempts: dict[int, JobView], *, progress: bool = False) -> FineTuneJob:
        sample = ProgressStatus(step=1, update_time=at(seconds)) if progress else None
        looked = replace(seen(of, attempts=attempts, progress=sample), now=at(seconds))
        return of.model_copy(update={"status": plan(looked, STORE).status})

    def pods(**fields: Any) -> tuple[PodView, ...]:
        return tuple(pod(index=index, **fields) for index in range(2))

    runs = {1: kube_job("1", *pods(started=at(0), running=True), size=2)}
    waits = {1: kube_job("1", suspended=True, size=2)}
    again = {1: kube_job("1", *pods(started=at(3690), running=True), size=2)}
    ends = [ended(0, DONE, started=at(3690), index=index) for index in range(2)]
    done = {1: kube_job("1", *(replace(one, ended=at(3700)) for one in ends), size=2, succeeded=True)}
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
        current = told(current, seconds, attempts, progress=progress)
        found.append(current.status.gpu_seconds)
    assert found == [0, 240, 240, 360, 360, 360, 400, 400]


def test_a_job_without_gpus_has_no_gpu_seconds() -> None:
    attempts = {1: kube_job("1", ended(0, DONE, started=NOW - FAR), succeeded=True)}
    of = job(validated(attempt(1)), resources={"gpus": 0})
    assert plan(seen(of, attempts=attempts), STORE).status.gpu_seconds is None


def test_a_transition_time_stays_while_the_status_of_a_condition_does() -> None:
    observation = seen(job(validated(attempt(1))), attempts={1: kube_job("1", pod(running=True))})
    first = plan(observation, STORE).status
    later = replace(
        observation, job=observation.job.model_copy(update={"status": first}), now=NOW + timedelta(minutes=1)
    )
    second = plan(later, STORE).status
    started = find(second.conditions, "Started")
    assert started is not None
    assert started.last_transition_time == NOW
