"""Plan cases, and results of pods that several of them share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from tests.finetune.worlds import ARTIFACT, NOW, pod

if TYPE_CHECKING:
    from tunesmith.finetune.observe import Observation
    from tunesmith.finetune.plan import Action


def result(**fields: Any) -> str:
    return json.dumps(fields)


def exported(*reports: dict[str, Any]) -> str:
    return result(outcome="Succeeded", artifact=ARTIFACT, exports=reports)


def terminated_pod(exit_code: int, message: str = "", **fields: Any) -> Any:
    return pod(exit_code=exit_code, finished_at=NOW, termination_message=message, **fields)


DONE = result(outcome="Succeeded", artifact=ARTIFACT, evaluation={"baseLoss": 3.0, "loss": 1.5})
ELSEWHERE = result(outcome="Succeeded", artifact={**ARTIFACT, "uri": "s3://tunesmith/store/other/x/artifact"})
EXPORTS = [{"uri": "s3://copies/tone"}, {"hub": "org/tone"}]
DENIED = {"reason": "AccessDenied", "message": "access to the export was denied"}
VALID = result(outcome="Succeeded", preflight={"rows": 90, "validationRows": 10})
GIB = 2**30
TIGHT = result(
    outcome="Succeeded",
    preflight={
        "rows": 90,
        "estimatedPeakBytes": 13 * GIB,
        "gpuMemoryBytes": 12 * GIB,
        "verdict": "Unknown",
        "suggestion": "use qlora",
    },
)
NO_SCORES = "evaluation suite mine: the task painted cannot be used: mine.py line 3: KeyError"
UNSCORED = result(
    outcome="Succeeded",
    artifact=ARTIFACT,
    evaluation={
        "baseLoss": 3.0,
        "loss": 1.5,
        "failures": [{"suite": "mine", "reason": "InvalidSpec", "message": NO_SCORES}],
    },
)
STOPPED_EARLY = result(
    outcome="Succeeded",
    artifact=ARTIFACT,
    resolved={"totalSteps": 30},
    evaluation={"baseLoss": 3.0, "loss": 1.5, "publishedStep": 12, "stoppedEarlyAt": 18},
)
GATE = result(outcome="Failed", reason="GateFailed", message="loss 1.5 is above 1", artifact=ARTIFACT)
OUTAGE = result(outcome="Failed", reason="StoreUnavailable", message="no answer", retryable=True)
SILENT_STORE = "the data set s3://data/a.jsonl could not be reached; the Secret has no AWS_ENDPOINT_URL"
MALFORMED = result(outcome="Failed", reason="DatasetInvalid", message="line 3 is not JSON")
NODE_FULL = (
    "The node was low on resource: ephemeral-storage. Threshold quantity: 1Gi, available: 9Mi. Container trainer was "
    "using 51Gi, request is 0, has larger consumption of ephemeral-storage. "
)
FAR = timedelta(hours=1)
PLACED = NOW - timedelta(minutes=1)
SECRET = 'secret "tunesmith-store" not found'


@dataclass(frozen=True)
class Case:
    """An observation with the expected actions, phase and conditions, as {type: (status, reason)}."""

    observation: Observation
    actions: tuple[Action, ...]
    phase: str
    conditions: dict[str, tuple[str, str]]
    message: str = ""
    """Part of the message of any condition."""
    outcomes: tuple[str, ...] = ()
