"""Parity of an adapter: the engine answers as the trained model did."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from tunesmith.api.model import StatusModel


class ParityMode(StrEnum):
    """Use of the parity check of an adapter."""

    REQUIRED = "Required"
    REPORT = "Report"
    OFF = "Off"


class ParityVerdict(StrEnum):
    """Result of the parity check of an adapter, the worst one last."""

    PASSED = "Passed"
    UNFINISHED = "Unfinished"
    NOT_RECORDED = "NotRecorded"
    UNDECIDED = "Undecided"
    FAILED = "Failed"


class RevisionParity(StatusModel):
    """Result of the parity check of a revision: that of the pod with the worst one."""

    verdict: ParityVerdict = Field(
        description="Passed: the engine answers as the trained model. Failed: it does not; see message. Undecided: "
        "adapter and base answer too similarly to tell them apart. NotRecorded: the artifact has no expected answers. "
        "Unfinished: the engine has not answered yet."
    )
    pod: str = Field(max_length=253, description="Name of the pod.")
    distance: float | None = Field(
        default=None,
        description="Distance of the engine's answers from the trained model's: greatest difference of "
        "log-probabilities, in nats.",
    )
    gap: float | None = Field(
        default=None, description="Distance of the base model's answers from the trained model's, in nats."
    )
    tolerance: float | None = Field(default=None, description="Tolerated distance, in nats.")
    base_distance: float | None = Field(
        default=None, description="Distance of the base model's answers on the engine from those in training, in nats."
    )
    message: str | None = Field(default=None, max_length=1024, description="Explanation of the verdict.")
