from __future__ import annotations

import json
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from worlds import (
    ARTIFACT,
    NOW,
    STORE,
    UID,
    attempt,
    condition,
    job,
    kube_job,
    pod,
    seen,
    validated,
)

from tunesmith.api.conditions import find
from tunesmith.api.finetunejob_status import ProgressStatus
from tunesmith.contracts.location import owned_name
from tunesmith.finetune.plan import Action, CreateAttempt, CreateValidation, StopJob, plan
from tunesmith.finetune.status import notices

if TYPE_CHECKING:
    from tunesmith.finetune.observe import Observation


def result(**fields: Any) -> str:
    return json.dumps(fields)


def exported(*told: dict[str, Any]) -> str:
    return result(outcome="Succeeded", artifact=ARTIFACT, exports=told)


def ended(exit_code: int, message: str = "", **fields: Any) -> Any:
    return pod(exit_code=exit_code, ended=NOW, termination_message=message, **fields)


DONE = result(outcome="Succeeded", artifact=ARTIFACT, evaluation={"baseLoss": 3.0, "loss": 1.5})
ELSEWHERE = result(outcome="Succeeded", artifact={**ARTIFACT, "uri": "s3://tunesmith/store/other/x/artifact"})
EXPORTS = [{"uri": "s3://copies/tone"}, {"hub": "org/tone"}]
DENIED = {"reason": "AccessDenied", "message": "access to the export was denied"}
VALID = result(outcome="Succeeded", preflight={"rows": 90, "validationRows": 10})
GIB = 2**30
TIGHT = result(
    outcome="Succeeded",
    preflight={
        "rows": 90,
        "estimatedPeakBytes": 13 * GIB,
        "gpuMemoryBytes": 12 * GIB,
        "verdict": "Unknown",
        "suggestion": "use qlora",
    },
)
GATE = result(outcome="Failed", reason="GateFailed", message="loss 1.5 is above 1", artifact=ARTIFACT)
OUTAGE = result(outcome="Failed", reason="StorageUnavailable", message="no answer", retryable=True)
MALFORMED = result(outcome="Failed", reason="DatasetInvalid", message="line 3 is not JSON")
FAR = timedelta(hours=1)
PLACED = NOW - timedelta(minutes=1)
SECRET = 'secret "tunesmith-store" not found'


@dataclass(frozen=True)
class Case:
    """What is seen, and what is to be done and said: actions, phase, {condition: (status, reason)}."""

    seen: Observation
    actions: tuple[Action, ...]
    phase: str
    conditions: dict[str, tuple[str, str]]
    message: str = ""
    """In the message of any condition."""
    outcomes: tuple[str, ...] = ()


