"""Jobs that start from the adapter of another FineTuneJob."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.finetune.plan_cases import result, terminated_pod
from tests.finetune.worlds import ARTIFACT, STORE, condition, job, kube_job, manifest, observed
from tunesmith.api.finetunejob import FineTuneJob
from tunesmith.contracts.location import artifact_uri
from tunesmith.finetune.observe import TRAIN, VALIDATE
from tunesmith.finetune.plan import CreateAttempt, CreateValidation, plan
from tunesmith.finetune.render import configuration

WREN_UID = "0f0e0d0c-0000-4000-8000-000000000002"
FROM_WREN = {"fineTuneJob": {"name": "wren"}}
COMPLETE = {"conditions": [condition("Complete", reason="Complete")], "artifact": ARTIFACT, "phase": "Complete"}
URI = artifact_uri(STORE, "team", "wren", WREN_UID)


def source(**status: Any) -> FineTuneJob:
    """Return the job `wren`; its status names the artifact of another job, as a forged report would."""
    document = manifest()
    document["metadata"] |= {"name": "wren", "uid": WREN_UID}
    return FineTuneJob.model_validate({**document, "status": status})


FAILED = source(conditions=[condition("Failed", reason="OutOfMemory")])
WAITING = {
    "a missing job": (None, "waits for FineTuneJob wren, which does not exist in namespace team"),
    "a running job": (source(phase="Running"), "waits for FineTuneJob wren, which is Running"),
    "a job without a report": (source(conditions=COMPLETE["conditions"], phase="Complete"), "which is Complete"),
}


@pytest.mark.parametrize("case", WAITING)
def test_a_job_waits_until_the_other_one_is_complete(case: str) -> None:
    wren, message = WAITING[case]
    decided = plan(observed(job(continueFrom=FROM_WREN), source=wren), STORE)
    [validated] = decided.status.conditions
    assert decided.actions == ()
    assert decided.requeue_after is not None
    assert (validated.status, validated.reason) == ("Unknown", "WaitingForAdapter")
    assert message in validated.message


def test_a_job_fails_if_the_other_one_failed() -> None:
    decided = plan(observed(job(continueFrom=FROM_WREN), source=FAILED), STORE)
    assert (decided.actions, decided.status.phase, decided.status.reason) == ((), "Failed", "AdapterNotFound")
    assert "FineTuneJob wren of spec.continueFrom failed with OutOfMemory" in decided.status.conditions[-1].message


def test_the_trainer_gets_the_artifact_whatever_happens_to_the_other_job() -> None:
    started = job(continueFrom=FROM_WREN)
    decided = plan(observed(started, source=source(**COMPLETE)), STORE)
    assert decided.actions == (CreateValidation(),)
    expected = {"artifact": {"uri": URI, "digest": ARTIFACT["digest"]}}
    validating = started.model_copy(update={"status": decided.status})
    assert _spec(validating, VALIDATE)["continueFrom"] == expected

    forged = {"uri": "s3://tunesmith/store/other/x/artifact", "digest": "sha256:" + "b" * 64}
    report = result(outcome="Succeeded", resolved={"continuedFrom": forged, "totalSteps": 9})
    finished = kube_job("validate", terminated_pod(0, report), succeeded=True)
    decided = plan(observed(validating, validation=finished), STORE)
    assert decided.actions == (CreateAttempt(1),)
    training = started.model_copy(update={"status": decided.status})
    document = yaml.safe_load(configuration(training, TRAIN)["data"]["job.yaml"])
    assert document["spec"]["continueFrom"] == expected
    assert document["status"]["resolved"] == {"continuedFrom": expected["artifact"], "totalSteps": 9}
    assert FineTuneJob.model_validate(document).spec.continue_from is not None


def test_an_artifact_in_another_namespaces_part_of_the_store_is_refused() -> None:
    stolen = job(continueFrom={"artifact": {"uri": f"{STORE}/other/x-1/artifact"}})
    decided = plan(observed(stolen), STORE)
    assert (decided.status.phase, decided.status.reason) == ("Failed", "NotAllowed")
    assert "spec.continueFrom.artifact.uri" in decided.status.conditions[0].message


def test_a_job_does_not_start_from_itself() -> None:
    with pytest.raises(ValueError, match="must name another FineTuneJob"):
        job(continueFrom={"fineTuneJob": {"name": "tone"}})


def _spec(of: FineTuneJob, stage: str) -> Any:
    return yaml.safe_load(configuration(of, stage)["data"]["job.yaml"])["spec"]
