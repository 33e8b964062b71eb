#!/usr/bin/env python3
"""A tenant's steady stream of small requests, with a line of JSON per request on standard output.

    victim_stream.py ENDPOINT SECONDS QUESTIONS MODEL...

A request starts every SECONDS, in turn to each model with each line of the file QUESTIONS, however long the previous
ones take. The key is read from TUNESMITH_API_KEY. The line of a request that starts is `{"number", "model", "question",
"began"}`, the line of its end adds `"seconds", "status", "answer"`; times are of the machine's monotonic clock. It runs
as a process of its own, so that the attacker's work does not delay its clock.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp

MAX_TOKENS = 6
TIMEOUT_SECONDS = 90
LOST = 0
"""In place of an HTTP status: the connection broke, or nothing came in time."""


def report(line: dict[str, Any]) -> None:
    """Print a line at once."""
    print(json.dumps(line), flush=True)


async def ask(session: aiohttp.ClientSession, line: dict[str, Any]) -> None:
    """Send a request and report its end."""
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
    report({**line, "seconds": time.monotonic() - line["began"], "status": status, "answer": answer})


async def stream(endpoint: str, seconds: float, questions: list[str], models: list[str]) -> None:
    """Send requests until the process is stopped."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
    headers = {"Authorization": f"Bearer {os.environ['TUNESMITH_API_KEY']}"}
    requests = itertools.cycle([(model, question) for question in questions for model in models])
    async with (
        aiohttp.ClientSession(endpoint, headers=headers, timeout=timeout) as session,
        asyncio.TaskGroup() as tasks,
    ):
        begin = time.monotonic()
        for number, (model, question) in enumerate(requests):
            await asyncio.sleep(begin + number * seconds - time.monotonic())
            line = {"number": number, "model": model, "question": question, "began": time.monotonic()}
            report(line)
            tasks.create_task(ask(session, line))


if __name__ == "__main__":
    address, interval, file, *names = sys.argv[1:]
    asyncio.run(stream(address, float(interval), Path(file).read_text().splitlines(), names))
