"""Cases of a plan: attempts, and what becomes of the job by them."""

from __future__ import annotations

from datetime import timedelta

from plan_cases import DONE, ELSEWHERE, FAR, MALFORMED, OUTAGE, PLACED, Case, ended
from worlds import NOW, UID, attempt, condition, job, kube_job, pod, seen, validated

from tunesmith.contracts.location import owned_name
from tunesmith.finetune.plan import CreateAttempt, StopJob

CASES = {
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
}
