"""Output of the engine's processes: passed on unchanged, and its last lines kept to report why the engine stopped.

Standard library only: it runs in the engine's image.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections import deque
from typing import NamedTuple

MAX_LINE = 500
"""Longest reported line, in characters."""
_KEPT_LINES = 400
_KEPT_CHARACTERS = 4000
_RECENT_SECONDS = 60.0
"""An error that was written longer before the exit is not its cause."""
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_PREFIX = re.compile(
    r"^(?:\([\w .=]+\)\s*)?(?:(?:DEBUG|INFO|WARNING|ERROR|CRITICAL)\s+\d\d-\d\d [\d:]+ \[[^\]]*\]\s*)?"
)
"""Process and time in a line of vLLM's log."""
_EXCEPTION = re.compile(
    r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt|Fault): ?\S|^[\w.-]+(?: \w+)?: error: \S"
)
_CONSEQUENCE = re.compile(r"See root cause above|EngineDeadError|EngineGenerateError|EngineCore encountered an issue")
"""Errors that only report that another process failed."""
_SECRETS = (
    re.compile(r"(?<=://)[^\s/@]+(?=@)"),
    re.compile(r"(?i)(?<=bearer )\S+"),
    re.compile(r"(?i)(?:(?<=token)|(?<=password)|(?<=secret)|(?<=api[_-]key))\W{1,4}[^\s,'\"]+"),
    re.compile(r"\b(?:hf_|sk-|AKIA)[\w-]{8,}"),
    re.compile(r"\b[A-Za-z0-9+_-]{40,}={0,2}"),
)


class _Line(NamedTuple):
    at: float
    text: str


class Output:
    """Copies of an engine's stdout and stderr to those of this process, with the last lines."""

    def __init__(self) -> None:
        self._lines: deque[_Line] = deque(maxlen=_KEPT_LINES)
        self._threads: list[threading.Thread] = []

    def copy(self, source: int, target: int) -> None:
        """Copy from a file descriptor until its end, in a thread; closes the source."""
        thread = threading.Thread(target=self._copy, args=(source, target), daemon=True)
        self._threads.append(thread)
        thread.start()

    def finish(self, seconds: float) -> None:
        """Wait for the rest of the output of processes that exited."""
        for thread in self._threads:
            thread.join(seconds)

    def error(self, now: float) -> str:
        """Return the last error that the engine reported, on one line without secrets; empty without one.

        Args:
            now: monotonic seconds.
        """
        lines = [_plain(line.text) for line in list(self._lines) if now - line.at <= _RECENT_SECONDS]
        errors = [line for line in lines if _EXCEPTION.match(line)]
        causes = [line for line in errors if not _CONSEQUENCE.search(line)]
        found = causes or errors
        return shortened(found[-1]) if found else ""

    def last_line(self) -> str:
        """Return the last line, on one line without secrets; empty without one."""
        lines = [text for line in list(self._lines) if (text := _plain(line.text))]
        return shortened(lines[-1]) if lines else ""

    def _copy(self, source: int, target: int) -> None:
        rest = b""
        with os.fdopen(source, "rb", buffering=0) as stream:
            while chunk := stream.read(65536):
                _write(target, chunk)
                *lines, rest = (rest + chunk).split(b"\n")
                now = time.monotonic()
                for line in lines[-_KEPT_LINES:]:
                    self._keep(line, now)
                rest = rest[-_KEPT_CHARACTERS:]
        if rest:
            self._keep(rest, time.monotonic())

    def _keep(self, line: bytes, now: float) -> None:
        if text := line[:_KEPT_CHARACTERS].decode("utf-8", "replace").strip():
            self._lines.append(_Line(now, text))


def _write(target: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(target, view) :]
        except OSError:
            return  # nobody reads the log


def _plain(text: str) -> str:
    """Return a line of the log without colours, process and time."""
    return _PREFIX.sub("", _ESCAPES.sub("", text), count=1).strip()


def shortened(text: str) -> str:
    """Return a text on one line of at most MAX_LINE characters, without what looks like a secret."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    for secret in _SECRETS:
        text = secret.sub("…", text)
    return text if len(text) <= MAX_LINE else text[: MAX_LINE - 1] + "…"
