"""Parity of an AdapterDeployment's revisions: the worst result of its pods, and the condition that reports it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.api.conditions import AdapterDeploymentReason as Reason
from tunesmith.api.conditions import ConditionStatus
from tunesmith.api.parity import ParityMode, ParityVerdict, RevisionParity
from tunesmith.contracts.parity import nats
from tunesmith.contracts.sentence import one_line
from tunesmith.serving.resolve import short

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tunesmith.api.adapterdeployment import Revision
    from tunesmith.contracts.agent import AdapterParity

_MAX_MESSAGE_LENGTH = 1024
_ORDER = tuple(ParityVerdict)
_OUTCOMES = {
    ParityVerdict.PASSED: (ConditionStatus.TRUE, Reason.PARITY_PASSED),
    ParityVerdict.FAILED: (ConditionStatus.FALSE, Reason.PARITY_FAILED),
    ParityVerdict.UNDECIDED: (ConditionStatus.UNKNOWN, Reason.PARITY_UNDECIDED),
    ParityVerdict.NOT_RECORDED: (ConditionStatus.UNKNOWN, Reason.PARITY_NOT_RECORDED),
    ParityVerdict.UNFINISHED: (ConditionStatus.UNKNOWN, Reason.PARITY_PENDING),
}


def worst_parity(results: Iterable[tuple[str, AdapterParity | None]]) -> RevisionParity | None:
    """Return the worst of the results of a revision, by pod name; None without results."""
    known = [(pod, result) for pod, result in results if result is not None]
    if not known:
        return None
    # The greater distance is the worse one; by name, so that equal results do not alternate.
    pod, worst = max(known, key=lambda entry: (_ORDER.index(entry[1].verdict), entry[1].distance or 0.0, entry[0]))
    return RevisionParity(
        verdict=worst.verdict,
        pod=pod,
        distance=_rounded(worst.distance),
        gap=_rounded(worst.gap),
        tolerance=worst.tolerance,
        base_distance=_rounded(worst.base_distance),
        message=one_line(worst.message, _MAX_MESSAGE_LENGTH) if worst.message else None,
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def parity_condition(mode: ParityMode, revision: Revision | None) -> tuple[ConditionStatus, Reason, str] | None:
    """Return the status, reason and message of the condition; None if there is nothing to check."""
    if mode is ParityMode.OFF or revision is None or revision.base_model:
        return None  # the files of a base model are checked against the published hashes
    if revision.parity is None:
        return ConditionStatus.UNKNOWN, Reason.PARITY_PENDING, "no pod has compared the answers of the newest revision"
    status, reason = _OUTCOMES[revision.parity.verdict]
    found = revision.parity
    return status, reason, f"revision {short(revision.digest)} on pod {found.pod}: {found.message or found.verdict}"


def shown_parity(revision: Revision | None) -> str | None:
    """Return distance and gap for a column, such as 0.004 of 2.1, followed by the verdict unless it is Passed."""
    if revision is None or revision.parity is None:
        return None
    found = revision.parity
    if found.distance is None or found.gap is None:
        return str(found.verdict)
    text = f"{nats(found.distance)} of {nats(found.gap)}"
    return text if found.verdict is ParityVerdict.PASSED else f"{text} {found.verdict}"
