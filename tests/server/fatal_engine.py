"""Switch of the tests: a middleware of vLLM that kills the process that computes when a request contains a word.

It is inside Tunesmith's middleware, so the request has passed its checks and is in the journal.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

FATAL_WORD = b"EndOfTheEngine"


def kill_core() -> None:
    """Kill the engine's process that computes, as a fault in a kernel does."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == os.getpid() and b"EngineCor" in (stat.parent / "comm").read_bytes():
                os.kill(int(stat.parent.name), signal.SIGKILL)
        except OSError:
            continue


class Middleware:
    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def watched() -> Any:
            message = await receive()
            if FATAL_WORD in message.get("body", b""):
                kill_core()
            return message

        await self._app(scope, watched, send)
