"""How a trainer process says how it ended: exit code and termination message (at most 4,096 bytes of JSON)."""

from __future__ import annotations

from enum import IntEnum, StrEnum

from pydantic import Field

from tunesmith.api.conditions import FailureReason
from tunesmith.api.finetunejob_status import ArtifactStatus, EvaluationStatus, Preflight, Resolved
from tunesmith.api.model import StatusModel

TERMINATION_MESSAGE_PATH = "/dev/termination-log"
TERMINATION_MESSAGE_MAX_BYTES = 4096
_SHORT = 100
"""Characters of a message that has to share the space with others."""


class ExitCode(IntEnum):
    """Exit codes of the trainer."""

    DONE = 0
    USER_FAULT = 2
    RETRYABLE = 3
    PREEMPTED = 143


class Outcome(StrEnum):
    """How the process ended."""

    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    PREEMPTED = "Preempted"


class ExportResult(StatusModel):
    """What became of an entry of spec.output.exports; no reason: the whole copy is there."""

    reason: FailureReason | None = None
    message: str = ""


class TrainerResult(StatusModel):
    """The termination message. `validate` fills preflight and resolved, `train` also artifact and evaluation."""

    outcome: Outcome
    reason: FailureReason | None = None
    message: str = ""
    retryable: bool = False
    preflight: Preflight | None = None
    resolved: Resolved | None = None
    artifact: ArtifactStatus | None = None
    evaluation: EvaluationStatus | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    exports: list[ExportResult] | None = None
    """In the order of spec.output.exports, which says where they go; None where nothing was to be exported."""
    resumed_from_step: int | None = None
    """Step of the checkpoint that the attempt went on from; None where it began at step 0."""
    lost_peer: bool = False
    """Another process of the run ended first: what it says is the cause, this is what followed."""

    @property
    def exit_code(self) -> ExitCode:
        """The exit code that goes with the outcome."""
        if self.outcome is Outcome.SUCCEEDED:
            return ExitCode.DONE
        if self.outcome is Outcome.PREEMPTED:
            return ExitCode.PREEMPTED
        return ExitCode.RETRYABLE if self.retryable else ExitCode.USER_FAULT

    def termination_message(self) -> str:
        """JSON of at most 4,096 bytes.

        Too long, it loses the examples of rows, the suites' scores (evaluation.json has them), the ends of
        the suites' messages, the gates, the ends of the exports' messages, then that of its own.
        """
        result = self
        if result.preflight is not None and len(_text(result)) > TERMINATION_MESSAGE_MAX_BYTES:
            dropped = [one.model_copy(update={"examples": None}) for one in result.preflight.dropped or []]
            trained = [one.model_copy(update={"examples": None}) for one in result.preflight.also_trained or []]
            shown = {"dropped": dropped or None, "also_trained": trained or None}
            result = result.model_copy(update={"preflight": result.preflight.model_copy(update=shown)})
        if result.evaluation is not None and len(_text(result)) > TERMINATION_MESSAGE_MAX_BYTES:
            result = result.model_copy(
                update={
                    "evaluation": result.evaluation.model_copy(update={"scores": None}),
                    "metrics": {name: value for name, value in result.metrics.items() if "/" not in name},
                }
            )
        if result.evaluation is not None and len(_text(result)) > TERMINATION_MESSAGE_MAX_BYTES:
            failures = result.evaluation.failures or []
            cut = [one.model_copy(update={"message": one.message[:_SHORT]}) for one in failures]
            evaluation = result.evaluation.model_copy(update={"failures": cut or None})
            result = result.model_copy(update={"evaluation": evaluation})
        if result.evaluation is not None and len(_text(result)) > TERMINATION_MESSAGE_MAX_BYTES:
            result = result.model_copy(update={"evaluation": result.evaluation.model_copy(update={"gates": None})})
        if result.exports is not None and len(_text(result)) > TERMINATION_MESSAGE_MAX_BYTES:
            short = [one.model_copy(update={"message": one.message[:_SHORT]}) for one in result.exports]
            result = result.model_copy(update={"exports": short})
        while len(text := _text(result)) > TERMINATION_MESSAGE_MAX_BYTES:
            excess = len(text) - TERMINATION_MESSAGE_MAX_BYTES
            result = result.model_copy(
                update={"message": result.message[: max(0, len(result.message) - excess - 3)] + "…"}
            )
            if not result.message.strip("…"):
                result = result.model_copy(update={"message": "…", "metrics": {}, "resolved": None})
                break
        return _text(result).decode()


def blame(result: TrainerResult | None) -> int:
    """Which of several failed processes ended the others, by what each said at its end: the one with the least number.

    Who failed and says why comes before who was stopped or died without a word, and that before who lost a peer.
    """
    if result is None or result.outcome is not Outcome.FAILED:
        return 2
    if result.lost_peer:
        return 3
    return 1 if result.retryable else 0


def _text(result: TrainerResult) -> bytes:
    return result.model_dump_json(by_alias=True, exclude_none=True).encode()
