"""The victim: another tenant whose requests are measured while the attacks run."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from e2e.demo import QUESTIONS
from e2e.installation import InstallationError, until

if TYPE_CHECKING:
    from collections.abc import Iterable

PERIOD_SECONDS = 0.5
"""Seconds between two requests, unless the machine is slower."""
QUIET_REQUESTS = 24
"""Number of undisturbed requests with which the figures of an attack are compared."""
QUIET_BETWEEN = 6
"""Number of these that must be newer than the last attack."""
QUIET_SECONDS = 90


@dataclass
class Request:
    """Request of the victim. `seconds` is None while it runs; `status` 0: the connection broke."""

    model: str
    question: str
    began: float
    seconds: float | None = None
    status: int | None = None
    answer: str = ""


@dataclass(frozen=True)
class Figures:
    """Outcome of the requests of a period.

    Attributes:
        total: how many started in it.
        right: got the answer that the model gives undisturbed.
        wrong: got another one.
        refused: got an HTTP error, or none.
        p95: 95th percentile of all durations, in seconds.
        examples: of wrong answers and errors.
    """

    total: int
    right: int
    wrong: int
    refused: int
    p95: float
    examples: list[str] = field(default_factory=list)


def percentile(ordered: list[float], part: float) -> float:
    """Return a percentile of ordered values, interpolated linearly; 0 without values."""
    if not ordered:
        return 0.0
    place = part * (len(ordered) - 1)
    low, rest = int(place), place % 1
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + rest * (ordered[high] - ordered[low])


class Victim:
    """Stream of requests, whose lines are read: `with Victim(...) as victim`."""

    def __init__(self, endpoint: str, key: str, models: list[str]) -> None:
        self._command = [
            sys.executable,
            str(Path(__file__).with_name("victim_stream.py")),
            endpoint,
            str(PERIOD_SECONDS),
            str(QUESTIONS),
            *models,
        ]
        self._environment = os.environ | {"TUNESMITH_API_KEY": key}
        self._requests: dict[int, Request] = {}
        self._lock = threading.Lock()
        self._answers: dict[tuple[str, str], str] = {}
        self._quiet_from = 0.0
        self._quiet: list[Request] = []
        self.models = models
        self.period = PERIOD_SECONDS
        """Return the seconds between the starts of two requests."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True, env=self._environment)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._reader.join()
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for text in self._process.stdout:
            line = json.loads(text)
            if "period" in line:
                self.period = line["period"]
                continue
            number = line.pop("number")
            with self._lock:
                self._requests[number] = Request(**line)

    def _since(self, begin: float, end: float = math.inf) -> list[Request]:
        with self._lock:
            return [request for request in self._requests.values() if begin <= request.began < end]

    def learn(self) -> None:
        """Record each model's answers as the correct ones.

        Raises:
            InstallationError: the stream is not answered, or the same question gets two answers.
        """
        questions = len(QUESTIONS.read_text().splitlines())
        wanted = 2 * questions * len(self.models)

        finished: list[Request] = []

        def enough() -> bool:
            finished[:] = [request for request in self._since(0) if request.seconds is not None]
            refused = [request.answer for request in finished if request.status != 200]
            if len(refused) >= wanted:
                raise InstallationError(f"the victim's first requests are refused: {refused[-1]}")
            return len(finished) - len(refused) >= wanted

        until("the victim's requests are answered", enough, 300)
        for request in [request for request in finished if request.status == 200]:
            key = (request.model, request.question)
            if self._answers.setdefault(key, request.answer) != request.answer or not request.answer.strip():
                raise InstallationError(
                    f"{request.model} answers {request.question!r} with {self._answers[key]!r} and {request.answer!r}: "
                    "the victim's answers must be the same each time"
                )
        self._quiet_from = time.monotonic()

    def disturbed(self) -> None:
        """Exclude all requests until now from the undisturbed ones."""
        self._quiet_from = time.monotonic()

    def well(self) -> bool:
        """Return True if requests are answered correctly, which takes the stream some seconds to show."""
        begin = time.monotonic()
        try:
            return bool(until("the victim is answered", lambda: self.recovered(begin, 2), QUIET_SECONDS))
        except InstallationError:
            return False

    def undisturbed(self) -> Figures:
        """Return figures of the latest undisturbed requests, once there are enough since the last attack.

        Raises:
            InstallationError: the victim is not answered right although nothing attacks it.
        """
        needed = QUIET_BETWEEN if self._quiet else QUIET_REQUESTS

        def quiet() -> list[Request]:
            finished = [request for request in self._since(self._quiet_from) if request.seconds is not None]
            enough = len(finished) >= needed and all(self._is_correct(request) for request in finished[-needed:])
            return finished[-needed:] if enough else []

        self._quiet += until("the victim is answered right before the attack", quiet, QUIET_SECONDS)
        self._quiet = self._quiet[-QUIET_REQUESTS:]
        return self._figures(self._quiet)

    def between(self, begin: float, end: float) -> Figures:
        """Return figures of the requests that started in the period, once all of them have finished."""

        def finished() -> bool:
            return all(request.seconds is not None for request in self._since(begin, end))

        until("the victim's requests finish", finished, 120)
        return self._figures(self._since(begin, end))

    def recovered(self, begin: float, count: int = QUIET_BETWEEN) -> bool:
        """Return True once the last `count` finished requests that started after `begin` were answered correctly."""
        finished = [request for request in self._since(begin) if request.seconds is not None]
        return len(finished) >= count and all(self._is_correct(request) for request in finished[-count:])

    def outage(self, begin: float) -> float:
        """Return the seconds between the first and last start of a request since `begin` without a correct answer."""
        bad = [r.began for r in self._since(begin) if r.seconds is not None and not self._is_correct(r)]
        return max(bad) - min(bad) + self.period if bad else 0.0

    def _is_correct(self, request: Request) -> bool:
        return request.status == 200 and request.answer == self._answers[request.model, request.question]

    def _figures(self, requests: Iterable[Request]) -> Figures:
        requests = list(requests)
        bad = [request for request in requests if not self._is_correct(request)]
        durations = sorted(request.seconds or 0.0 for request in requests)
        wrong = sum(request.status == 200 for request in bad)
        return Figures(
            total=len(requests),
            right=len(requests) - len(bad),
            wrong=wrong,
            refused=len(bad) - wrong,
            p95=percentile(durations, 0.95),
            examples=[f"{r.model}: {r.status} {r.answer!r}" for r in bad[:3]],
        )
