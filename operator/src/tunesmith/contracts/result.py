"""How a trainer process says how it ended: exit code and termination message (at most 4,096 bytes of JSON)."""

from __future__ import annotations

import math
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Annotated

from pydantic import BeforeValidator, Field
from pydantic_core import to_json

from tunesmith.api.conditions import FailureReason
from tunesmith.api.finetunejob_status import ArtifactStatus, Count, EvaluationStatus, Preflight, Resolved
from tunesmith.api.model import StatusModel
from tunesmith.contracts.report import parse_report

if TYPE_CHECKING:
    from collections.abc import Callable

TERMINATION_MESSAGE_PATH = "/dev/termination-log"
TERMINATION_MESSAGE_MAX_BYTES = 4096
_SHORT = 200
"""Bytes of a message that has to share the space with others."""
_LEAST_MESSAGE = 1024
"""Bytes of the result's own message that are worth more than what the rest says."""


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


def _finite(metrics: object) -> object:
    """The metrics that are numbers: others are null in JSON."""
    if not isinstance(metrics, dict):
        return metrics
    return {name: value for name, value in metrics.items() if isinstance(value, int | float) and math.isfinite(value)}


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
    metrics: Annotated[dict[str, float], BeforeValidator(_finite)] = Field(default_factory=dict)
    exports: list[ExportResult] | None = None
    """In the order of spec.output.exports, which says where they go; None where nothing was to be exported."""
    resumed_from_step: Count | None = None
    """Step of the checkpoint that the attempt went on from; None where it began at step 0."""
    lost_peer: bool = False
    """Another process of the run ended first: what it says is the cause, this is what followed."""

    @classmethod
    def parse(cls, message: str) -> TrainerResult | None:
        """The result in a pod's termination message; None where the message is not one."""
        try:
            return parse_report(cls, message)
        except ValueError:
            return None

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

        Too long, it loses, one after the other and until it fits: the examples of rows, the suites' scores
        (evaluation.json has them), the ends of the suites' messages, the gates, the ends of the exports' messages; then
        the end of its own message, of which 1,024 bytes stay while it loses the suites' and the exports' messages,
        what was resolved and what was counted, and last the metrics, the evaluation, the exports and the artifact.
        """
        result = self
        for lose in _LOSSES:
            if _size(result) <= TERMINATION_MESSAGE_MAX_BYTES:
                break
            result = lose(result)
        for lose in _LAST_LOSSES:
            if _room(result) >= min(_LEAST_MESSAGE, _size_of(self.message)):
                break
            result = lose(result)
        return _text(result.model_copy(update={"message": _cut(self.message, _room(result), end="…")})).decode()


def blame(result: TrainerResult | None) -> int:
    """Which of several failed processes ended the others, by what each said at its end: the one with the least number.

    Who failed and says why comes before who was stopped or died without a word, and that before who lost a peer.
    """
    if result is None or result.outcome is not Outcome.FAILED:
        return 2
    if result.lost_peer:
        return 3
    return 1 if result.retryable else 0


def _without_examples(result: TrainerResult) -> TrainerResult:
    if result.preflight is None:
        return result
    dropped = [one.model_copy(update={"examples": None}) for one in result.preflight.dropped or []]
    trained = [one.model_copy(update={"examples": None}) for one in result.preflight.also_trained or []]
    shown = {"dropped": dropped or None, "also_trained": trained or None}
    return result.model_copy(update={"preflight": result.preflight.model_copy(update=shown)})


def _without_scores(result: TrainerResult) -> TrainerResult:
    metrics = {name: value for name, value in result.metrics.items() if "/" not in name}
    return _evaluated(result.model_copy(update={"metrics": metrics}), scores=None)


def _with_short_failures(result: TrainerResult, most: int = _SHORT) -> TrainerResult:
    failures = (result.evaluation.failures if result.evaluation is not None else None) or []
    cut = [one.model_copy(update={"message": _cut(one.message, most)}) for one in failures]
    return _evaluated(result, failures=cut or None)


def _without_gates(result: TrainerResult) -> TrainerResult:
    return _evaluated(result, gates=None)


def _with_short_exports(result: TrainerResult, most: int = _SHORT) -> TrainerResult:
    if result.exports is None:
        return result
    cut = [one.model_copy(update={"message": _cut(one.message, most)}) for one in result.exports]
    return result.model_copy(update={"exports": cut})


def _without_messages(result: TrainerResult) -> TrainerResult:
    return _with_short_exports(_with_short_failures(result, 0), 0)


def _without(**fields: object) -> Callable[[TrainerResult], TrainerResult]:
    return lambda result: result.model_copy(update=fields)


_LOSSES: tuple[Callable[[TrainerResult], TrainerResult], ...] = (
    _without_examples,
    _without_scores,
    _with_short_failures,
    _without_gates,
    _with_short_exports,
)
_LAST_LOSSES: tuple[Callable[[TrainerResult], TrainerResult], ...] = (
    _without_messages,
    _without(resolved=None),
    _without(preflight=None),
    _without(metrics={}),
    _without(evaluation=None),
    _without(exports=None),
    _without(artifact=None),
)
"""After the last of them nothing is left but the outcome, its reason and the message."""


def _evaluated(result: TrainerResult, **fields: object) -> TrainerResult:
    """The result with other fields of its evaluation, where it has one."""
    if result.evaluation is None:
        return result
    return result.model_copy(update={"evaluation": result.evaluation.model_copy(update=fields)})


def _text(result: TrainerResult) -> bytes:
    return result.model_dump_json(by_alias=True, exclude_none=True).encode()


def _size(result: TrainerResult) -> int:
    return len(_text(result))


def _room(result: TrainerResult) -> int:
    """Bytes that are left for the message."""
    return TERMINATION_MESSAGE_MAX_BYTES - _size(result.model_copy(update={"message": ""}))


def _size_of(text: str) -> int:
    """Bytes of a text inside the quotes of its JSON."""
    return len(to_json(text)) - 2


def _cut(text: str, most: int, end: str = "") -> str:
    """The text's begin, of at most so many bytes in JSON, with `end` where it was cut."""
    if _size_of(text) <= most:
        return text
    room = most - _size_of(end)
    for length, character in enumerate(text):
        room -= _size_of(character)
        if room < 0:
            return text[:length] + end
    return text
