"""The connection guard, with the trainer's errors."""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from tunesmith.contracts import connections
from tunesmith_trainer.errors import AccessDeniedError, InvalidSpecError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


@contextmanager
def guarded(environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Keep every thread of this process from connecting to a refused address while the block runs.

    Args:
        environ: environment with the networks that the platform allows.

    Raises:
        InvalidSpecError: the platform's list is malformed.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(connections.guarded(environ))
        except ValueError as error:
            raise InvalidSpecError(str(error)) from None
        yield


def denied(error: BaseException, what: str) -> AccessDeniedError | None:
    """Return the failure of a job whose connection was refused; None if the error has another cause.

    Args:
        error: error of any library; libraries wrap what their sockets raise.
        what: description of what would have been read or written.
    """
    refusal = connections.refused_connection(error)
    return None if refusal is None else AccessDeniedError(f"{what} resolves to {refusal.explanation}")
