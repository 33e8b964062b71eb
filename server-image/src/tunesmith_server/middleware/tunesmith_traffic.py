"""Counts and latencies of each model's requests, which the agent reports to the operator.

It runs inside vLLM's interpreter, so it uses the standard library only. The bounds of the buckets and the form of the
counts are those of `tunesmith.contracts.traffic`.
"""

from __future__ import annotations

import secrets
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any

SHADOW_HEADER = b"x-tunesmith-shadow"
BOUNDS_SECONDS = tuple(0.0005 * 1.25**index for index in range(64))
MAX_MODELS = 4096
"""Highest number of models whose traffic is kept."""
_OK = range(200, 300)
_FAILED = range(500, 600)


@dataclass(slots=True)
class Answer:
    """Course of one answer. Times are in seconds of one monotonic clock.

    Attributes:
        begun: time at which the engine got the request.
        status: HTTP status; 0 until the engine has answered.
        stream: True if the answer is a stream.
        first: time of the stream's first bytes; None before.
        failed: True if the stream reports an error.
        complete: True if the engine finished the answer.
        tokens: tokens of the longest of its choices.
    """

    begun: float
    status: int = 0
    stream: bool = False
    first: float | None = None
    failed: bool = False
    complete: bool = False
    tokens: int = 0


@dataclass(slots=True)
class _Counts:
    requests: int = 0
    errors: int = 0
    first_token: dict[int, int] = field(default_factory=dict)
    per_output_token: dict[int, int] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "errors": self.errors,
            "firstToken": self.first_token,
            "perOutputToken": self.per_output_token,
        }


@dataclass(slots=True)
class _Model:
    served: _Counts = field(default_factory=_Counts)
    shadow: _Counts = field(default_factory=_Counts)
    changed: int = 0


class Traffic:
    """Counts by model since the start of this process.

    Args:
        start: identity of this process.
    """

    def __init__(self, start: str) -> None:
        self._start = start
        self._models: dict[str, _Model] = {}
        # Numbers of changes begin at random, so that a reader of another process gets everything.
        self._first = self._changes = secrets.randbelow(2**40)

    def record(self, model: str, answer: Answer, now: float, *, shadow: bool, left: bool) -> None:
        """Count an answer that has ended.

        Args:
            model: a name that the engine knows.
            answer: its course.
            now: time of its end.
            shadow: True for a mirrored request.
            left: True if the client closed its connection; nothing that follows is an error then.
        """
        failed = answer.status in _FAILED or answer.failed or not (answer.complete or left)
        if not failed and answer.status not in _OK:
            return
        counts = self._of(model, shadow=shadow)
        if counts is None:
            return
        counts.requests += 1
        counts.errors += failed
        if failed or not answer.stream or answer.first is None:
            return
        _observe(counts.first_token, answer.first - answer.begun)
        if answer.complete and answer.tokens > 1:
            _observe(counts.per_output_token, (now - answer.first) / (answer.tokens - 1))

    def state(self, seen: int | None) -> dict[str, Any]:
        """Return the counts of the models that have changed.

        Args:
            seen: number of the latest change that the reader has; None: it has none.
        """
        if seen is None or not self._first <= seen <= self._changes:
            seen = -1
        models = {
            name: {"start": self._start, "served": model.served.document(), "shadow": model.shadow.document()}
            for name, model in self._models.items()
            if model.changed > seen
        }
        return {"changes": self._changes, "models": models}

    def forget_others(self, names: set[str]) -> None:
        """Forget all models but these."""
        self._models = {name: model for name, model in self._models.items() if name in names}

    @property
    def is_full(self) -> bool:
        """True if no further model is counted until some are forgotten."""
        return len(self._models) >= MAX_MODELS

    def _of(self, name: str, *, shadow: bool) -> _Counts | None:
        model = self._models.get(name)
        if model is None:
            if self.is_full:
                return None
            model = self._models[name] = _Model()
        self._changes += 1
        model.changed = self._changes
        return model.shadow if shadow else model.served


def _observe(buckets: dict[int, int], seconds: float) -> None:
    number = bisect_left(BOUNDS_SECONDS, seconds)
    buckets[number] = buckets.get(number, 0) + 1
