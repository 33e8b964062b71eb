"""Cases of a plan: attempts, and what becomes of the job by them."""

from __future__ import annotations

from datetime import timedelta

from plan_cases import DONE, ELSEWHERE, FAR, MALFORMED, NODE_FULL, OUTAGE, PLACED, SILENT_STORE, Case, ended
from worlds import NOW, UID, attempt, condition, job, kube_job, pod, seen, validated

from tunesmith.api.finetunejob_status import ProgressStatus
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
    "a store that an attempt cannot reach is a reason": Case(
        seen(
            job(validated(attempt(1))),
            attempts={1: kube_job("1", pod(running=True, started=NOW))},
            progress=ProgressStatus(outage=SILENT_STORE),
        ),
        (),
        "Running",
        {"Validated": ("True", "Valid"), "Started": ("True", "StoreUnavailable")},
        SILENT_STORE,
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
    "an image that cannot be pulled for 5 minutes ends the attempt": Case(
        seen(
            job(validated(attempt(1))),
            attempts={1: kube_job("1", pod(scheduled=NOW - timedelta(minutes=5), waiting_reason="ImagePullBackOff"))},
        ),
        (StopJob(owned_name("tone", UID, "1")),),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "ImagePullFailed")},
        outcomes=("Failed",),
    ),
    "a container that does not start for 2 minutes ends the attempt": Case(
        seen(
            job(validated(attempt(1))),
            attempts={
                1: kube_job(
                    "1",
                    pod(
                        scheduled=NOW - timedelta(minutes=2),
                        waiting_reason="RunContainerError",
                        waiting_message="failed to create shim task",
                    ),
                )
            },
        ),
        (StopJob(owned_name("tone", UID, "1")),),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "InternalError")},
        "cannot start its container: failed to create shim task",
        ("Failed",),
    ),
    "the next attempt waits until the Job of one that could not start is gone": Case(
        seen(job(validated(attempt(1, "Failed", FAR))), attempts={1: kube_job("1", pod())}),
        (StopJob(owned_name("tone", UID, "1")),),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "Stopping")},
        outcomes=("Failed",),
    ),
    "an image that cannot be pulled in the last attempt fails the job": Case(
        seen(job(validated(attempt(1, "Failed", FAR)), maxAttempts=1)),
        (),
        "Failed",
        {"Validated": ("True", "Valid"), "Failed": ("True", "AttemptsExhausted")},
        outcomes=("Failed",),
    ),
    "a node that ran out of disk by the job's files counts as a failure": Case(
        seen(
            job(validated(attempt(1)), maxAttempts=1),
            attempts={1: kube_job("1", ended(137, disrupted=True, eviction=NODE_FULL), failed=True)},
        ),
        (),
        "Failed",
        {"Validated": ("True", "Valid"), "Failed": ("True", "AttemptsExhausted")},
        "OutOfDisk: attempt 1 filled the disk of its node",
        ("Failed",),
    ),
    "a full volume is not retried": Case(
        seen(
            job(validated(attempt(1))),
            attempts={
                1: kube_job(
                    "1",
                    ended(137, disrupted=True, eviction='Usage of EmptyDir volume "work" exceeds the limit "1Gi". '),
                    failed=True,
                )
            },
        ),
        (),
        "Failed",
        {"Validated": ("True", "Valid"), "Failed": ("True", "OutOfDisk")},
        outcomes=("Failed",),
    ),
    "after a pre-emption comes a pause": Case(
        seen(
            job(validated(attempt(1), progress={"stage": "Training", "step": 7})),
            attempts={1: kube_job("1", ended(143), failed=True)},
        ),
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "Retrying")},
        "attempt 2 starts 5 s after attempt 1 was pre-empted",
        ("Preempted",),
    ),
    "each pre-emption without progress doubles the pause": Case(
        seen(job(validated(*(attempt(number, "Preempted", timedelta(seconds=19)) for number in (1, 2, 3))))),
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "Retrying")},
        "attempt 4 starts 20 s after attempt 3 was pre-empted",
        ("Preempted",) * 3,
    ),
    "progress makes the pause short again": Case(
        seen(
            job(
                validated(
                    *(attempt(number, "Preempted", FAR) for number in range(1, 10)),
                    {**attempt(10, "Preempted", timedelta(seconds=5)), "lastStep": 12},
                )
            )
        ),
        (CreateAttempt(11),),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "PodPending")},
        outcomes=(*("Preempted",) * 10, "Running"),
    ),
    "pre-emptions without progress end the job": Case(
        seen(
            job(
                validated(
                    {**attempt(1, "Preempted", FAR), "lastStep": 12},
                    *({**attempt(number, "Preempted", FAR), "lastStep": 12} for number in range(2, 12)),
                )
            )
        ),
        (),
        "Failed",
        {"Validated": ("True", "Valid"), "Failed": ("True", "NoProgress")},
        "10 attempts in a row were stopped before they trained beyond step 12",
        ("Preempted",) * 11,
    ),
    "results that are lost each time end the job": Case(
        seen(job(validated(*(attempt(number, "Succeeded", FAR) for number in range(1, 11))))),
        (),
        "Failed",
        {"Validated": ("True", "Valid"), "Failed": ("True", "NoProgress")},
        outcomes=("Succeeded",) * 10,
    ),
    "a running job that the installation no longer allows is not started again, and not lost": Case(
        seen(job(validated(attempt(1, "Preempted", FAR)), scheduling={"priorityClassName": "high"})),
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "NotAllowed")},
        "attempt 2 is not created: spec.scheduling.priorityClassName names high",
        ("Preempted",),
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
            "Started": ("False", "Finished"),
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
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "Retrying")},
        outcomes=("Succeeded",),
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
        "3 of 3 attempts failed; the last: StoreUnavailable: no answer",
        ("Failed", "Failed", "Failed"),
    ),
    "an eviction is not counted": Case(
        seen(
            job(validated(attempt(1)), maxAttempts=1),
            attempts={1: kube_job("1", ended(137, disrupted=True), failed=True)},
        ),
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "Retrying")},
        outcomes=("Preempted",),
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
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "Retrying")},
        outcomes=("Preempted",),
    ),
    "a trainer that saved and left on SIGTERM is not counted": Case(
        seen(job(validated(attempt(1)), maxAttempts=1), attempts={1: kube_job("1", ended(143), failed=True)}),
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "Retrying")},
        outcomes=("Preempted",),
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
