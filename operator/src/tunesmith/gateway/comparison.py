"""Comparison of a shadow's answers with those that clients get. Pure.

An answer counts as a refusal if the engine reports one (`finish_reason` is `content_filter`, or a message has a
`refusal`), or if one of its choices is empty: it has neither text, nor reasoning, nor a tool call.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson

from tunesmith.contracts.traffic import MAX_COMPARISONS, Comparison

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_DATA = b"data: "
_TEXTS = ("content", "text", "reasoning", "reasoning_content", "tool_calls", "function_call")


@dataclass(frozen=True, slots=True)
class AnswerFacts:
    """Properties of an answer that are compared.

    Attributes:
        tokens: number of generated tokens.
        is_refusal: True if it counts as a refusal.
        logprob: mean log-probability of its tokens, in nats; None if the request did not ask for log-probabilities.
    """

    tokens: int
    is_refusal: bool
    logprob: float | None


@dataclass(slots=True)
class _Choice:
    has_output: bool = False
    is_refused: bool = False

    def read(self, choice: dict[str, Any]) -> None:
        part = choice.get("message") or choice.get("delta") or choice
        self.has_output = self.has_output or any(_says(part.get(name)) for name in _TEXTS)
        self.is_refused = (
            self.is_refused or choice.get("finish_reason") == "content_filter" or bool(part.get("refusal"))
        )


@dataclass(slots=True)
class AnswerReader:
    """Reader of one answer, complete or in events."""

    _choices: dict[int, _Choice] = field(default_factory=dict)
    _tokens: int | None = None
    _logprob: float = 0.0
    _logprobs: int = 0
    _failed: bool = False

    def read(self, document: bytes) -> None:
        """Read the whole answer, or the data of one event."""
        try:
            answer = orjson.loads(document)
            self._failed = self._failed or bool(answer.get("error"))
            for choice in answer.get("choices") or ():
                self._choices.setdefault(choice["index"], _Choice()).read(choice)
                for logprob in _logprobs(choice.get("logprobs")):
                    self._logprob += logprob
                    self._logprobs += 1
            usage = answer.get("usage")
            if usage:
                self._tokens = int(usage["completion_tokens"])
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError):
            self._failed = True

    def facts(self) -> AnswerFacts | None:
        """Return the properties of the answer; None if it reports an error or cannot be read."""
        if self._failed or self._tokens is None or not self._choices:
            return None
        refused = any(choice.is_refused or not choice.has_output for choice in self._choices.values())
        return AnswerFacts(self._tokens, refused, self._logprob / self._logprobs if self._logprobs else None)


def documents(answer: bytes, *, stream: bool) -> Iterator[bytes]:
    """Yield the JSON documents of an answer: those of a stream's events, or the answer itself."""
    if not stream:
        yield answer
        return
    for line in answer.splitlines():
        if line.startswith(_DATA) and (data := line[len(_DATA) :].strip()) != b"[DONE]":
            yield data


class Comparisons:
    """Sums over all compared answers since the start of this process, by engine name of the shadow."""

    def __init__(self) -> None:
        self._start = secrets.token_hex(8)
        self._sums: dict[str, dict[str, Any]] = {}
        self._changed: dict[str, int] = {}
        self._changes = 0

    def add(self, shadow: str, served: AnswerFacts, mirrored: AnswerFacts) -> None:
        """Count a pair of answers to one request."""
        figures: dict[str, Any] = {
            "answers": 1,
            "served_tokens": served.tokens,
            "shadow_tokens": mirrored.tokens,
            "served_refusals": served.is_refusal,
            "shadow_refusals": mirrored.is_refusal,
        }
        if served.logprob is not None and mirrored.logprob is not None:
            figures |= {"logprob_answers": 1, "served_logprob": served.logprob, "shadow_logprob": mirrored.logprob}
        self._add(shadow, figures)

    def add_failure(self, shadow: str) -> None:
        """Count a mirrored request to which the shadow answered with an error."""
        self._add(shadow, {"failures": 1})

    def add_dropped(self, shadow: str) -> None:
        """Count a request that was not mirrored, or whose mirrored one was cancelled."""
        self._add(shadow, {"dropped": 1})

    def since(self, seen: int) -> tuple[int, dict[str, Comparison]]:
        """Return the comparisons that changed after a change, and the number of the latest change.

        Args:
            seen: number of the latest change that the reader has; 0: it has none.
        """
        changed = [name for name, at in self._changed.items() if at > seen]
        return self._changes, {name: self._of(name) for name in changed}

    def keep(self, exists: Callable[[str], bool]) -> None:
        """Forget shadows that do not exist any more."""
        self._forget([name for name in self._sums if not exists(name)])

    def _of(self, name: str) -> Comparison:
        return Comparison(start=self._start, **self._sums[name])

    def _add(self, name: str, figures: dict[str, Any]) -> None:
        if name not in self._sums and len(self._sums) >= MAX_COMPARISONS:
            self._forget(sorted(self._changed, key=self._changed.__getitem__)[:1])
        sums = self._sums.setdefault(name, {})
        for figure, value in figures.items():
            sums[figure] = sums.get(figure, 0) + value
        self._changes += 1
        self._changed[name] = self._changes

    def _forget(self, names: Iterable[str]) -> None:
        for name in names:
            del self._sums[name], self._changed[name]


def _says(value: object) -> bool:
    return bool(value.strip()) if isinstance(value, str) else bool(value)


def _logprobs(logprobs: Any) -> Iterator[float]:  # noqa: ANN401 - JSON
    """Yield the log-probabilities of a choice's tokens, in the schema of chats or that of completions."""
    if not logprobs:
        return
    values = logprobs.get("token_logprobs")
    if values is None:
        values = [entry["logprob"] for entry in logprobs.get("content") or ()]
    for value in values:
        # The first token of an echoed prompt has none, and an impossible token has a huge negative one.
        if value is not None:
            yield min(0.0, max(-1000.0, float(value)))
