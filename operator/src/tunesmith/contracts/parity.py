"""`parity.json` of an artifact: expected log-probabilities of base and adapter, to check a serving engine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunesmith.api.model import StatusModel

PARITY_FILE = "parity.json"


class TokenLogProbability(StatusModel):
    """A token and the natural logarithm of its probability."""

    token_id: int = Field(ge=0)
    log_probability: float


class ParityPosition(StatusModel):
    """Log-probabilities at one position of the answer, given all preceding tokens."""

    chosen: float = Field(description="Log-probability of the token in the answer.")
    top: list[TokenLogProbability] = Field(description="Most probable tokens, in descending order.")


class ParityProbe(StatusModel):
    """A prompt, an answer, and the log-probabilities of the answer's tokens."""

    prompt: str = Field(description="Message of the user; without a chat template, the text.")
    prompt_token_ids: list[int] = Field(min_length=1)
    answer_token_ids: list[int] = Field(min_length=1, description="Answer of the adapter, decoded greedily.")
    base: list[ParityPosition]
    adapter: list[ParityPosition]


class Parity(StatusModel):
    """Content of the file. To check an engine, send prompt and answer as token ids and compare log-probabilities."""

    schema_version: Literal[1] = 1
    data_type: str = Field(description="Data type of the weights, such as bfloat16.")
    probes: list[ParityProbe]
