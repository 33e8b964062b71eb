#!/usr/bin/env python3
"""A tenant's steady stream of small requests, with a line of JSON per request on standard output.

    victim_stream.py ENDPOINT SECONDS QUESTIONS MODEL...

Requests go in turn to each model with each line of the file QUESTIONS. Those of the first two rounds follow one
another. From then on one starts every SECONDS, however long the previous ones take, or at twice the duration that the
second round had, where the machine is slower. The key is read from TUNESMITH_API_KEY.

The line of a request that starts is `{"number", "model", "question", "began"}`, the line of its end adds `"seconds",
"status", "answer"`; times are of the machine's monotonic clock. `{"period"}` follows the first rounds. It runs as a
separate process, so that the attacker's work does not delay its clock.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp

MAX_TOKENS = 6
TIMEOUT_SECONDS = 90
LOST = 0
"""In place of an HTTP status: the connection broke, or no reply arrived in time."""


def report(line: dict[str, Any]) -> None:
    """Print a line and flush it."""
    print(json.dumps(line), flush=True)


async def ask(session: aiohttp.ClientSession, number: int, model: str, question: str) -> float:
    """Send a request, report its start and end, and return its duration."""
    line: dict[str, Any] = {"number": number, "model": model, "question": question, "began": time.monotonic()}
    report(line)
    body = {
        "model": line["model"],
        "messages": [{"role": "user", "content": line["question"]}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
    }
    status, answer = LOST, ""
    try:
        async with session.post("/v1/chat/completions", json=body) as reply:
            document = await reply.json(content_type=None)
            status = reply.status
        answer = (
            document["choices"][0]["message"]["content"] if status == 200 else str(document["error"]["message"])[:300]
        )
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError, TypeError) as error:
        status, answer = LOST, f"{type(error).__name__}: {error}"
    duration = time.monotonic() - line["began"]
    report({**line, "seconds": duration, "status": status, "answer": answer})
    return duration


async def stream(endpoint: str, seconds: float, questions: list[str], models: list[str]) -> None:
    """Send requests until the process is stopped."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
    headers = {"Authorization": f"Bearer {os.environ['TUNESMITH_API_KEY']}"}
    round_ = [(model, question) for question in questions for model in models]
    requests = enumerate(itertools.cycle(round_))
    async with (
        aiohttp.ClientSession(endpoint, headers=headers, timeout=timeout) as session,
        asyncio.TaskGroup() as tasks,
    ):
        first = [
            await ask(session, number, *request) for number, request in itertools.islice(requests, 2 * len(round_))
        ]
        period = max(seconds, 2 * statistics.median(first[len(round_) :]))
        report({"period": period})
        begin = time.monotonic()
        for sent, (number, request) in enumerate(requests):
            await asyncio.sleep(begin + sent * period - time.monotonic())
            tasks.create_task(ask(session, number, *request))


if __name__ == "__main__":
    address, interval, file, *names = sys.argv[1:]
    asyncio.run(stream(address, float(interval), Path(file).read_text().splitlines(), names))
