"""Plan cases: before the first attempt."""

from __future__ import annotations

from datetime import timedelta

from tests.finetune.plan_cases import (
    MALFORMED,
    NODE_FULL,
    PLACED,
    SECRET,
    SILENT_STORE,
    TIGHT,
    VALID,
    Case,
    terminated_pod,
)
from tests.finetune.worlds import NOW, UID, job, kube_job, observed, pod, validated
from tunesmith.api.finetunejob_status import ProgressStatus
from tunesmith.contracts.location import owned_name
from tunesmith.finetune.plan import CreateAttempt, CreateValidation, StopJob

CASES = {
    "a new job is validated": Case(
        observed(job()), (CreateValidation(),), "Validating", {"Validated": ("Unknown", "PodPending")}
    ),
    "validation is running": Case(
        observed(job(), validation=kube_job("validate", pod(running=True))),
        (),
        "Validating",
        {"Validated": ("Unknown", "Validating")},
    ),
    "a store that validation cannot reach is reported": Case(
        observed(
            job(),
            validation=kube_job("validate", pod(running=True)),
            progress=ProgressStatus(outage=SILENT_STORE),
        ),
        (),
        "Validating",
        {"Validated": ("Unknown", "StoreUnavailable")},
        SILENT_STORE,
    ),
    "validation waits for a node": Case(
        observed(job(), validation=kube_job("validate", pod(unschedulable="0/1 nodes are available"))),
        (),
        "Validating",
        {"Validated": ("Unknown", "Unschedulable")},
        "0/1 nodes are available",
    ),
    "a missing Secret is reported immediately": Case(
        observed(
            job(),
            validation=kube_job(
                "validate",
                pod(scheduled=PLACED, waiting_reason="CreateContainerConfigError", waiting_message=SECRET),
            ),
        ),
        (),
        "Validating",
        {"Validated": ("Unknown", "SecretNotFound")},
        f"{SECRET}; create it in the pod's namespace, and the job continues",
    ),
    "validation waits for a Secret that is missing for minutes": Case(
        observed(
            job(),
            validation=kube_job(
                "validate",
                pod(
                    scheduled=NOW - timedelta(minutes=10),
                    waiting_reason="CreateContainerConfigError",
                    waiting_message=SECRET,
                ),
            ),
        ),
        (),
        "Validating",
        {"Validated": ("Unknown", "SecretNotFound")},
    ),
    "a Secret that stays missing for an hour fails the job and removes the pod": Case(
        observed(
            job(),
            validation=kube_job(
                "validate",
                pod(
                    scheduled=NOW - timedelta(hours=1),
                    waiting_reason="CreateContainerConfigError",
                    waiting_message=SECRET,
                ),
                age=timedelta(hours=1),
            ),
        ),
        (StopJob(owned_name("tone", UID, "validate")),),
        "Failed",
        {"Validated": ("False", "SecretNotFound"), "Failed": ("True", "SecretNotFound")},
    ),
    "a validation that fills the disk of its node is not repeated on another node": Case(
        observed(job(), validation=kube_job("validate", pod(disrupted=True, eviction=NODE_FULL), pod())),
        (StopJob(owned_name("tone", UID, "validate")),),
        "Failed",
        {"Validated": ("False", "OutOfDisk"), "Failed": ("True", "OutOfDisk")},
        "validation filled the disk of its node",
    ),
    "a validation that exceeds its time limit": Case(
        observed(
            job(),
            validation=kube_job("validate", pod(deadline_exceeded=True, exit_code=137, finished_at=NOW), failed=True),
        ),
        (),
        "Failed",
        {"Validated": ("False", "DeadlineExceeded"), "Failed": ("True", "DeadlineExceeded")},
        "validation exceeded its time limit",
    ),
    "the message about a validation that runs out of memory does not mention the GPU": Case(
        observed(job(), validation=kube_job("validate", terminated_pod(137, out_of_memory=True), failed=True)),
        (),
        "Failed",
        {"Validated": ("False", "OutOfMemory"), "Failed": ("True", "OutOfMemory")},
        "its text after the chat template",
    ),
    "a validation that is pre-empted repeatedly fails": Case(
        observed(job(), validation=kube_job("validate", *(pod(disrupted=True) for _ in range(10)), pod())),
        (StopJob(owned_name("tone", UID, "validate")),),
        "Failed",
        {"Validated": ("False", "NoProgress"), "Failed": ("True", "NoProgress")},
        "validation was evicted or pre-empted 10 times",
    ),
    "a priority that the installation does not allow": Case(
        observed(job(scheduling={"priorityClassName": "system-node-critical"})),
        (),
        "Failed",
        {"Validated": ("False", "NotAllowed"), "Failed": ("True", "NotAllowed")},
        "spec.scheduling.priorityClassName is system-node-critical, which this installation does not allow",
    ),
    "an export into another job's folder": Case(
        observed(job(output={"exports": [{"uri": "s3://tunesmith//store/./other/job-1/artifact"}]})),
        (),
        "Failed",
        {"Validated": ("False", "NotAllowed"), "Failed": ("True", "NotAllowed")},
        "spec.output.exports[0].uri s3://tunesmith//store/./other/job-1/artifact is in this installation's store",
    ),
    "rows from another namespace's folder": Case(
        observed(job(dataset={"train": [{"uri": "s3://tunesmith/store/other/job-1/tmp/tokens/*.arrow"}]})),
        (),
        "Failed",
        {"Validated": ("False", "NotAllowed"), "Failed": ("True", "NotAllowed")},
        "spec.dataset.train[0].uri s3://tunesmith/store/other/job-1/tmp/tokens/*.arrow is in this installation's",
    ),
    "bad data fails the job before any training": Case(
        observed(job(), validation=kube_job("validate", terminated_pod(2, MALFORMED), failed=True)),
        (),
        "Failed",
        {"Validated": ("False", "DatasetInvalid"), "Failed": ("True", "DatasetInvalid")},
        "line 3 is not JSON",
    ),
    "a validation that crashed reports the last line of its log": Case(
        observed(job(), validation=kube_job("validate", terminated_pod(1, "Traceback\nKeyError: 'x'\n"), failed=True)),
        (),
        "Failed",
        {"Validated": ("False", "InternalError"), "Failed": ("True", "InternalError")},
        "validation exited with code 1 without a result: KeyError: 'x'",
    ),
    "a valid job gets its first attempt in the same pass": Case(
        observed(job(), validation=kube_job("validate", terminated_pod(0, VALID), succeeded=True)),
        (CreateAttempt(1),),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "PodPending")},
        "90 rows to train on, 10 held out, 0 dropped",
        ("Running",),
    ),
    "validation passed, and the GPU is nearly too small": Case(
        observed(job(), validation=kube_job("validate", terminated_pod(0, TIGHT), succeeded=True)),
        (CreateAttempt(1),),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "PodPending")},
        "0 dropped; about 13.0 GiB of GPU memory of 12.0, which may not fit: use qlora",
        ("Running",),
    ),
    "a validation whose report is lost is still a success": Case(
        observed(job(), validation=kube_job("validate", succeeded=True)),
        (CreateAttempt(1),),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "PodPending")},
        outcomes=("Running",),
    ),
    "a validated job whose validation Job was deleted is not validated again": Case(
        observed(job(validated())),
        (CreateAttempt(1),),
        "Pending",
        {"Validated": ("True", "Valid"), "Started": ("False", "PodPending")},
        outcomes=("Running",),
    ),
}
