"""What crosses from the process that trains to one that reports: a description, and a file that grows by lines."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from pathlib import Path

JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class Description:
    """A run, for one tracker.

    Attributes:
        tracker: its name in the manifest.
        run: identifies the run over its attempts.
        name: what people call it: `<namespace>/<job>`.
        parameters: the resolved ones, by dotted path.
        folder: for files.
        guarded: whether its connections are, as those of a job in a cluster.
    """

    tracker: str
    run: str
    name: str
    parameters: dict[str, str]
    folder: str
    guarded: bool

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Point:
    """The metrics of a step. `time` is in seconds since 1970."""

    step: int
    time: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class End:
    """The last entry: Succeeded, Failed or Preempted, and the metrics of the result."""

    outcome: str
    metrics: dict[str, float] = field(default_factory=dict)


class JournalWriter:
    """Appends entries; a line is in the file when the call returns."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)

    def append(self, entry: Point | End) -> None:
        """Writes one entry."""
        self._file.write(json.dumps(asdict(entry)).encode() + b"\n")

    def close(self) -> None:
        """Nothing more comes."""
        self._file.close()


class JournalReader:
    """Reads the entries that are whole."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("rb")

    def read(self, most: int) -> list[Point | End]:
        """The next entries, at most so many."""
        entries: list[Point | End] = []
        while len(entries) < most:
            position = self._file.tell()
            line = self._file.readline()
            if not line.endswith(b"\n"):
                self._file.seek(position)
                break
            document = json.loads(line)
            entries.append(End(**document) if "outcome" in document else Point(**document))
        return entries

    def rewind(self) -> None:
        """Reads everything again."""
        self._file.seek(0)
