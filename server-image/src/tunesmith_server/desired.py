"""List of wanted revisions, kept in a file so that a restarted agent continues with it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pydantic import ValidationError

from tunesmith.contracts.agent import MAX_EPOCH_LEAD, DesiredAdapters, list_digest

if TYPE_CHECKING:
    from pathlib import Path

FILE = "desired.json"


class OutdatedError(Exception):
    """The list is older than the current one."""


class ImplausibleEpochError(Exception):
    """The list's epoch is so far in the future that no later leader could exceed it."""


class DesiredFile:
    """Newest list of wanted revisions.

    Args:
        folder: folder of the file; on an emptyDir, so that the file lives as long as the pod.

    Raises:
        ValueError: the file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self.current: DesiredAdapters | None = None
        self.digest = ""
        """Digest of the list; empty before the first one."""
        if self._path.exists():
            try:
                self.current = DesiredAdapters.model_validate_json(self._path.read_bytes())
                self.digest = list_digest(self.current.adapters)
            except ValidationError as error:
                raise ValueError(
                    f"{self._path} is damaged; delete the pod, so that a new one replaces it: {error}"
                ) from None

    def put(self, wanted: DesiredAdapters, now: float) -> None:
        """Accept a list and save it.

        Args:
            wanted: list of wanted revisions.
            now: seconds since 1970.

        Raises:
            ImplausibleEpochError: its epoch is too far in the future.
            OutdatedError: its (epoch, sequence) is lower than the current one, or equal with other content.
        """
        known, digest = self.current, list_digest(wanted.adapters)
        latest = int(now) + MAX_EPOCH_LEAD
        if wanted.epoch > latest:
            raise ImplausibleEpochError(
                f"epoch {wanted.epoch} is more than {MAX_EPOCH_LEAD} s ahead of this pod's clock ({int(now)}): check "
                "the clocks of the operator's node and of this one"
            )
        if known is not None and known.epoch > latest:
            known = None  # it was accepted while the clock was wrong
        number = (wanted.epoch, wanted.sequence)
        if known is not None and number == (known.epoch, known.sequence) and digest != self.digest:
            raise OutdatedError(f"this pod has another list with epoch {wanted.epoch}, sequence {wanted.sequence}")
        if known is not None and number < (known.epoch, known.sequence):
            raise OutdatedError(
                f"epoch {wanted.epoch}, sequence {wanted.sequence} is older than epoch {known.epoch}, "
                f"sequence {known.sequence}, which this pod has"
            )
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.write(wanted.model_dump_json(by_alias=True).encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
        self.current, self.digest = wanted, digest
