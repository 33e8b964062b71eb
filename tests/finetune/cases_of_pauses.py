"""Plan cases: suspended jobs, queues and deadlines."""

from __future__ import annotations

from tests.finetune.plan_cases import FAR, Case
from tests.finetune.worlds import UID, attempt, condition, job, kube_job, observed, pod, validated
from tunesmith.contracts.location import owned_name
from tunesmith.finetune.plan import CreateAttempt, StopJob

CASES = {
    "a job created suspended waits": Case(
        observed(job(suspend=True)),
        (),
        "Suspended",
        {"Suspended": ("True", "Suspended")},
        "set it to false to continue",
    ),
    "suspension is recorded before the Job is deleted": Case(
        observed(job(validated(attempt(1)), suspend=True), attempts={1: kube_job("1", pod(running=True))}),
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Suspended": ("False", "Stopping"), "Started": ("False", "Stopping")},
        "a checkpoint is saved first",
        ("Suspended",),
    ),
    "the Job is deleted after the suspension is recorded": Case(
        observed(job(validated(attempt(1, "Suspended")), suspend=True), attempts={1: kube_job("1", pod(running=True))}),
        (StopJob(owned_name("tone", UID, "1")),),
        "Pending",
        {"Validated": ("True", "Valid"), "Suspended": ("False", "Stopping"), "Started": ("False", "Stopping")},
        outcomes=("Suspended",),
    ),
    "a job is suspended once its Job is deleted": Case(
        observed(job(validated(attempt(1, "Suspended")), suspend=True)),
        (),
        "Suspended",
        {"Validated": ("True", "Valid"), "Suspended": ("True", "Suspended")},
        outcomes=("Suspended",),
    ),
    "a resumed job waits until the previous attempt has stopped": Case(
        observed(
            job(validated(attempt(1, "Suspended"))), attempts={1: kube_job("1", pod(running=True), deleting=True)}
        ),
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Suspended": ("False", "Stopping"), "Started": ("False", "Stopping")},
        outcomes=("Suspended",),
    ),
    "a job is not suspended while a pod of a deleted Job is saving": Case(
        observed(job(validated(attempt(1, "Suspended")), suspend=True), lingering=("tone-pod",)),
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Suspended": ("False", "Stopping"), "Started": ("False", "Stopping")},
        "pod tone-pod is being stopped",
        ("Suspended",),
    ),
    "no attempt starts while a pod of a deleted Job is saving": Case(
        observed(job(validated(attempt(1, "Failed", FAR))), lingering=("tone-pod",)),
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "Stopping")},
        "attempt 2 waits for pod tone-pod",
        ("Failed",),
    ),
    "a Job that is being deleted is not deleted again": Case(
        observed(
            job(validated(attempt(1, "Suspended")), suspend=True),
            attempts={1: kube_job("1", pod(running=True), deleting=True)},
        ),
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Suspended": ("False", "Stopping"), "Started": ("False", "Stopping")},
        outcomes=("Suspended",),
    ),
    "a resumed job continues, and the suspension is not counted": Case(
        observed(
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
    "a job in a queue is reported": Case(
        observed(
            job(validated(attempt(1)), scheduling={"queue": "team"}),
            attempts={1: kube_job("1", suspended=True)},
        ),
        (),
        "Queued",
        {"Validated": ("True", "Valid"), "Admitted": ("False", "Queued"), "Started": ("False", "Queued")},
        "waits for queue team to admit it",
        ("Running",),
    ),
    "the reason for waiting in a queue is reported": Case(
        observed(
            job(validated(attempt(1)), scheduling={"queue": "team"}),
            attempts={1: kube_job("1", suspended=True, held_back="insufficient unused quota for nvidia.com/gpu")},
        ),
        (),
        "Queued",
        {"Validated": ("True", "Valid"), "Admitted": ("False", "Queued"), "Started": ("False", "Queued")},
        "waits for queue team to admit it: insufficient unused quota for nvidia.com/gpu",
        ("Running",),
    ),
    "an admitted job trains": Case(
        observed(
            job(validated(attempt(1)), scheduling={"queue": "team"}),
            attempts={1: kube_job("1", pod(running=True))},
        ),
        (),
        "Running",
        {"Validated": ("True", "Valid"), "Admitted": ("True", "Admitted"), "Started": ("True", "Running")},
        outcomes=("Running",),
    ),
    "a job over its deadline fails and is stopped": Case(
        observed(
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
        observed(
            job(validated(attempt(1), startTime="2026-11-24T11:59:00Z", pausedSeconds=1), activeDeadlineSeconds=60),
            attempts={1: kube_job("1", pod(running=True))},
        ),
        (),
        "Running",
        {"Validated": ("True", "Valid"), "Started": ("True", "Running")},
        outcomes=("Running",),
    ),
}
