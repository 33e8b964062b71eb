"""P-tuning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunesmith.api.methods.declaration import MethodTraits, PeftName
from tunesmith.api.methods.fields import VirtualTokensFields


class PTuningFields(VirtualTokensFields):
    """Prompt embeddings produced by a small network (P-tuning, arXiv:2103.10385)."""

    declared = MethodTraits(
        "P_TUNING", learning_rate=1e-4, not_merged="it adds vectors to the prompt", identity_at_start=False
    )

    encoder: Annotated[
        Literal["Mlp", "Lstm"], PeftName("encoder_reparameterization_type", {"Mlp": "MLP", "Lstm": "LSTM"})
    ] = Field(default="Mlp", description="Type of the prompt encoder.")
    encoder_hidden_size: Annotated[int | None, PeftName("encoder_hidden_size")] = Field(
        default=None, ge=1, le=65536, description="Hidden size of the prompt encoder. Absent: the model's hidden size."
    )
    encoder_layers: Annotated[int, PeftName("encoder_num_layers")] = Field(
        default=2, ge=1, le=16, description="Number of layers of an Lstm; an Mlp has two."
    )
    encoder_dropout: Annotated[float, PeftName("encoder_dropout")] = Field(
        default=0.0, ge=0.0, le=0.9, description="Dropout in an Lstm."
    )
