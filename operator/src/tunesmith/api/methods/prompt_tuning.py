"""Prompt tuning."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunesmith.api.methods.declaration import MethodTraits, PeftName
from tunesmith.api.methods.fields import VirtualTokensFields


class PromptTuningFields(VirtualTokensFields):
    """Trained embeddings that precede the prompt (prompt tuning, arXiv:2104.08691)."""

    declared = MethodTraits(
        "PROMPT_TUNING",
        learning_rate=1e-3,
        not_merged="it adds vectors to the prompt",
        identity_at_start=False,
        # Initialised with the embeddings of the given text, or of random tokens without a text.
        decided_by_training=frozenset({"prompt_tuning_init"}),
    )

    initial_text: Annotated[str | None, PeftName("prompt_tuning_init_text")] = Field(
        default=None,
        min_length=1,
        max_length=4096,
        description="Text whose embeddings they begin as. Absent: those of tokens at random.",
    )
