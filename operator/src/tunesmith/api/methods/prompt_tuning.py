"""Prompt tuning."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

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
    peft_constants: ClassVar[dict[str, Any]] = {"prompt_tuning_init": "SAMPLE_VOCAB"}

    initial_text: Annotated[str | None, PeftName("prompt_tuning_init_text")] = Field(
        default=None,
        min_length=1,
        max_length=4096,
        description="Text whose embeddings are the initial values. Absent: those of random tokens.",
    )

    def peft_values_of_run(self, total_steps: int, base_model: str) -> dict[str, Any]:  # noqa: ARG002 - as in the base class
        """Return the initialisation with the text, whose tokens PEFT looks up in the base model's tokenizer."""
        if self.initial_text is None:
            return {}
        return {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": base_model}
