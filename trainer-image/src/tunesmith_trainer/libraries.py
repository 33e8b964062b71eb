"""Errors of libraries that read what a user sent: each class has its own, and code in Rust panics."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from tunesmith_trainer.errors import InvalidSpecError, TrainerError

if TYPE_CHECKING:
    from collections.abc import Iterator

_SHOWN = 400


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Raise InvalidSpecError for whatever a library raises in the block, except if memory runs out.

    Only for work on a user's files that needs neither network nor device: it fails in the same way every time.

    Args:
        what: beginning of the message: which input cannot be used.
    """
    try:
        yield
    except (TrainerError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise InvalidSpecError(f"{what}: {line_of(error)}") from None


def is_panic(error: BaseException) -> bool:
    """Return True for a panic of a library in Rust, which is no Exception and has no importable class."""
    return type(error).__name__ == "PanicException"


def line_of(error: BaseException) -> str:
    """Return an error's text as one line; with its class if the text alone may not explain it."""
    text = " ".join(str(error).split())[:_SHOWN]
    return text if text and isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"
