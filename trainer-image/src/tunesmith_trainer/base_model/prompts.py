"""Fixed prompts for comparing models: trained and saved, merged, served."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Count from one to five, in words.",
)


def prompt_tokens(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Return the fixed prompts as token ids, rendered with the chat template if there is one."""
    if not tokenizer.chat_template:
        return [list(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    texts = [
        str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        )
        for prompt in PROMPTS
    ]
    return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
