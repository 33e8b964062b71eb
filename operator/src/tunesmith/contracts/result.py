"""Result of a trainer process: exit code and termination message (at most 4,096 bytes of JSON)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import to_json

from tunesmith.api.adapterdeployment import ImportedAdapter
from tunesmith.api.conditions import FailureReason
from tunesmith.api.finetunejob_status import ArtifactStatus, Count, EvaluationStatus, Preflight, Resolved
from tunesmith.api.model import StatusModel
from tunesmith.contracts.report import parse_report

if TYPE_CHECKING:
    from collections.abc import Callable

TERMINATION_MESSAGE_PATH = "/dev/termination-log"
TERMINATION_MESSAGE_MAX_BYTES = 4096
RESERVED_MESSAGE_BYTES = 1024
"""Bytes of the result's own message that have priority over the other fields."""
_SHORT_TEXT_BYTES = 100
_TEXTS = frozenset({"message", "reason", "suggestion"})
"""Fields whose values are sentences. Enumerated reasons are shorter than a short text."""


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
    imported: ImportedAdapter | None = None
    """Facts about the adapter that `import` has published."""
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
        """Return the JSON of the result, at most 4,096 bytes long: the limit of the kubelet.

        The outcome, its reason, the flags and the beginning of the message are always included. The other fields are
        added in the order of `_FIELDS`, in their full or short form, until one does not fit; the message gets the
        remaining space. The rest cannot reach the operator another way: it reads neither Secrets nor the object store,
        and the trainer's `/progress` ends with its process.
        """
        complete = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        document = {name: value for name, value in complete.items() if name in _ALWAYS}
        document["message"] = _cut(self.message, RESERVED_MESSAGE_BYTES)
        for field in _FIELDS:
            value = _get(complete, field.path)
            if value is None:
                continue
            forms = (_with(document, field.path, form(value)) for form in (field.full, field.short) if form is not None)
            fitting = next((form for form in forms if len(to_json(form)) <= TERMINATION_MESSAGE_MAX_BYTES), None)
            if fitting is None:
                break
            document = fitting
        room = TERMINATION_MESSAGE_MAX_BYTES - len(to_json({**document, "message": ""}))
        return to_json({**document, "message": _cut(self.message, room)}).decode()


class Culpability(IntEnum):
    """Rank of a failed process among those of a run: the lowest one caused the others to fail."""

    ROOT_CAUSE = 0
    """It reports a failure that a new attempt would repeat."""
    RETRYABLE = 1
    """It reports a failure that a new attempt may not have."""
    SILENT = 2
    """It was stopped, or exited without a result."""
    PEER_LOST = 3
    """It reports that another process failed first."""


def culpability(result: TrainerResult | None) -> Culpability:
    """Return the culpability of a failed process with this result; None: it has none."""
    if result is None or result.outcome is not Outcome.FAILED:
        return Culpability.SILENT
    if result.lost_peer:
        return Culpability.PEER_LOST
    return Culpability.RETRYABLE if result.retryable else Culpability.ROOT_CAUSE


def _whole(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    return value


def _without(*names: str) -> Callable[[Any], Any]:
    """Return a form that omits the fields with these names, at any depth."""

    def form(value: Any) -> Any:  # noqa: ANN401 - any JSON value
        if isinstance(value, dict):
            return {name: form(entry) for name, entry in value.items() if name not in names}
        return [form(entry) for entry in value] if isinstance(value, list) else value

    return form


def _short_texts(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """Return the value with the ends of its sentences cut, at any depth."""
    if isinstance(value, dict):
        return {
            name: _cut(entry, _SHORT_TEXT_BYTES) if name in _TEXTS and isinstance(entry, str) else _short_texts(entry)
            for name, entry in value.items()
        }
    return [_short_texts(entry) for entry in value] if isinstance(value, list) else value


def _short_preflight(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    return _short_texts(_without("dropped", "alsoTrained", "ignoredKeys", "sources", "peakParts")(value))


def _own_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics of training, without the scores of suites, whose names are `suite/metric`."""
    return {name: value for name, value in metrics.items() if "/" not in name}


@dataclass(frozen=True)
class _Field:
    """A field of the termination message, and its forms by preference."""

    path: str
    full: Callable[[Any], Any] = _whole
    short: Callable[[Any], Any] | None = None


_ALWAYS = frozenset({"outcome", "reason", "retryable", "lostPeer", "resumedFromStep"})
_FIELDS = (
    _Field("artifact", short=_short_texts),
    _Field("imported"),
    _Field("exports", short=_short_texts),
    _Field("preflight", full=_without("examples", "sources"), short=_short_preflight),
    _Field("resolved", short=_without("targetModules")),
    _Field("evaluation", full=_without("gates", "failures", "scores")),
    _Field("evaluation.gates", short=_without("min", "max")),
    _Field("evaluation.failures", short=_short_texts),
    _Field("metrics", full=_own_metrics),
    _Field("message"),
    _Field("evaluation.scores"),  # evaluation.json in the artifact has all of them
    _Field("metrics"),
    _Field("preflight", full=_without("examples", "names")),
    _Field("preflight"),
)
"""Fields in the order of their priority. A field that is listed again replaces its earlier form."""


def _get(document: dict[str, Any], path: str) -> Any:  # noqa: ANN401 - any JSON value
    value: Any = document
    for name in path.split("."):
        value = value.get(name) if value is not None else None
    return value


def _with(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    """Return a copy of the document with a value at the path."""
    name, _, rest = path.partition(".")
    return {**document, name: _with(document.get(name, {}), rest, value) if rest else value}


def _json_size(text: str) -> int:
    """Return the size of a text as JSON, in bytes, without the quotes."""
    return len(to_json(text)) - 2


def _cut(text: str, limit: int) -> str:
    """Return the text; if it is longer than `limit` bytes as JSON, its beginning, followed by "…"."""
    if _json_size(text) <= limit:
        return text
    room = limit - _json_size("…")
    for length, character in enumerate(text):
        room -= _json_size(character)
        if room < 0:
            return text[:length] + "…"
    return text
