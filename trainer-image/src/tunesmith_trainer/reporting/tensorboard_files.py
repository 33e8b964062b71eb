"""TensorBoard: one event file per attempt, which contains the run from its first step."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.record_writer import RecordWriter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tunesmith_trainer.reporting.journal import Description, End, Point

_STRING = 7
"""Value of TensorFlow's DataType.DT_STRING."""


class TensorBoardTracker:
    """Writes event files to the run's folder."""

    def __init__(self, run: Description) -> None:
        self._run = run
        self._folder = Path(run.folder)
        self._writer: RecordWriter | None = None
        self._last = 0

    def open(self) -> None:
        """Replace the file of the previous attempt."""
        self._folder.mkdir(parents=True, exist_ok=True)
        before = list(self._folder.glob("events.out.tfevents.*"))
        now = time.time()
        path = self._folder / f"events.out.tfevents.{round(now * 1000)}.tunesmith"
        self._writer = RecordWriter(path.open("wb"))
        self._write(Event(wall_time=now, file_version="brain.Event:2"))
        # A TensorBoard that is open discards what it has read.
        self._write(Event(wall_time=now, session_log=SessionLog(status=SessionLog.START)))
        self._write(Event(wall_time=now, summary=_table(self._run.parameters)))
        self._flush()
        for old in before:
            old.unlink(missing_ok=True)

    def write(self, points: Sequence[Point]) -> None:
        """Add the points of the training."""
        for point in points:
            self._last = point.step
            self._write(Event(wall_time=point.time, step=point.step, summary=_scalars(point.metrics)))
        self._flush()

    def finish(self, end: End) -> None:
        """Add the metrics of the result."""
        final = {f"final/{name}": value for name, value in end.metrics.items()}
        if final:
            self._write(Event(wall_time=time.time(), step=self._last, summary=_scalars(final)))
        self._flush()

    @property
    def _open(self) -> RecordWriter:
        assert self._writer is not None  # noqa: S101 - open() is called first
        return self._writer

    def _write(self, event: Event) -> None:
        self._open.write(event.SerializeToString())

    def _flush(self) -> None:
        self._open.flush()


def _scalars(metrics: dict[str, float]) -> Summary:
    return Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()])


def _table(parameters: dict[str, str]) -> Summary:
    """Format the parameters as a table of the text plugin."""
    rows = [f"| {name} | {value.replace('|', '&#124;')} |" for name, value in parameters.items()]
    text = "\n".join(["| parameter | value |", "|---|---|", *rows])
    tensor = TensorProto(dtype=_STRING, string_val=[text.encode()])
    metadata = create_summary_metadata(display_name="parameters", description="")
    return Summary(value=[Summary.Value(tag="parameters", tensor=tensor, metadata=metadata)])
