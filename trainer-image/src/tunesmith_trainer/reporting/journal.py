"""Data passed from the training process to a reporting one: a description, and a file to which lines are appended."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from pathlib import Path

JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class Description:
    """Description of a run for one tracker.

    Attributes:
        tracker: name of the tracker in the manifest.
        run: identifies the run across attempts.
        name: display name: `<namespace>/<job>`.
        parameters: resolved parameters by dotted path.
        folder: folder for files.
        guarded: True if its connections are guarded, as those of a job in a cluster.
    """

    tracker: str
    run: str
    name: str
    parameters: dict[str, str]
    folder: str
    guarded: bool

    def to_json(self) -> str:
        """Return one line of JSON."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Point:
    """Metrics of a step. `time` is in seconds since 1970."""

    step: int
    time: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class End:
    """Last entry: Succeeded, Failed or Preempted, and the metrics of the result."""

    outcome: str
    metrics: dict[str, float] = field(default_factory=dict)


class JournalWriter:
    """Appends entries; a line is in the file when the call returns."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)

    def append(self, entry: Point | End) -> None:
        """Write one entry."""
        self._file.write(json.dumps(asdict(entry)).encode() + b"\n")

    def close(self) -> None:
        """Close the file; no more entries follow."""
        self._file.close()


class JournalReader:
    """Reads the complete entries."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("rb")

    def read(self, limit: int) -> list[Point | End]:
        """Return the next entries, at most `limit`."""
        entries: list[Point | End] = []
        while len(entries) < limit:
            position = self._file.tell()
            line = self._file.readline()
            if not line.endswith(b"\n"):
                self._file.seek(position)
                break
            document = json.loads(line)
            entries.append(End(**document) if "outcome" in document else Point(**document))
        return entries

    def rewind(self) -> None:
        """Restart from the first entry."""
        self._file.seek(0)