CASES = {
    "a new job is validated": Case(
        seen(job()), (CreateValidation(),), "Validating", {"Validated": ("Unknown", "PodPending")}
    ),
    "validation runs": Case(
        seen(job(), validation=kube_job("validate", pod(running=True))),
        (),
        "Validating",
        {"Validated": ("Unknown", "Validating")},
    ),
    "validation waits for a node": Case(
        seen(job(), validation=kube_job("validate", pod(unschedulable="0/1 nodes are available"))),
        (),
        "Validating",
        {"Validated": ("Unknown", "Unschedulable")},
        "0/1 nodes are available",
    ),
    "a missing Secret is told at once": Case(
        seen(
            job(),
            validation=kube_job(
                "validate",
                pod(scheduled=PLACED, waiting_reason="CreateContainerConfigError", waiting_message=SECRET),
            ),
        ),
        (),
        "Validating",
        {"Validated": ("Unknown", "SecretNotFound")},
        f"{SECRET}; create it in the namespace of the FineTuneJob",
    ),
    "a Secret that stays missing fails the job and removes the pod": Case(
        seen(
            job(),
            validation=kube_job(
                "validate",
                pod(
                    scheduled=NOW - timedelta(minutes=2),
                    waiting_reason="CreateContainerConfigError",
                    waiting_message=SECRET,
                ),
            ),
        ),
        (StopJob(owned_name("tone", UID, "validate")),),
        "Failed",
        {"Validated": ("False", "SecretNotFound"), "Failed": ("True", "SecretNotFound")},
    ),
    "bad data fails the job before any training": Case(
        seen(job(), validation=kube_job("validate", ended(2, MALFORMED), failed=True)),
        (),
        "Failed",
        {"Validated": ("False", "DatasetInvalid"), "Failed": ("True", "DatasetInvalid")},
        "line 3 is not JSON",
    ),
    "a validation that crashed tells the last line of its log": Case(
        seen(job(), validation=kube_job("validate", ended(1, "Traceback\nKeyError: 'x'\n"), failed=True)),
        (),
        "Failed",
        {"Validated": ("False", "InternalError"), "Failed": ("True", "InternalError")},
        "validation ended with exit code 1 and left no result: KeyError: 'x'",
    ),
    "a valid job gets its first attempt in the same pass": Case(
        seen(job(), validation=kube_job("validate", ended(0, VALID), succeeded=True)),
        (CreateAttempt(1),),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "PodPending")},
        "90 rows to train on, 10 held out, 0 dropped",
        ("Running",),
    ),
    "validation passed, and the GPU is nearly too small": Case(
        seen(job(), validation=kube_job("validate", ended(0, TIGHT), succeeded=True)),
        (CreateAttempt(1),),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "PodPending")},
        "0 dropped; about 13.0 GiB of GPU memory of 12.0, which may not fit: use qlora",
        ("Running",),
    ),
    "a validation whose report is lost is still a success": Case(
        seen(job(), validation=kube_job("validate", succeeded=True)),
        (CreateAttempt(1),),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "PodPending")},
        outcomes=("Running",),
    ),
    "a validated job whose validation Job is gone is not validated again": Case(
        seen(job(validated())),
        (CreateAttempt(1),),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "PodPending")},
        outcomes=("Running",),
    ),
    "an attempt's Job that the status does not know yet is adopted": Case(
        seen(job(validated()), attempts={1: kube_job("1", pod(running=True, started=NOW))}),
        (),
        "Running",
        {"Validated": ("True", "Valid"), "Started": ("True", "Running")},
        outcomes=("Running",),
    ),
    "an attempt without a pod says where to look": Case(
        seen(job(validated(attempt(1))), attempts={1: kube_job("1")}),
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "PodPending")},
        "has no pod after 60 s: a quota, an admission rule or a missing PriorityClass may refuse it",
        ("Running",),
    ),
    "an image that cannot be pulled is told at once": Case(
        seen(
            job(validated(attempt(1))),
            attempts={1: kube_job("1", pod(scheduled=PLACED, waiting_reason="ErrImagePull"))},
        ),
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "ImagePullFailed")},
        outcomes=("Running",),
    ),
    "an image that cannot be pulled for 5 minutes fails the job": Case(
        seen(
            job(validated(attempt(1))),
            attempts={1: kube_job("1", pod(scheduled=NOW - timedelta(minutes=5), waiting_reason="ImagePullBackOff"))},
        ),
        (StopJob(owned_name("tone", UID, "1")),),
        "Failed",
        {"Validated": ("True", "Valid"), "Failed": ("True", "ImagePullFailed")},
        outcomes=("Failed",),
    ),
    "a published adapter completes the job": Case(
        seen(
            job(validated(attempt(1), conditions=[condition("Started", reason="Running")])),
            attempts={1: kube_job("1", ended(0, DONE), succeeded=True)},
        ),
        (),
        "Complete",
        {
            "Validated": ("True", "Valid"),
            "Started": ("False", "Ended"),
            "Published": ("True", "Published"),
            "Complete": ("True", "Complete"),
        },
        "held-out loss went from 3 to 1.5",
        ("Succeeded",),
    ),
    "an artifact at another place is not believed": Case(
        seen(job(validated(attempt(1))), attempts={1: kube_job("1", ended(0, ELSEWHERE), succeeded=True)}),
        (),
        "Failed",
        {"Validated": ("True", "Valid"), "Failed": ("True", "InternalError")},
        "but its place is s3://tunesmith/store/team/tone-",
        ("Succeeded",),
    ),
    "a lost result is fetched by another attempt": Case(
        seen(job(validated(attempt(1))), attempts={1: kube_job("1", succeeded=True)}),
        (CreateAttempt(2),),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "PodPending")},
        outcomes=("Succeeded", "Running"),
    ),
    "the user's fault is not retried": Case(
        seen(job(validated(attempt(1))), attempts={1: kube_job("1", ended(2, MALFORMED), failed=True)}),
        (),
        "Failed",
        {"Validated": ("True", "Valid"), "Failed": ("True", "DatasetInvalid")},
        outcomes=("Failed",),
    ),
    "memory that ran out is not retried and comes with advice": Case(
        seen(job(validated(attempt(1))), attempts={1: kube_job("1", ended(137, out_of_memory=True), failed=True)}),
        (),
        "Failed",
        {"Validated": ("True", "Valid"), "Failed": ("True", "OutOfMemory")},
        "raise it, or lower hyperparameters.microBatchSize",
        ("Failed",),
    ),
    "a failure worth it waits before the next attempt": Case(
        seen(job(validated(attempt(1))), attempts={1: kube_job("1", ended(3, OUTAGE), failed=True)}),
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "Retrying")},
        "attempt 2 starts 5 s after attempt 1 failed",
        ("Failed",),
    ),
    "after the wait comes the next attempt": Case(
        seen(job(validated(attempt(1, "Failed", timedelta(seconds=5))))),
        (CreateAttempt(2),),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "PodPending")},
        outcomes=("Failed", "Running"),
    ),
    "a crash without a result is worth another attempt": Case(
        seen(
            job(validated(attempt(1, "Failed", FAR), attempt(2))),
            attempts={2: kube_job("2", ended(1, "Segmentation fault"), failed=True)},
        ),
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "Retrying")},
        "attempt 3 starts 10 s after attempt 2 failed",
        ("Failed", "Failed"),
    ),
    "the last attempt's failure is the job's": Case(
        seen(
            job(validated(attempt(1, "Failed", FAR), attempt(2, "Failed", FAR), attempt(3))),
            attempts={3: kube_job("3", ended(3, OUTAGE), failed=True)},
        ),
        (),
        "Failed",
        {"Validated": ("True", "Valid"), "Failed": ("True", "AttemptsExhausted")},
        "3 of 3 attempts failed; the last: StorageUnavailable: no answer",
        ("Failed", "Failed", "Failed"),
    ),
    "an eviction is not counted": Case(
        seen(
            job(validated(attempt(1)), maxAttempts=1),
            attempts={1: kube_job("1", ended(137, disrupted=True), failed=True)},
        ),
        (CreateAttempt(2),),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "PodPending")},
        outcomes=("Preempted", "Running"),
    ),
    "an eviction whose pod is gone is known from the Job": Case(
        seen(
            job(validated(attempt(1)), maxAttempts=1),
            attempts={
                1: kube_job(
                    "1",
                    failed=True,
                    failure_message="Pod team/x has condition DisruptionTarget matching FailJob rule at index 0",
                )
            },
        ),
        (CreateAttempt(2),),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "PodPending")},
        outcomes=("Preempted", "Running"),
    ),
    "a trainer that saved and left on SIGTERM is not counted": Case(
        seen(job(validated(attempt(1)), maxAttempts=1), attempts={1: kube_job("1", ended(143), failed=True)}),
        (CreateAttempt(2),),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "PodPending")},
        outcomes=("Preempted", "Running"),
    ),
    "a user's fault whose pod is gone is known from the Job": Case(
        seen(
            job(validated(attempt(1))),
            attempts={
                1: kube_job(
                    "1",
                    failed=True,
                    failure_message="Container trainer for pod team/x failed with exit code 2 matching FailJob rule",
                )
            },
        ),
        (),
        "Failed",
        {"Validated": ("True", "Valid"), "Failed": ("True", "InternalError")},
        "attempt 1 ended with exit code 2 and left no result",
        ("Failed",),
    ),
    "an attempt whose Job is gone failed": Case(
        seen(job(validated(attempt(1)), maxAttempts=1)),
        (),
        "Failed",
        {"Validated": ("True", "Valid"), "Failed": ("True", "AttemptsExhausted")},
        "was deleted while it ran",
        ("Failed",),
    ),
    "a job created suspended waits": Case(
        seen(job(suspend=True)), (), "Suspended", {"Suspended": ("True", "Suspended")}, "set it to false to go on"
    ),
    "suspend is told before the Job is deleted": Case(
        seen(job(validated(attempt(1)), suspend=True), attempts={1: kube_job("1", pod(running=True))}),
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Suspended": ("False", "Stopping"), "Started": ("False", "Stopping")},
        "a checkpoint is saved first",
        ("Suspended",),
    ),
    "then the Job is deleted": Case(
        seen(job(validated(attempt(1, "Suspended")), suspend=True), attempts={1: kube_job("1", pod(running=True))}),
        (StopJob(owned_name("tone", UID, "1")),),
        "Pending",
        {"Validated": ("True", "Valid"), "Suspended": ("False", "Stopping"), "Started": ("False", "Stopping")},
        outcomes=("Suspended",),
    ),
    "and when it is gone the job is suspended": Case(
        seen(job(validated(attempt(1, "Suspended")), suspend=True)),
        (),
        "Suspended",
        {"Validated": ("True", "Valid"), "Suspended": ("True", "Suspended")},
        outcomes=("Suspended",),
    ),
    "a resumed job waits for the end of the attempt before": Case(
        seen(job(validated(attempt(1, "Suspended"))), attempts={1: kube_job("1", pod(running=True), deleting=True)}),
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Suspended": ("False", "Stopping"), "Started": ("False", "Stopping")},
        outcomes=("Suspended",),
    ),
    "a job is not suspended while a pod of a vanished Job still saves": Case(
        seen(job(validated(attempt(1, "Suspended")), suspend=True), lingering=("tone-pod",)),
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Suspended": ("False", "Stopping"), "Started": ("False", "Stopping")},
        "pod tone-pod is being stopped",
        ("Suspended",),
    ),
    "nor is there another attempt while it does": Case(
        seen(job(validated(attempt(1, "Failed", FAR))), lingering=("tone-pod",)),
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "Stopping")},
        "attempt 2 waits for pod tone-pod",
        ("Failed",),
    ),
    "a Job that is being deleted is not deleted again": Case(
        seen(
            job(validated(attempt(1, "Suspended")), suspend=True),
            attempts={1: kube_job("1", pod(running=True), deleting=True)},
        ),
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Suspended": ("False", "Stopping"), "Started": ("False", "Stopping")},
        outcomes=("Suspended",),
    ),
    "a resumed job goes on, and the suspension is not counted": Case(
        seen(
            job(
                validated(attempt(1, "Suspended"), conditions=[condition("Suspended", reason="Suspended")]),
                maxAttempts=1,
            )
        ),
        (CreateAttempt(2),),
        "Pending",
        {"Validated": ("True", "Valid"), "Suspended": ("False", "Resumed"), "Started": ("False", "PodPending")},
        outcomes=("Suspended", "Running"),
    ),
    "a job in a queue says so": Case(
        seen(
            job(validated(attempt(1)), scheduling={"queue": "team"}),
            attempts={1: kube_job("1", suspended=True)},
        ),
        (),
        "Queued",
        {"Validated": ("True", "Valid"), "Admitted": ("False", "Queued"), "Started": ("False", "Queued")},
        "waits for queue team to admit it",
        ("Running",),
    ),
    "an admitted job trains": Case(
        seen(
            job(validated(attempt(1)), scheduling={"queue": "team"}),
            attempts={1: kube_job("1", pod(running=True))},
        ),
        (),
        "Running",
        {"Validated": ("True", "Valid"), "Admitted": ("True", "Admitted"), "Started": ("True", "Running")},
        outcomes=("Running",),
    ),
    "a job over its deadline fails and is stopped": Case(
        seen(
            job(validated(attempt(1), startTime="2026-11-24T11:59:00Z"), activeDeadlineSeconds=60),
            attempts={1: kube_job("1", pod(running=True))},
        ),
        (StopJob(owned_name("tone", UID, "1")),),
        "Failed",
        {"Validated": ("True", "Valid"), "Failed": ("True", "DeadlineExceeded")},
        "longer than spec.activeDeadlineSeconds, 60",
        ("Failed",),
    ),
    "pauses do not count towards the deadline": Case(
        seen(
            job(validated(attempt(1), startTime="2026-11-24T11:59:00Z", pausedSeconds=1), activeDeadlineSeconds=60),
            attempts={1: kube_job("1", pod(running=True))},
        ),
        (),
        "Running",
        {"Validated": ("True", "Valid"), "Started": ("True", "Running")},
        outcomes=("Running",),
    ),
    "a failed gate keeps the artifact": Case(
        seen(job(validated(attempt(1))), attempts={1: kube_job("1", ended(2, GATE), failed=True)}),
        (),
        "Failed",
        {"Validated": ("True", "Valid"), "Published": ("True", "Published"), "Failed": ("True", "GateFailed")},
        "loss 1.5 is above 1",
        ("Failed",),
    ),
    "a job whose copies are made is complete": Case(
        seen(
            job(validated(attempt(1)), output={"exports": EXPORTS}),
            attempts={1: kube_job("1", ended(0, exported({}, {})), succeeded=True)},
        ),
        (),
        "Complete",
        {
            "Validated": ("True", "Valid"),
            "Published": ("True", "Published"),
            "Exported": ("True", "Exported"),
            "Complete": ("True", "Complete"),
        },
        "copies are at s3://copies/tone, hf://org/tone",
        ("Succeeded",),
    ),
    "a job whose copies fail is complete as well": Case(
        seen(
            job(validated(attempt(1)), output={"exports": EXPORTS}),
            attempts={1: kube_job("1", ended(0, exported({}, DENIED)), succeeded=True)},
        ),
        (),
        "Complete",
        {
            "Validated": ("True", "Valid"),
            "Published": ("True", "Published"),
            "Exported": ("False", "ExportFailed"),
            "Complete": ("True", "Complete"),
        },
        "1 of 2 exports failed: access to the export was denied",
        ("Succeeded",),
    ),
    "a complete job is left alone, whatever became of its Jobs": Case(
        seen(
            job(
                validated(
                    attempt(1, "Succeeded"), conditions=[condition("Complete", reason="Complete")], phase="Complete"
                )
            )
        ),
        (),
        "Complete",
        {"Validated": ("True", "Valid"), "Complete": ("True", "Complete")},
        outcomes=("Succeeded",),
    ),
    "what still runs of a failed job is stopped": Case(
        seen(
            job(
                validated(
                    attempt(1, "Failed", FAR),
                    conditions=[condition("Failed", reason="ImagePullFailed")],
                    phase="Failed",
                )
            ),
            attempts={1: kube_job("1", pod())},
        ),
        (StopJob(owned_name("tone", UID, "1")),),
        "Failed",
        {"Validated": ("True", "Valid"), "Failed": ("True", "ImagePullFailed")},
        outcomes=("Failed",),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_plan(name: str) -> None:
    case = CASES[name]
    decided = plan(case.seen, STORE)
    assert decided.actions == case.actions
    status = decided.status
    assert {entry.type: (entry.status, entry.reason) for entry in status.conditions} == case.conditions
    assert status.phase == case.phase
    assert case.message in " | ".join(entry.message for entry in status.conditions)
    assert tuple(entry.outcome for entry in status.attempts) == case.outcomes


@pytest.mark.parametrize("name", CASES)
def test_a_plan_made_twice_says_the_same(name: str) -> None:
    """The status that was written leads to no other one while nothing changes."""
    case = CASES[name]
    first = plan(case.seen, STORE)
    if first.actions:
        return
    again = replace(case.seen, job=case.seen.job.model_copy(update={"status": first.status}))
    second = plan(again, STORE)
    assert second.status.manifest() == first.status.manifest()


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
    told = [notice for notice in notices(before.status, status) if notice.type == "Warning"]
    assert [(notice.reason, sentence in notice.message) for notice in told] == [("ScoredRowsTrained", True)]
    assert sentence in next(one.message for one in status.conditions if one.type == "Validated")
    assert [notice for notice in notices(status, status) if notice.type == "Warning"] == []


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
    told = [notice for notice in notices(before.status, status) if notice.type == "Warning"]
    assert [(notice.reason, "access to the export was denied" in notice.message) for notice in told] == [
        ("ExportFailed", True)
    ]


@pytest.mark.parametrize(
    ("code", "message", "fields"),
    [
        (0, {"outcome": "Succeeded", "artifact": ARTIFACT}, {"succeeded": True}),
        (143, {"outcome": "Preempted", "retryable": True}, {"failed": True}),
        (3, {"outcome": "Failed", "reason": "StorageUnavailable", "retryable": True}, {"failed": True}),
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
    status = plan(observation, STORE).status
    assert status.progress is not None, name
    assert status.progress.step == step
    assert "NaN" not in json.dumps(status.manifest())


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
