"""Plan cases: attempts and their effect on the job."""

from __future__ import annotations

from datetime import timedelta

from tests.finetune.plan_cases import (
    DONE,
    ELSEWHERE,
    FAR,
    MALFORMED,
    NODE_FULL,
    OUTAGE,
    PLACED,
    SILENT_STORE,
    Case,
    terminated_pod,
)
from tests.finetune.worlds import NOW, UID, attempt, condition, job, kube_job, observed, pod, validated
from tunesmith.api.finetunejob_status import ProgressStatus
from tunesmith.contracts.location import owned_name
from tunesmith.finetune.plan import CreateAttempt, StopJob

CASES = {
    "an attempt's Job that the status does not know yet is adopted": Case(
        observed(job(validated()), attempts={1: kube_job("1", pod(running=True, started=NOW))}),
        (),
        "Running",
        {"Validated": ("True", "Valid"), "Started": ("True", "Running")},
        outcomes=("Running",),
    ),
    "a store that an attempt cannot reach is reported": Case(
        observed(
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
    "an image that cannot be pulled is reported immediately": Case(
        observed(
            job(validated(attempt(1))),
            attempts={1: kube_job("1", pod(scheduled=PLACED, waiting_reason="ErrImagePull"))},
        ),
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "ImagePullFailed")},
        outcomes=("Running",),
    ),
    "an image that cannot be pulled for 5 minutes fails the attempt": Case(
        observed(
            job(validated(attempt(1))),
            attempts={1: kube_job("1", pod(scheduled=NOW - timedelta(minutes=5), waiting_reason="ImagePullBackOff"))},
        ),
        (StopJob(owned_name("tone", UID, "1")),),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "ImagePullFailed")},
        outcomes=("Failed",),
    ),
    "a container that does not start for 2 minutes fails the attempt": Case(
        observed(
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
    "the next attempt waits until the Job of an attempt that could not start is deleted": Case(
        observed(job(validated(attempt(1, "Failed", FAR))), attempts={1: kube_job("1", pod())}),
        (StopJob(owned_name("tone", UID, "1")),),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "Stopping")},
        outcomes=("Failed",),
    ),
    "an image that cannot be pulled in the last attempt fails the job": Case(
        observed(job(validated(attempt(1, "Failed", FAR)), maxAttempts=1)),
        (),
        "Failed",
        {"Validated": ("True", "Valid"), "Failed": ("True", "AttemptsExhausted")},
        outcomes=("Failed",),
    ),
    "a node whose disk the job filled counts as a failure": Case(
        observed(
            job(validated(attempt(1)), maxAttempts=1),
            attempts={1: kube_job("1", terminated_pod(137, disrupted=True, eviction=NODE_FULL), failed=True)},
        ),
        (),
        "Failed",
        {"Validated": ("True", "Valid"), "Failed": ("True", "AttemptsExhausted")},
        "OutOfDisk: attempt 1 filled the disk of its node",
        ("Failed",),
    ),
    "a full volume is not retried": Case(
        observed(
            job(validated(attempt(1))),
            attempts={
                1: kube_job(
                    "1",
                    terminated_pod(
                        137, disrupted=True, eviction='Usage of EmptyDir volume "work" exceeds the limit "1Gi". '
                    ),
                    failed=True,
                )
            },
        ),
        (),
        "Failed",
        {"Validated": ("True", "Valid"), "Failed": ("True", "OutOfDisk")},
        outcomes=("Failed",),
    ),
    "an attempt follows a pre-emption after a pause": Case(
        observed(
            job(validated(attempt(1), progress={"stage": "Training", "step": 7})),
            attempts={1: kube_job("1", terminated_pod(143), failed=True)},
        ),
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "Retrying")},
        "attempt 2 starts 5 s after attempt 1 was pre-empted",
        ("Preempted",),
    ),
    "each pre-emption without progress doubles the pause": Case(
        observed(job(validated(*(attempt(number, "Preempted", timedelta(seconds=19)) for number in (1, 2, 3))))),
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "Retrying")},
        "attempt 4 starts 20 s after attempt 3 was pre-empted",
        ("Preempted",) * 3,
    ),
    "progress resets the pause": Case(
        observed(
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
    "pre-emptions without progress fail the job": Case(
        observed(
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
    "results that are lost each time fail the job": Case(
        observed(job(validated(*(attempt(number, "Succeeded", FAR) for number in range(1, 11))))),
        (),
        "Failed",
        {"Validated": ("True", "Valid"), "Failed": ("True", "NoProgress")},
        outcomes=("Succeeded",) * 10,
    ),
    "a running job that the installation no longer allows keeps its progress but gets no attempt": Case(
        observed(job(validated(attempt(1, "Preempted", FAR)), scheduling={"priorityClassName": "high"})),
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "NotAllowed")},
        "attempt 2 is not created: spec.scheduling.priorityClassName is high",
        ("Preempted",),
    ),
    "a published adapter completes the job": Case(
        observed(
            job(validated(attempt(1), conditions=[condition("Started", reason="Running")])),
            attempts={1: kube_job("1", terminated_pod(0, DONE), succeeded=True)},
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
    "an artifact at another location is rejected": Case(
        observed(job(validated(attempt(1))), attempts={1: kube_job("1", terminated_pod(0, ELSEWHERE), succeeded=True)}),
        (),
        "Failed",
        {"Validated": ("True", "Valid"), "Failed": ("True", "InternalError")},
        "s3://tunesmith/store/other/x/artifact instead of s3://tunesmith/store/team/tone-",
        ("Succeeded",),
    ),
    "another attempt recovers a lost result": Case(
        observed(job(validated(attempt(1))), attempts={1: kube_job("1", succeeded=True)}),
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "Retrying")},
        outcomes=("Succeeded",),
    ),
    "a user error is not retried": Case(
        observed(job(validated(attempt(1))), attempts={1: kube_job("1", terminated_pod(2, MALFORMED), failed=True)}),
        (),
        "Failed",
        {"Validated": ("True", "Valid"), "Failed": ("True", "DatasetInvalid")},
        outcomes=("Failed",),
    ),
    "running out of memory is not retried, and the message suggests a fix": Case(
        observed(
            job(validated(attempt(1))),
            attempts={1: kube_job("1", terminated_pod(137, out_of_memory=True), failed=True)},
        ),
        (),
        "Failed",
        {"Validated": ("True", "Valid"), "Failed": ("True", "OutOfMemory")},
        "raise it, or lower hyperparameters.microBatchSize",
        ("Failed",),
    ),
    "a retryable failure delays the next attempt": Case(
        observed(job(validated(attempt(1))), attempts={1: kube_job("1", terminated_pod(3, OUTAGE), failed=True)}),
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "Retrying")},
        "attempt 2 starts 5 s after attempt 1 failed",
        ("Failed",),
    ),
    "the next attempt follows the delay": Case(
        observed(job(validated(attempt(1, "Failed", timedelta(seconds=5))))),
        (CreateAttempt(2),),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "PodPending")},
        outcomes=("Failed", "Running"),
    ),
    "a crash without a result is retried": Case(
        observed(
            job(validated(attempt(1, "Failed", FAR), attempt(2))),
            attempts={2: kube_job("2", terminated_pod(1, "Segmentation fault"), failed=True)},
        ),
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "Retrying")},
        "attempt 3 starts 10 s after attempt 2 failed",
        ("Failed", "Failed"),
    ),
    "the last attempt's failure is the job's": Case(
        observed(
            job(validated(attempt(1, "Failed", FAR), attempt(2, "Failed", FAR), attempt(3))),
            attempts={3: kube_job("3", terminated_pod(3, OUTAGE), failed=True)},
        ),
        (),
        "Failed",
        {"Validated": ("True", "Valid"), "Failed": ("True", "AttemptsExhausted")},
        "3 of 3 attempts failed; the last: StoreUnavailable: no answer",
        ("Failed", "Failed", "Failed"),
    ),
    "an eviction is not counted": Case(
        observed(
            job(validated(attempt(1)), maxAttempts=1),
            attempts={1: kube_job("1", terminated_pod(137, disrupted=True), failed=True)},
        ),
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "Retrying")},
        outcomes=("Preempted",),
    ),
    "an eviction whose pod is deleted is known from the Job": Case(
        observed(
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
    "a trainer that saved and exited on SIGTERM is not counted": Case(
        observed(
            job(validated(attempt(1)), maxAttempts=1), attempts={1: kube_job("1", terminated_pod(143), failed=True)}
        ),
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "Retrying")},
        outcomes=("Preempted",),
    ),
    "a user error whose pod is deleted is known from the Job": Case(
        observed(
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
        "attempt 1 exited with code 2 without a result",
        ("Failed",),
    ),
    "an attempt whose Job was deleted has failed": Case(
        observed(job(validated(attempt(1)), maxAttempts=1)),
        (),
        "Failed",
        {"Validated": ("True", "Valid"), "Failed": ("True", "AttemptsExhausted")},
        "was deleted while it was running",
        ("Failed",),
    ),
}
