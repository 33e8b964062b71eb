"""Cases of a plan: before the first attempt."""

from __future__ import annotations

from datetime import timedelta

from plan_cases import MALFORMED, NODE_FULL, PLACED, SECRET, SILENT_STORE, TIGHT, VALID, Case, ended
from worlds import NOW, UID, job, kube_job, pod, seen, validated

from tunesmith.api.finetunejob_status import ProgressStatus
from tunesmith.contracts.location import owned_name
from tunesmith.finetune.plan import CreateAttempt, CreateValidation, StopJob

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
    "a store that validation cannot reach is a reason": Case(
        seen(
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
        f"{SECRET}; create it in the namespace of the FineTuneJob, and the job continues",
    ),
    "a Secret that is missing for minutes is waited for": Case(
        seen(
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
        seen(
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
        seen(job(), validation=kube_job("validate", pod(disrupted=True, eviction=NODE_FULL), pod())),
        (StopJob(owned_name("tone", UID, "validate")),),
        "Failed",
        {"Validated": ("False", "OutOfDisk"), "Failed": ("True", "OutOfDisk")},
        "validation filled the disk of its node",
    ),
    "a validation without end": Case(
        seen(job(), validation=kube_job("validate", pod(late=True, exit_code=137, ended=NOW), failed=True)),
        (),
        "Failed",
        {"Validated": ("False", "DeadlineExceeded"), "Failed": ("True", "DeadlineExceeded")},
        "validation took longer than its pod may run",
    ),
    "a validation that runs out of memory does not advise about the GPU's": Case(
        seen(job(), validation=kube_job("validate", ended(137, out_of_memory=True), failed=True)),
        (),
        "Failed",
        {"Validated": ("False", "OutOfMemory"), "Failed": ("True", "OutOfMemory")},
        "the chat template's text of a row",
    ),
    "a validation that is pre-empted without end is given up": Case(
        seen(job(), validation=kube_job("validate", *(pod(disrupted=True) for _ in range(10)), pod())),
        (StopJob(owned_name("tone", UID, "validate")),),
        "Failed",
        {"Validated": ("False", "NoProgress"), "Failed": ("True", "NoProgress")},
        "validation was evicted or pre-empted 10 times",
    ),
    "a priority that the installation does not allow": Case(
        seen(job(scheduling={"priorityClassName": "system-node-critical"})),
        (),
        "Failed",
        {"Validated": ("False", "NotAllowed"), "Failed": ("True", "NotAllowed")},
        "spec.scheduling.priorityClassName names system-node-critical, which this installation does not allow",
    ),
    "an export into another job's folder": Case(
        seen(job(output={"exports": [{"uri": "s3://tunesmith//store/./other/job-1/artifact"}]})),
        (),
        "Failed",
        {"Validated": ("False", "NotAllowed"), "Failed": ("True", "NotAllowed")},
        "spec.output.exports[0].uri s3://tunesmith//store/./other/job-1/artifact is in this installation's store",
    ),
    "rows out of another namespace's folder": Case(
        seen(job(dataset={"train": [{"uri": "s3://tunesmith/store/other/job-1/tmp/tokens/*.arrow"}]})),
        (),
        "Failed",
        {"Validated": ("False", "NotAllowed"), "Failed": ("True", "NotAllowed")},
        "spec.dataset.train[0].uri s3://tunesmith/store/other/job-1/tmp/tokens/*.arrow reaches into",
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
}
