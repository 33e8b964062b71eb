"""Cases of a plan: jobs that are done or have failed, and copies of the artifact."""

from __future__ import annotations

from plan_cases import DENIED, EXPORTS, FAR, GATE, NO_SCORES, UNSCORED, Case, ended, exported
from worlds import UID, attempt, condition, job, kube_job, pod, seen, validated

from tunesmith.contracts.location import owned_name
from tunesmith.finetune.plan import StopJob

CASES = {
    "a failed gate keeps the artifact": Case(
        seen(job(validated(attempt(1))), attempts={1: kube_job("1", ended(2, GATE), failed=True)}),
        (),
        "Failed",
        {"Validated": ("True", "Valid"), "Published": ("True", "Published"), "Failed": ("True", "GateFailed")},
        "loss 1.5 is above 1",
        ("Failed",),
    ),
    "a job whose suite has no scores is complete": Case(
        seen(job(validated(attempt(1))), attempts={1: kube_job("1", ended(0, UNSCORED), succeeded=True)}),
        (),
        "Complete",
        {"Validated": ("True", "Valid"), "Published": ("True", "Published"), "Complete": ("True", "Complete")},
        f"; {NO_SCORES}",
        ("Succeeded",),
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
