"""Parity: the engine answers as the trained model did.

`parity.json` of an artifact has the expected answers of adapter and base to fixed prompts; `parity-rows.json` those to
prompts of the data set, and is not exported. The agent generates the same answers on the engine. The distance of two
answers is the greatest difference of log-probabilities, in nats, over the tokens of the expected answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field

from tunesmith.api.model import StatusModel
from tunesmith.api.parity import ParityVerdict
from tunesmith.contracts.strict_json import parse_model

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

PARITY_FILE = "parity.json"
PARITY_ROWS_FILE = "parity-rows.json"
"""Expected answers to prompts of held-out or training rows. Exports omit the file, because it contains rows."""
MAX_PARITY_BYTES = 512 * 1024
MAX_PROBES = 8
MAX_PROMPT_TOKENS = 2048
MAX_PROMPT_CHARACTERS = 8192
MAX_ANSWER_TOKENS = 32
_MAX_TOP = 20
_MAX_VALUES = 65_536
_MAX_TOKEN_ID = 2**31 - 1

DECISIVE_GAP = 4.0
"""Lowest ratio of the gap to the tolerance with which parity is decided. Below it, the answers of an adapter of which
a quarter is not applied would pass as well."""


class TokenLogProbability(StatusModel):
    """A token and the natural logarithm of its probability."""

    token_id: int = Field(ge=0, le=_MAX_TOKEN_ID)
    log_probability: float = Field(allow_inf_nan=False)


class ParityPosition(StatusModel):
    """Log-probabilities at one position of the answer, given all preceding tokens."""

    chosen: float = Field(allow_inf_nan=False, description="Log-probability of the token in the answer.")
    top: list[TokenLogProbability] = Field(
        max_length=_MAX_TOP, description="Most probable tokens, in descending order."
    )


class BaseAnswer(StatusModel):
    """Answer of the base model, decoded greedily."""

    token_ids: list[int] = Field(min_length=1)
    positions: list[ParityPosition]


class ParityProbe(StatusModel):
    """A prompt, an answer, and the log-probabilities of the answer's tokens."""

    prompt: str | None = Field(
        default=None,
        max_length=MAX_PROMPT_CHARACTERS,
        description="Message of the user; without a chat template, the text. Absent: a row's prompt.",
    )
    chat: bool = Field(
        default=False, description="True if a chat template rendered the prompt, with the same result on every day."
    )
    prompt_token_ids: list[int] = Field(min_length=1)
    answer_token_ids: list[int] = Field(min_length=1, description="Answer of the adapter, decoded greedily.")
    base: list[ParityPosition]
    adapter: list[ParityPosition]
    base_answer: BaseAnswer | None = Field(default=None, description="Absent in artifacts of earlier releases.")

    @property
    def gap(self) -> float:
        """Distance between adapter and base, in nats."""
        pairs = zip(self.adapter, self.base, strict=True)
        return max((abs(adapter.chosen - base.chosen) for adapter, base in pairs), default=0.0)


class Parity(StatusModel):
    """Content of either file."""

    model_config = ConfigDict(hide_input_in_errors=True)

    schema_version: Literal[1] = 1
    data_type: str = Field(max_length=32, description="Data type of the weights, such as bfloat16.")
    probes: list[ParityProbe]

    @property
    def gap(self) -> float:
        """Greatest distance between adapter and base over all probes, in nats."""
        return max((probe.gap for probe in self.probes), default=0.0)


def parse_parity(document: bytes, name: str) -> Parity:
    """Return the content of a parity file, which may be untrusted: the time to probe it is bounded.

    Raises:
        ValueError: it is malformed or exceeds a limit; the text names the first problem.
    """
    return parse_model(Parity, document, name, max_bytes=MAX_PARITY_BYTES, max_values=_MAX_VALUES, check=_check_limits)


def _check_limits(parity: Parity) -> None:
    if len(parity.probes) > MAX_PROBES:
        raise ValueError(f"it has {len(parity.probes)} probes, more than {MAX_PROBES}")
    for index, probe in enumerate(parity.probes):
        answers = [(probe.answer_token_ids, probe.adapter), (probe.answer_token_ids, probe.base)]
        if probe.base_answer is not None:
            answers.append((probe.base_answer.token_ids, probe.base_answer.positions))
        if len(probe.prompt_token_ids) > MAX_PROMPT_TOKENS:
            raise ValueError(f"the prompt of probe {index} has more than {MAX_PROMPT_TOKENS} tokens")
        for tokens, positions in answers:
            if len(tokens) > MAX_ANSWER_TOKENS:
                raise ValueError(f"an answer of probe {index} has more than {MAX_ANSWER_TOKENS} tokens")
            if len(tokens) != len(positions):
                raise ValueError(f"an answer of probe {index} has {len(tokens)} tokens and {len(positions)} positions")
        every = [*probe.prompt_token_ids, *(token for tokens, _ in answers for token in tokens)]
        if not all(0 <= token <= _MAX_TOKEN_ID for token in every):
            raise ValueError(f"probe {index} has a token id that is not between 0 and {_MAX_TOKEN_ID}")


@dataclass(frozen=True)
class ServedPosition:
    """Token that the engine generated at one position, and the log-probabilities of it and of the likeliest tokens."""

    token_id: int
    log_probabilities: Mapping[int, float]


