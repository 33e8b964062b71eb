"""Descriptions of exceptions for the log, without their texts, which may contain a client's data."""

from __future__ import annotations

import traceback
from pathlib import Path

_FRAMES = 4


def describe_error(error: object) -> str:
    """Return the type of an exception and its innermost stack frames."""
    if not isinstance(error, BaseException):
        return "unknown"
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames))
    return f"{type(error).__name__} at {places}" if places else type(error).__name__
