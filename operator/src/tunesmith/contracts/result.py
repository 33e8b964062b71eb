"""Result of a trainer process: exit code and termination message (at most 4,096 bytes of JSON)."""

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
"""Bytes kept of a message that shares the space with others."""
_LEAST_MESSAGE = 1024
"""Bytes of the result's own message that take priority over the other fields."""


class ExitCode(IntEnum):
    """Exit codes of the trainer."""

    DONE = 0
    USER_FAULT = 2
    RETRYABLE = 3
    PREEMPTED = 143


class Outcome(StrEnum):
    """Outcome of the process."""

    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    PREEMPTED = "Preempted"


class ExportResult(StatusModel):
    """Outcome of an entry of spec.output.exports; without a reason the copy is complete."""

    reason: FailureReason | None = None
    message: str = ""


def _finite(metrics: object) -> object:
    """Return the finite metrics: others are null in JSON."""
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
    """Outcomes in the order of spec.output.exports, which has the destinations; None if nothing was to be exported."""
    resumed_from_step: Count | None = None
    """Step of the checkpoint from which the attempt resumed; None if it began at step 0."""
    lost_peer: bool = False
    """True if another process of the run failed first: its report has the cause, and this one a consequence."""

    @classmethod
    def parse(cls, message: str) -> TrainerResult | None:
        """Return the result in a pod's termination message; None if the message is not a result."""
        try:
            return parse_report(cls, message)
        except ValueError:
            return None

    @property
    def exit_code(self) -> ExitCode:
        """Exit code for the outcome."""
        if self.outcome is Outcome.SUCCEEDED:
            return ExitCode.DONE
        if self.outcome is Outcome.PREEMPTED:
            return ExitCode.PREEMPTED
        return ExitCode.RETRYABLE if self.retryable else ExitCode.USER_FAULT

    def termination_message(self) -> str:
        """Return the JSON of the result, at most 4,096 bytes long.

        If it is too long, these are removed in order until it fits: the examples of rows; the suites' scores, which
        evaluation.json has; the ends of the suites' messages; the gates; the ends of the exports' messages. Then the
        end of its own message is cut. To keep 1,024 bytes of that message, these are removed in order: the suites' and
        the exports' messages, what was resolved, what was counted, the metrics, the evaluation, the exports and the
        artifact.
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
    """Return the sort key of a failed process: the lowest one is the cause of the others' failures.

    Processes that report a cause come first, then those stopped or without a report, then those that lost a peer.
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
"""Trims after which only the outcome, its reason and the message are left."""


def _evaluated(result: TrainerResult, **fields: object) -> TrainerResult:
    """Return the result with changed fields of its evaluation; unchanged without an evaluation."""
    if result.evaluation is None:
        return result
    return result.model_copy(update={"evaluation": result.evaluation.model_copy(update=fields)})


def _text(result: TrainerResult) -> bytes:
    return result.model_dump_json(by_alias=True, exclude_none=True).encode()


def _size(result: TrainerResult) -> int:
    return len(_text(result))


def _room(result: TrainerResult) -> int:
    """Return the bytes left for the message."""
    return TERMINATION_MESSAGE_MAX_BYTES - _size(result.model_copy(update={"message": ""}))


def _size_of(text: str) -> int:
    """Return the size of a text as JSON, in bytes, without the quotes."""
    return len(to_json(text)) - 2


def _cut(text: str, most: int, end: str = "") -> str:
    """Return the beginning of the text, at most `most` bytes as JSON; if it was cut, it is followed by `end`."""
    if _size_of(text) <= most:
        return text
    room = most - _size_of(end)
    for length, character in enumerate(text):
        room -= _size_of(character)
        if room < 0:
            return text[:length] + end
    return text
