"""Prefix tuning."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunesmith.api.methods.declaration import MethodTraits, PeftName
from tunesmith.api.methods.fields import VirtualTokensFields


class PrefixTuningFields(VirtualTokensFields):
    """Trained keys and values that precede those of every layer (prefix tuning, arXiv:2101.00190)."""

    declared = MethodTraits(
        "PREFIX_TUNING",
        learning_rate=5e-3,
        not_merged="it adds keys and values",
        identity_at_start=False,
        recomputable=False,
    )

    projection: Annotated[bool, PeftName("prefix_projection")] = Field(
        default=False, description="Compute the vectors with a small network, which is not part of the artifact."
    )
    encoder_hidden_size: Annotated[int | None, PeftName("encoder_hidden_size")] = Field(
        default=None, ge=1, le=65536, description="Hidden size of that network. Absent: the model's hidden size."
    )
