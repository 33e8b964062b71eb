"""Plan cases: finished jobs and copies of the artifact."""

from __future__ import annotations

from tests.finetune.plan_cases import (
    DENIED,
    EXPORTS,
    FAR,
    GATE,
    NO_SCORES,
    STOPPED_EARLY,
    UNSCORED,
    Case,
    exported,
    terminated_pod,
)
from tests.finetune.worlds import UID, attempt, condition, job, kube_job, observed, pod, validated
from tunesmith.contracts.location import owned_name
from tunesmith.finetune.plan import StopJob

CASES = {
    "a failed gate keeps the artifact": Case(
        observed(job(validated(attempt(1))), attempts={1: kube_job("1", terminated_pod(2, GATE), failed=True)}),
        (),
        "Failed",
        {"Validated": ("True", "Valid"), "Published": ("True", "Published"), "Failed": ("True", "GateFailed")},
        "loss 1.5 is above 1",
        ("Failed",),
    ),
    "a job whose suite has no scores is complete": Case(
        observed(job(validated(attempt(1))), attempts={1: kube_job("1", terminated_pod(0, UNSCORED), succeeded=True)}),
        (),
        "Complete",
        {"Validated": ("True", "Valid"), "Published": ("True", "Published"), "Complete": ("True", "Complete")},
        f"; {NO_SCORES}",
        ("Succeeded",),
    ),
    "a job that stopped early is complete": Case(
        observed(
            job(validated(attempt(1))), attempts={1: kube_job("1", terminated_pod(0, STOPPED_EARLY), succeeded=True)}
        ),
        (),
        "Complete",
        {"Validated": ("True", "Valid"), "Published": ("True", "Published"), "Complete": ("True", "StoppedEarly")},
        "training stopped early, after step 18 of 30; held-out loss went from 3 to 1.5 at step 12; the adapter is at",
        ("Succeeded",),
    ),
    "a job whose exports succeed is complete": Case(
        observed(
            job(validated(attempt(1)), output={"exports": EXPORTS}),
            attempts={1: kube_job("1", terminated_pod(0, exported({}, {})), succeeded=True)},
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
    "a job whose exports fail is complete too": Case(
        observed(
            job(validated(attempt(1)), output={"exports": EXPORTS}),
            attempts={1: kube_job("1", terminated_pod(0, exported({}, DENIED)), succeeded=True)},
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
    "a complete job is not changed when its Jobs are deleted": Case(
        observed(
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
    "running Jobs of a failed job are stopped": Case(
        observed(
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