def matching(expected: Sequence[int], served: Sequence[ServedPosition]) -> int:
    """Return the number of positions that can be compared: those whose preceding tokens are the expected ones."""
    pairs = enumerate(zip(expected, served, strict=False))
    different = next((index for index, (token, position) in pairs if position.token_id != token), None)
    return min(len(expected), len(served)) if different is None else different + 1


def difference(token: int, expected: ParityPosition, served: ServedPosition) -> float:
    """Return the difference of the log-probabilities of an expected token, in nats; infinite if one is not a number.

    If the token is not among the engine's likeliest tokens, this is the lowest difference that is possible.
    """
    known = served.log_probabilities
    if not known or not all(map(math.isfinite, known.values())):
        return math.inf
    if token in known:
        return abs(known[token] - expected.chosen)
    # The engine's value of the expected token is at most its lowest known one, and the expected value of the engine's
    # token at most the lowest expected one.
    likeliest = {entry.token_id: entry.log_probability for entry in expected.top}
    lowest = min(likeliest.values(), default=expected.chosen)
    own = known.get(served.token_id, max(known.values()))
    return max(0.0, expected.chosen - min(known.values()), own - likeliest.get(served.token_id, lowest))


_UNITS = {"float32": 0, "float16": 1, "bfloat16": 2}
"""Data types by the size of their rounding errors; other types, of quantised weights, are coarser."""
TOLERANCES = (0.01, 0.1, 0.5, 1.5)
"""Tolerated distance in nats, by the coarser of the types of training and serving; see docs/how-to/parity.md."""


def tolerance(recorded: str, served: str) -> float:
    """Return the distance in nats up to which answers count as equal.

    Args:
        recorded: data type of the weights when the expected answers were recorded.
        served: data type of the engine's weights.
    """
    return TOLERANCES[max(_UNITS.get(name, len(TOLERANCES) - 1) for name in (recorded, served))]


@dataclass
class Measured:
    """Distances of the engine's answers from the expected ones, in nats; None: not measured.

    Attributes:
        adapter: distance of the adapter's answers.
        adapter_from_base: distance of the adapter's answers from those that the base would give.
        base: distance of the base model's answers.
        template: True if the engine's chat template renders the prompts as in training.
        refusal: reason why the engine did not answer; empty: it did.
    """

    adapter: float | None = None
    adapter_from_base: float | None = None
    base: float | None = None
    template: bool | None = None
    refusal: str = ""


@dataclass(frozen=True)
class Judgement:
    """Verdict with a sentence for people."""

    verdict: ParityVerdict
    message: str


def judge(measured: Measured, gap: float, limit: float) -> Judgement:
    """Return the verdict on an adapter.

    Args:
        measured: distances on the engine.
        gap: distance between adapter and base when the adapter was trained.
        limit: tolerance.
    """
    if measured.refusal:
        return Judgement(ParityVerdict.FAILED, f"the engine refuses the prompts of {PARITY_FILE}: {measured.refusal}")
    if measured.template is False:
        return Judgement(
            ParityVerdict.FAILED,
            "the engine's chat template renders a prompt differently than in training: serve the template that the "
            "adapter was trained with (engine.args --chat-template), or train with the pool's",
        )
    if measured.adapter is None:
        return Judgement(ParityVerdict.UNFINISHED, "the engine has not answered the prompts yet")
    own = f"its answers differ by {nats(measured.adapter)} of {nats(gap)}, and {nats(limit)} is tolerated"
    if measured.base is not None and measured.base > limit:
        return Judgement(
            ParityVerdict.FAILED,
            f"the base model's answers differ by {nats(measured.base)} from those in training, and {nats(limit)} is "
            "tolerated: the pool has another base model, data type or engine version, or the adapter changes the base",
        )
    if measured.adapter > limit:
        if measured.adapter_from_base is not None and measured.adapter_from_base <= limit < gap:
            own = f"the engine answers as the base model does: it does not apply the adapter; {own}"
        return Judgement(ParityVerdict.FAILED, own)
    if gap < DECISIVE_GAP * limit:
        return Judgement(
            ParityVerdict.UNDECIDED,
            f"adapter and base differ too little to tell them apart: by {nats(gap)}, and at least "
            f"{nats(DECISIVE_GAP * limit)} is needed with the data types of this pool",
        )
    return Judgement(ParityVerdict.PASSED, f"its answers differ by {nats(measured.adapter)} of {nats(gap)}")


def nats(value: float) -> str:
    """Return a distance for people, with two significant digits."""
    return f"{value:.1g}" if value and value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.1f}"  # noqa: PLR2004


def gap_of(parities: Iterable[Parity]) -> float:
    """Return the greatest distance between adapter and base, in nats."""
    return max((parity.gap for parity in parities), default=0.0)


def served_positions(logprobs: Mapping[str, Any]) -> list[ServedPosition]:
    """Return the positions of a completion of vLLM, with `return_tokens_as_token_ids`.

    Args:
        logprobs: `choices[0].logprobs`, with `tokens` and `top_logprobs`, whose tokens are written as `token_id:N`.

    Raises:
        ValueError: it is malformed.
    """
    try:
        return [
            ServedPosition(
                _token(token),
                {_token(text): float(value) for text, value in top.items()} | {_token(token): float(own)},
            )
            for token, own, top in zip(
                logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
            )
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the engine's answer is malformed: {error!r}") from None


def _token(text: str) -> int:
    return int(text.removeprefix("token_id:"))
