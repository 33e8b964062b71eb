"""Load of the benchmark: streams for adapters by a distribution, each answer compared with the adapter's marker."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import aiohttp

ZIPF = 1.0
"""Exponent: the k-th most popular adapter gets requests in proportion to 1/k."""


@dataclass(frozen=True)
class Endpoint:
    """Server under load, or several.

    Attributes:
        url: URL of the server for an adapter, by its number; -1: the base model.
        key: API key; empty: none.
        model: name of an adapter in a request, by its number.
    """

    url: Callable[[int], str]
    key: str
    model: Callable[[int], str]


@dataclass
class Outcome:
    """Result of a load: counts, and seconds to the first token."""

    seconds: float = 0.0
    requests: int = 0
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """Return the figures for the report."""
        ordered = sorted(self.first)

        def quantile(share: float) -> float:
            return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")

        return {
            "requests": self.requests,
            "wrong": len(self.wrong),
            "failed": len(self.failed),
            "examples": [*self.wrong[:3], *self.failed[:3]],
            "tokens_per_second": self.tokens / self.seconds,
            "ttft_p50": quantile(0.5),
            "ttft_p95": quantile(0.95),
        }


def chooser(distribution: str, count: int, seed: int) -> Callable[[], int]:
    """Return a function that returns adapters' numbers, uniformly or by Zipf's law."""
    chance = random.Random(seed)  # noqa: S311 - a load
    weights = [1.0 if distribution == "uniform" else 1.0 / (rank + 1) ** ZIPF for rank in range(count)]
    cumulative = list(accumulate(weights))
    return lambda: chance.choices(range(count), cum_weights=cumulative)[0]


async def ask(
    http: aiohttp.ClientSession,
    endpoint: Endpoint,
    number: int,
    prompt: Sequence[int],
    marker: Sequence[int],
    tokens: int,
    outcome: Outcome,
) -> None:
    """Send one request as a stream, and check and count its answer."""
    body = {
        "model": endpoint.model(number),
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
    started, got, first = time.monotonic(), [], None
    async with http.post(f"{endpoint.url(number)}/v1/completions", json=body, headers=headers) as response:
        if response.status != 200:  # noqa: PLR2004 - HTTP
            outcome.failed.append(f"{body['model']}: {response.status} {(await response.text())[:200]}")
            return
        async for line in response.content:
            if line.startswith(b"data: {"):
                first = first or time.monotonic()
                event = json.loads(line[6:])
                if not event.get("choices"):
                    outcome.failed.append(f"{body['model']}: {line[:200]!r}")
                    return
                got += event["choices"][0].get("token_ids") or []
    outcome.requests += 1
    outcome.tokens += len(got)
    outcome.first.append((first or time.monotonic()) - started)
    if got[: len(marker)] != list(marker)[: len(got)] or len(got) != tokens:
        outcome.wrong.append(f"{body['model']}: {got} instead of {list(marker)}")


async def run(
    http: aiohttp.ClientSession,
    endpoint: Endpoint,
    choose: Callable[[], int],
    markers: dict[int, Sequence[int]],
    prompt: Sequence[int],
    *,
    tokens: int,
    clients: int,
    seconds: float,
) -> Outcome:
    """Let clients send one request after the other for some time."""
    outcome = Outcome()
    started = time.monotonic()

    async def client() -> None:
        while time.monotonic() - started < seconds:
            number = choose()
            await ask(http, endpoint, number, prompt, markers[number], tokens, outcome)

    await asyncio.gather(*(client() for _ in range(clients)))
    outcome.seconds = time.monotonic() - started
    return outcome


async def each(
    http: aiohttp.ClientSession,
    endpoint: Endpoint,
    numbers: Sequence[int],
    markers: dict[int, Sequence[int]],
    prompt: Sequence[int],
    *,
    clients: int,
) -> Outcome:
    """Ask each adapter of a list once, and the base model beside them."""
    outcome = Outcome()
    remaining = list(reversed(numbers))
    started = time.monotonic()

    async def client() -> None:
        while remaining:
            number = remaining.pop()
            await ask(http, endpoint, number, prompt, markers[number], len(markers[number]), outcome)

    await asyncio.gather(*(client() for _ in range(clients)))
    outcome.seconds = time.monotonic() - started
    return outcome
