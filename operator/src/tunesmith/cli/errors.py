"""Failures that a command reports in one sentence."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of `tunesmith`; `tunesmith run` uses the trainer's."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    INTERRUPTED = 130


class CliError(Exception):
    """A command cannot continue.

    Args:
        message: the sentence that the user reads; it names the fix.
        code: the exit code.
    """

    def __init__(self, message: str, code: Exit = Exit.FAILED) -> None:
        super().__init__(message)
        self.code = code
