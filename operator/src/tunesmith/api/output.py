"""What a FineTuneJob writes beside its adapter."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from tunesmith.api.model import ApiModel


class Merge(StrEnum):
    """Into which base the adapter is merged."""

    NONE = "None"
    ORIGINAL = "Original"
    DEQUANTIZED = "Dequantized"


class Servable(StrEnum):
    """Whether an engine must be able to load the result."""

    REQUIRED = "Required"
    IGNORED = "Ignored"


class Output(ApiModel):
    """What is written beside the adapter."""

    merge: Merge = Field(
        default=Merge.NONE,
        description="Full weights, in the folder merged beside the artifact, with their measured distance from what "
        "was trained: Original merges into the base as published, Dequantized (qlora only) into the 4-bit base turned "
        "back, which is what was trained on. Never merged in 4 bits.",
    )
