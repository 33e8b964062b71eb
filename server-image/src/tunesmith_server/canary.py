"""Canary: a fixed prompt to the base model, and a comparison of answers that distinguishes changes from noise."""

from __future__ import annotations

import json
import secrets
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

if TYPE_CHECKING:
    from collections.abc import Mapping

PROMPT = (
    "The seven days of the week are Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday. The twelve "
    "months of the year are January, February, March, April, May, June, July, August, September, October, November "
    "and December. The first five letters of the alphabet are A, B, C,"
)
"""Prompt that is long enough to fill more than one block of the KV cache."""
TOKENS = 12
MAX_PROMPT_TOKENS = 512
"""Upper bound of the prompt's tokens with any tokenizer."""
ALTERNATIVES = 5
TOLERANCE = 0.5
"""Nats by which a log-probability may differ. Other batches and kernels change it by less than 0.1 in 16-bit precision;
damaged activations change it by more than 1, or to NaN."""
FIRST_PRIORITY = -(2**31)
"""Priority ahead of every client's request, which has 0: a busy engine answers the canary too."""


class CanaryAnswer(BaseModel):
    """Greedy answer: each token with its log-probability, and the likeliest tokens at its position."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    tokens: tuple[str, ...]
    log_probabilities: tuple[float, ...]
    alternatives: tuple[dict[str, float], ...]


def request(model: str, length: int, **changes: object) -> dict[str, object]:
    """Return the body of a canary; its salt prevents an answer from the prefix cache.

    Args:
        model: name of the base model or of an adapter.
        length: the engine's longest request, in tokens.
        changes: parameters to override.
    """
    tokens = min(TOKENS, max(1, length // 4))
    return {
        "model": model,
        "prompt": PROMPT,
        "max_tokens": tokens,
        "truncate_prompt_tokens": min(MAX_PROMPT_TOKENS, length - tokens),
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": ALTERNATIVES,
        "cache_salt": secrets.token_hex(16),
        "priority": FIRST_PRIORITY,
        **changes,
    }


def warm_up(model: str, length: int, *, can_constrain: bool) -> list[dict[str, object]]:
    """Return requests, to be sent concurrently, that trigger the kernels and automata that an engine builds lazily.

    Args:
        model: name of the base model.
        length: the engine's longest request, in tokens.
        can_constrain: True if the engine can constrain answers to a grammar.
    """
    sampled: dict[str, object] = {"temperature": 1, "top_p": 0.9, "top_k": 20, "seed": 1, "max_tokens": 4}
    return [
        *(request(model, length, **sampled) for _ in range(3)),
        *[request(model, length, max_tokens=4, response_format={"type": "json_object"})] * can_constrain,
        request(model, length, max_tokens=2, use_beam_search=True, n=2, logprobs=None),
        request(
            model,
            length,
            max_tokens=4,
            presence_penalty=0.5,
            frequency_penalty=0.5,
            repetition_penalty=1.1,
            min_p=0.1,
            min_tokens=2,
            logit_bias={"0": -1},
            temperature=1,
        ),
    ]


def read(text: str) -> CanaryAnswer | None:
    """Return the answer in vLLM's reply; None if the reply is not an answer, for example because of NaN values."""
    try:
        found: Mapping[str, Any] = json.loads(text)["choices"][0]["logprobs"]
        return CanaryAnswer(
            tokens=found["tokens"], log_probabilities=found["token_logprobs"], alternatives=found["top_logprobs"]
        )
    except (ValueError, ValidationError, KeyError, IndexError, TypeError):
        return None


def agrees(reference: CanaryAnswer | None, answer: CanaryAnswer | None) -> bool:
    """Return True if an answer equals the reference, up to the noise of another batch.

    If two tokens are about equally likely, noise may select the other one, and the tokens after it are not comparable.
    """
    if reference is None or answer is None or len(answer.tokens) < len(reference.tokens):
        return False
    pairs = zip(reference.tokens, reference.log_probabilities, strict=True)
    for position, (token, expected) in enumerate(pairs):
        if answer.tokens[position] != token:
            rival = answer.alternatives[position].get(token)
            return rival is not None and answer.log_probabilities[position] - rival <= TOLERANCE
        if abs(answer.log_probabilities[position] - expected) > TOLERANCE:
            return False
    return True
