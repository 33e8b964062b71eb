"""`parity.json` of an artifact: what base and adapter must say, for the check of the engine that serves them."""

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
    """What is said at one token of the answer, with all before it given."""

    chosen: float = Field(description="Log-probability of the answer's token.")
    top: list[TokenLogProbability] = Field(description="The most probable tokens, most probable first.")


class ParityProbe(StatusModel):
    """One prompt, an answer, and the log-probabilities of the answer's tokens."""

    prompt: str = Field(description="The user's message; without a chat template, the text itself.")
    prompt_token_ids: list[int] = Field(min_length=1)
    answer_token_ids: list[int] = Field(min_length=1, description="The adapter's answer, decoded greedily.")
    base: list[ParityPosition]
    adapter: list[ParityPosition]


class Parity(StatusModel):
    """The file. To check an engine, send prompt and answer as token ids and compare the answer's log-probabilities."""

    schema_version: Literal[1] = 1
    data_type: str = Field(description="Type of the weights that it was computed with, such as bfloat16.")
    probes: list[ParityProbe]
