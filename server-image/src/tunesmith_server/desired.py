"""The list of wanted revisions, kept in a file so that a restarted agent goes on with it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pydantic import ValidationError

from tunesmith.contracts.agent import DesiredAdapters

if TYPE_CHECKING:
    from pathlib import Path

FILE = "desired.json"


class OutdatedError(Exception):
    """The list is older than the one that is known."""


class DesiredFile:
    """The newest list.

    Args:
        folder: where it is kept; on an emptyDir, so it lives as long as the pod.

    Raises:
        ValueError: the file there is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self.current: DesiredAdapters | None = None
        if self._path.exists():
            try:
                self.current = DesiredAdapters.model_validate_json(self._path.read_bytes())
            except ValidationError as error:
                raise ValueError(f"{self._path} is damaged; delete the pod to start anew: {error}") from None

    def put(self, wanted: DesiredAdapters) -> None:
        """Take a list over and keep it.

        Raises:
            OutdatedError: its (epoch, sequence) is lower than the known one's.
        """
        known = self.current
        if known is not None and (wanted.epoch, wanted.sequence) < (known.epoch, known.sequence):
            raise OutdatedError(
                f"epoch {wanted.epoch}, sequence {wanted.sequence} is older than epoch {known.epoch}, "
                f"sequence {known.sequence}, which this pod holds"
            )
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.write(wanted.model_dump_json(by_alias=True).encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
        self.current = wanted
