"""Remove known credentials from everything that this process writes."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from tunesmith.contracts.result import TrainerResult
from tunesmith.storage.credentials import Scrubber, read_secrets, secret_values

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

_TEXTS = frozenset({"message", "examples", "suggestion"})
"""Fields of a result with sentences, which may include messages of libraries."""


def scrubber_of(secrets: Path, environment: Mapping[str, str]) -> Scrubber:
    """Return a scrubber of the mounted Secrets' values and the environment's credentials."""
    return Scrubber(secret_values(environment), *read_secrets(secrets).values())


def clean_result(result: TrainerResult, scrubber: Scrubber) -> TrainerResult:
    """Return the result with the credentials removed from its sentences."""
    document = result.model_dump(mode="json", by_alias=True)
    return TrainerResult.model_validate(scrubber.clean_fields(document, _TEXTS))


@contextmanager
def clean_output(scrubber: Scrubber) -> Iterator[None]:
    """Remove credentials from everything that Python code writes to standard output and standard error."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_CleanStream(stream, scrubber) for stream in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


class _CleanStream:
    """Text stream that removes credentials; everything else is delegated to the wrapped stream."""

    def __init__(self, stream: TextIO, scrubber: Scrubber) -> None:
        self._stream = stream
        self._scrubber = scrubber

    def write(self, text: str) -> int:
        """Write the text without credentials; return the number of characters of the text as given."""
        self._stream.write(self._scrubber.clean(text))
        return len(text)

    def writelines(self, lines: Iterator[str]) -> None:
        """Write each line without credentials."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the stream has
        return getattr(self._stream, name)
