"""Process that reports to one tracker: `python -m tunesmith_trainer.reporting.worker FOLDER`.

It reads the description from standard input and follows the journal. It waits out an outage of the tracker until the
training process terminates it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tunesmith.api.output import Tracker
from tunesmith.storage.credentials import Scrubber
from tunesmith_trainer.connections import denied, guarded
from tunesmith_trainer.process.launch import die_with_parent
from tunesmith_trainer.reporting.journal import JOURNAL, Description, End, JournalReader, Point
from tunesmith_trainer.reporting.settings import PREFIXES

if TYPE_CHECKING:
    from collections.abc import Sequence

STATE = "state-{}.json"
_READ_AT_ONCE = 1000
_PAUSE_SECONDS, _MAX_PAUSE_SECONDS = 1.0, 5.0
_SHOWN_CHARACTERS = 300


class Sink(Protocol):
    """Interface of the trackers' modules. After an exception the sink is opened again and sent all points again."""

    def open(self) -> None:
        """Connect, and find the run of earlier attempts."""

    def write(self, points: Sequence[Point]) -> None:
        """Send the points, except those that the run already has."""

    def finish(self, end: End) -> None:
        """Send the result."""


@dataclass(frozen=True)
class State:
    """Progress of the reporting: the latest problem, and whether everything up to the end was sent."""

    problem: str | None = None
    done: bool = False


def read_state(folder: Path, tracker: str) -> State:
    """Return the last state that the worker of a tracker recorded."""
    try:
        return State(**json.loads((folder / STATE.format(tracker)).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return State()


def main() -> None:
    """Entry point."""
    die_with_parent()
    folder = Path(sys.argv[1])
    run = Description(**json.loads(sys.stdin.readline()))
    with guarded() if run.guarded else nullcontext():
        follow(run, folder)


def follow(run: Description, folder: Path) -> None:
    """Send the entries of the journal until its end."""
    reader = JournalReader(folder / JOURNAL)
    pause, sink, opened = _PAUSE_SECONDS, None, False
    end: End | None = None
    credentials = {name: value for name, value in os.environ.items() if name.startswith(tuple(PREFIXES.values()))}
    scrubber = Scrubber(credentials)
    while True:
        try:
            if sink is None:
                sink = make_sink(run)
            if not opened:
                sink.open()
                opened = True
            while entries := reader.read(_READ_AT_ONCE):
                sink.write([entry for entry in entries if isinstance(entry, Point)])
                end = next((entry for entry in entries if isinstance(entry, End)), end)
            if end is not None:
                sink.finish(end)
            _record_state(folder, run, State(done=end is not None))
        except Exception as error:  # noqa: BLE001 - every library has its own exceptions; they are handled here
            text = " ".join(scrubber.clean(_reason(error)).split())
            _record_state(folder, run, State(problem=text[:_SHOWN_CHARACTERS]))
            reader.rewind()
            opened, end = False, None
            pause = min(2 * pause, _MAX_PAUSE_SECONDS)
        else:
            pause = _PAUSE_SECONDS
        if end is not None:
            return
        time.sleep(pause)


def make_sink(run: Description) -> Sink:
    """Return the tracker's sink; imports its library."""
    if run.tracker == Tracker.TENSORBOARD:
        from tunesmith_trainer.reporting.tensorboard_files import TensorBoardTracker  # noqa: PLC0415 - only what is used

        return TensorBoardTracker(run)
    if run.tracker == Tracker.MLFLOW:
        from tunesmith_trainer.reporting.mlflow_server import MlflowTracker  # noqa: PLC0415

        return MlflowTracker(run)
    from tunesmith_trainer.reporting.wandb_run import WandbTracker  # noqa: PLC0415

    return WandbTracker(run)


def _reason(error: BaseException) -> str:
    """Return the message of the guard or the operating system if it caused the error, otherwise the error itself."""
    refused = denied(error, "its address")
    if refused is not None:
        return str(refused)
    first = error
    while (cause := first.__cause__ or first.__context__) is not None:
        first = cause
    shown = first if isinstance(first, OSError) else error
    return f"{type(shown).__name__}: {shown}"


def _record_state(folder: Path, run: Description, state: State) -> None:
    path = folder / STATE.format(run.tracker)
    written = path.with_suffix(".new")
    written.write_text(json.dumps({"problem": state.problem, "done": state.done}), encoding="utf-8")
    written.replace(path)


if __name__ == "__main__":
    main()
