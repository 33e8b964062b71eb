"""What base and adapter say to fixed prompts, at the precision that they are served with."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig

from tunesmith.contracts.parity import Parity, ParityPosition, ParityProbe, TokenLogProbability
from tunesmith_trainer.logits import last_logits

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PretrainedConfig, PreTrainedTokenizerFast

PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Count from one to five, in words.",
)
_ANSWER_TOKENS = 16
_TOP = 5
_DECIMALS = 5


def prompt_tokens(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """The fixed prompts as token ids, in the chat template where there is one."""
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


def serving_type(config: PretrainedConfig) -> torch.dtype:
    """The type that an engine serves the base with unless told otherwise: that of its configuration."""
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def record(
    base: Path,
    artifact: Path,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    ends: Sequence[int],
    pad: int,
) -> tuple[Parity, list[torch.Tensor]]:
    """Loads base and saved adapter anew, as an engine does, and asks both.

    Args:
        base: folder of the base model with its weights.
        artifact: folder of the saved adapter.
        config: the base's configuration.
        tokenizer: the base's tokenizer.
        ends: tokens that end an answer.
        pad: token for padding.

    Returns:
        What both say, and the adapter's logits after each prompt.
    """
    dtype = serving_type(config)
    loaded = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=dtype,
        # On a GPU that is too small, layers stay in main memory or on disk.
        device_map="auto" if torch.cuda.is_available() else {"": "cpu"},
        offload_folder=str(artifact.parent / "offload"),
        local_files_only=True,
        use_safetensors=True,
    )
    model = PeftModel.from_pretrained(loaded, str(artifact)).eval()
    greedy = GenerationConfig(do_sample=False, max_new_tokens=_ANSWER_TOKENS, eos_token_id=list(ends), pad_token_id=pad)
    probes = []
    for prompt, ids in zip(PROMPTS, prompt_tokens(tokenizer), strict=True):
        given = torch.tensor([ids], device=model.device)
        with torch.inference_mode():
            whole: Any = model.generate(
                input_ids=given, attention_mask=torch.ones_like(given), generation_config=greedy
            )
        answer = [int(token) for token in whole[0, len(ids) :]]
        probes.append(
            ParityProbe(
                prompt=prompt,
                prompt_token_ids=ids,
                answer_token_ids=answer,
                base=_positions(model, ids, answer, adapter=False),
                adapter=_positions(model, ids, answer, adapter=True),
            )
        )
    logits = last_logits(model, [probe.prompt_token_ids for probe in probes])
    return Parity(data_type=str(dtype).removeprefix("torch."), probes=probes), logits


def _positions(model: PeftModel, prompt: list[int], answer: list[int], *, adapter: bool) -> list[ParityPosition]:
    with torch.inference_mode(), nullcontext() if adapter else model.disable_adapter():
        logits = model(input_ids=torch.tensor([prompt + answer], device=model.device)).logits
    # A method that puts tokens in front of the prompt has more logits.
    scores = torch.log_softmax(logits[0, -len(answer) - 1 : -1].float(), dim=-1).cpu()
    positions = []
    for token, row in zip(answer, scores, strict=True):
        values, places = row.topk(_TOP)
        positions.append(
            ParityPosition(
                chosen=round(float(row[token]), _DECIMALS),
                top=[
                    TokenLogProbability(token_id=int(place), log_probability=round(float(value), _DECIMALS))
                    for value, place in zip(values, places, strict=True)
                ],
            )
        )
    return positions
