"""The operator's pods are deleted without a grace period while a job trains: one attempt, a complete status."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

from e2e.custom_resources import finished_job
from e2e.installation import DEMO, SYSTEM, apply, condition, delete, items, kubectl

if TYPE_CHECKING:
    from e2e.installation import Object

KILLS = 10


def test_killing_the_operator_ten_times_causes_no_new_attempt(second_manifest: Object) -> None:
    name = second_manifest["metadata"]["name"]
    delete("finetunejob", name, DEMO)
    chance = random.Random(20)  # noqa: S311 - repeatable, not secret
    killed = 0
    next_kill = time.monotonic() + chance.uniform(0, 3)

    def kill(_: Object | None) -> None:
        nonlocal killed, next_kill
        if killed < KILLS and time.monotonic() > next_kill:
            pods = items("pods", SYSTEM, "app.kubernetes.io/component=operator")
            pod = chance.choice(pods)["metadata"]["name"]
            kubectl(*("delete", "pod", pod, "--namespace", SYSTEM, "--grace-period=0", "--force", "--ignore-not-found"))
            killed += 1
            next_kill = time.monotonic() + chance.uniform(0, 3)

    apply(second_manifest)
    job = finished_job(name, while_waiting=kill)
    assert killed == KILLS, "the job ended before the operator had died ten times: give it more steps"
    assert condition(job, "Complete")["status"] == "True", condition(job, "Failed")
    assert [attempt["outcome"] for attempt in job["status"]["attempts"]] == ["Succeeded"]
    assert job["status"]["evaluation"]["loss"] < job["status"]["evaluation"]["baseLoss"]
    for kind in ("Validated", "Published"):
        assert condition(job, kind)["status"] == "True", kind
    owned = items("jobs", DEMO, f"tunesmith.dev/finetunejob={name},app.kubernetes.io/component=train")
    assert len(owned) <= 1
