"""Descriptions of exceptions for the log, without their texts: those may hold what a client sent."""

from __future__ import annotations

import traceback
from pathlib import Path

_FRAMES = 4


def described(error: object) -> str:
    """Return the kind of an exception and the innermost places it passed."""
    if not isinstance(error, BaseException):
        return "unknown"
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames))
    return f"{type(error).__name__} at {places}" if places else type(error).__name__
