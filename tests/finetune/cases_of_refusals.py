"""Plan cases: writes that the API server refused, and Jobs without their pods."""

from __future__ import annotations

from datetime import timedelta

from tests.finetune.plan_cases import FAR, VALID, Case, terminated_pod
from tests.finetune.worlds import UID, attempt, condition, job, kube_job, observed, pod, validated
from tunesmith.contracts.location import owned_name
from tunesmith.contracts.refusal import Refusal, RefusalCause
from tunesmith.finetune.plan import StopJob

QUOTA = Refusal("create", "Job", "the API server refuses Job team/tone: exceeded quota: none", RefusalCause.QUOTA)
INVALID = Refusal("create", "Job", "the API server refuses Job team/tone: spec: Required value", RefusalCause.INVALID)
TAKEN = Refusal("create", "Job", "Job tone-1 exists and does not belong to this FineTuneJob", RefusalCause.NAME_TAKEN)
KEPT = Refusal("delete", "Job", 'cannot delete resource "jobs"', RefusalCause.PERMISSION)
NO_ROOM = "ResourceQuota gpus allows 0 of requests.nvidia.com/gpu"

CASES = {
    "a refused validation is retried": Case(
        observed(job(), refusal=QUOTA),
        (),
        "Validating",
        {"Validated": ("Unknown", "WriteRefused")},
        "exceeded quota: none; delete objects that use the quota, or raise it; retrying within",
    ),
    "a refused first attempt is not listed": Case(
        observed(job(), validation=kube_job("validate", terminated_pod(0, VALID), succeeded=True), refusal=QUOTA),
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "WriteRefused")},
    ),
    "a refused second attempt keeps the first": Case(
        observed(job(validated(attempt(1, "Failed", age=FAR))), refusal=QUOTA),
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "WriteRefused")},
        outcomes=("Failed",),
    ),
    "a spec that results in an invalid object fails the job": Case(
        observed(job(), refusal=INVALID),
        (),
        "Failed",
        {"Validated": ("Unknown", "PodPending"), "Failed": ("True", "InvalidSpec")},
        "spec: Required value",
    ),
    "an invalid object after an attempt keeps the training progress": Case(
        observed(job(validated(attempt(1, "Failed", age=FAR))), refusal=INVALID),
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "WriteRefused")},
        outcomes=("Failed",),
    ),
    "a name that is taken": Case(
        observed(job(), refusal=TAKEN), (), "Validating", {"Validated": ("Unknown", "NameTaken")}, "does not belong"
    ),
    "a Job of a suspended job that may not be deleted": Case(
        observed(
            job(validated(attempt(1, "Suspended")), suspend=True),
            attempts={1: kube_job("1", pod(running=True))},
            refusal=KEPT,
        ),
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Suspended": ("False", "Stopping"), "Started": ("False", "WriteRefused")},
        outcomes=("Suspended",),
    ),
    "a Job of a finished job that may not be deleted": Case(
        observed(
            job(validated(conditions=[condition("Failed", "True", "OutOfMemory")])),
            attempts={1: kube_job("1", pod(running=True))},
            refusal=KEPT,
        ),
        (),
        "Failed",
        {"Validated": ("True", "Valid"), "Failed": ("True", "OutOfMemory"), "Started": ("False", "WriteRefused")},
    ),
    "a finished job's Job can be deleted again": Case(
        observed(
            job(
                validated(
                    conditions=[
                        condition("Failed", "True", "OutOfMemory"),
                        condition("Started", "False", "WriteRefused"),
                    ]
                )
            ),
            attempts={1: kube_job("1", pod(running=True))},
        ),
        (StopJob(owned_name("tone", UID, "1")),),
        "Failed",
        {"Validated": ("True", "Valid"), "Failed": ("True", "OutOfMemory"), "Started": ("False", "Finished")},
    ),
    "a Job whose pods a quota refuses": Case(
        observed(job(validated(attempt(1))), attempts={1: kube_job("1", refused=NO_ROOM, age=timedelta(seconds=3))}),
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "PodsRefused")},
        f"has no pod: {NO_ROOM}",
        ("Running",),
    ),
    "a validation whose pod a quota refuses": Case(
        observed(job(), validation=kube_job("validate", refused=NO_ROOM)),
        (),
        "Validating",
        {"Validated": ("Unknown", "PodsRefused")},
        f"has no pod: {NO_ROOM}",
    ),
    "the message about an attempt without a pod names the command that shows the reason": Case(
        observed(job(validated(attempt(1))), attempts={1: kube_job("1")}),
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "PodsMissing")},
        "has no pod: an admission policy, a LimitRange or a missing PriorityClass may refuse it; `kubectl describe job",
        ("Running",),
    ),
    "an attempt whose pods were not created yet": Case(
        observed(job(validated(attempt(1))), attempts={1: kube_job("1", age=timedelta(seconds=5))}),
        (),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "PodPending")},
        outcomes=("Running",),
    ),
}
