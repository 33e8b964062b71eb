"""Following of a FineTuneJob until it finishes."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from tunesmith.cli.describe import next_step
from tunesmith.cli.errors import CliError
from tunesmith.cli.kinds import Kind, parse
from tunesmith.cli.output import Format, note, print_json, print_line, single_line, visible
from tunesmith.cli.progress import News, final_condition, live_line, result
from tunesmith.cluster.errors import ForbiddenError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tunesmith.api.conditions import Condition
    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith.cluster.client import Cluster

_TICK_SECONDS = 1.0
_LINE_SECONDS = 10.0
"""Without a terminal, minimum interval between lines about the same stage."""
_SILENCE_SECONDS = 30.0


class View(Protocol):
    """Display of a followed job; a context manager."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def news(self, line: str) -> None:
        """Show a line about something that happened."""

    def show(self, job: FineTuneJob, line: str) -> None:
        """Show the current progress."""


class TerminalView:
    """A live line (two on a narrow terminal) below the news."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._live = Live(Text(""), console=self._console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def news(self, line: str) -> None:
        """Print above the live line."""
        self._console.print(Text(visible(single_line(line))))

    def show(self, job: FineTuneJob, line: str) -> None:
        """Replace the live line."""
        self._live.update(Text(visible(f"{job.metadata.name}  {line}")))


class PlainView:
    """Lines for a file or a pipe."""

    def __init__(self) -> None:
        self._stage = ""
        self._line = ""
        self._printed = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def news(self, line: str) -> None:
        """Print the line."""
        print_line(single_line(line))

    def show(self, job: FineTuneJob, line: str) -> None:
        """Print at each change of the stage, and in between at a limited rate."""
        stage, now = line.partition("  ")[0], time.monotonic()
        without_eta = line.partition("  ETA")[0]
        if stage != self._stage or (without_eta != self._line and now - self._printed >= _LINE_SECONDS):
            self._stage, self._line, self._printed = stage, without_eta, now
            print_line(f"{job.metadata.name}  {line}")


class JsonView:
    """One JSON object per change of the progress."""

    def __init__(self) -> None:
        self._shown: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def news(self, line: str) -> None:
        """Print an object with the message."""
        print_json({"message": line})

    def show(self, job: FineTuneJob, line: str) -> None:  # noqa: ARG002 - a line for people
        """Print an object with phase and progress."""
        progress = job.status.progress
        document = {"phase": job.status.phase.value if job.status.phase else None}
        document |= progress.manifest() if progress else {}
        if document != self._shown:
            self._shown = document
            print_json(document)


def view_for(output_format: Format) -> View:
    """Return the view for the output format and for standard output, a terminal or not."""
    if output_format is Format.JSON:
        return JsonView()
    return TerminalView() if sys.stdout.isatty() else PlainView()


async def follow(cluster: Cluster, namespace: str, name: str, output_format: Format) -> None:
    """Show the job until it finishes, then its result.

    Raises:
        CliError: the job failed, was deleted, or does not exist.
    """
    view = view_for(output_format)
    job, end = await _until_finished(cluster, namespace, name, view)
    if output_format is Format.JSON:
        print_json(result(job, end))
    if end.type == "Failed":
        raise CliError(
            f"FineTuneJob {namespace}/{name} failed: {end.reason}: {end.message}"
            f" (`tunesmith logs {name} -n {namespace}` shows the logs of its pods)"
        )
    if output_format is Format.TEXT:
        print_line(f"{name} is complete: {end.message}".rstrip(": "))
        if job.status.artifact is not None:
            print_line(f"  artifact {job.status.artifact.uri}\n  digest   {job.status.artifact.digest}")
        step = next_step(job)
        if step:
            note(f"Next: {step}")


async def _until_finished(cluster: Cluster, namespace: str, name: str, view: View) -> tuple[FineTuneJob, Condition]:
    changes: asyncio.Queue[_Change] = asyncio.Queue()
    followed = _Followed(f"{namespace}/{name}", view)
    started = time.monotonic()
    async with _watching(cluster, namespace, name, changes) as failed:
        with view:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_TICK_SECONDS):
                        followed.apply(await changes.get())
                failed()
                job = followed.job
                if job is None:
                    continue
                end = final_condition(job)
                if end is not None:
                    return job, end
                line = live_line(job, datetime.now(UTC))
                if not job.status.conditions and time.monotonic() - started > _SILENCE_SECONDS:
                    line = "no status yet: is Tunesmith's operator running? `kubectl get pods -A` shows it"
                view.show(job, line)


class _Change(NamedTuple):
    """An event of a watch."""

    kind: str
    type: str
    object: dict[str, Any]


class _Followed:
    """Latest observed state of the job."""

    def __init__(self, title: str, view: View) -> None:
        self.job: FineTuneJob | None = None
        self._title = title
        self._view = view
        self._news = News()

    def apply(self, change: _Change) -> None:
        """Apply a change and show its news.

        Raises:
            CliError: the job does not exist, or no longer exists.
        """
        lines: list[str] = []
        if change.kind == "Event":
            lines = self._news.of_event(change.object) if change.type in {"ADDED", "MODIFIED"} else []
        elif change.type == "DELETED":
            raise CliError(f"FineTuneJob {self._title} was deleted")
        elif change.type != "SYNCED":
            self.job = parse(Kind.JOB, change.object)
            lines = self._news.of(self.job)
        elif self.job is None:
            raise CliError(f"FineTuneJob {self._title} does not exist")
        for line in lines:
            self._view.news(line)


@contextlib.asynccontextmanager
async def _watching(
    cluster: Cluster, namespace: str, name: str, changes: asyncio.Queue[_Change]
) -> AsyncIterator[Callable[[], None]]:
    """Watch the job and its events into the queue; yield a function that raises if the watch of the job failed."""

    async def pump(kind: str, fields: str) -> None:
        async for event in cluster.watch(kind, namespace, fields=fields):
            changes.put_nowait(_Change(kind, event.type, event.object))

    async def pump_events() -> None:
        # A user who may not read events follows the job without them.
        with contextlib.suppress(ForbiddenError):
            await pump("Event", f"involvedObject.kind=FineTuneJob,involvedObject.name={name}")

    tasks = [asyncio.create_task(pump("FineTuneJob", f"metadata.name={name}")), asyncio.create_task(pump_events())]

    def failed() -> None:
        for task in tasks:
            if task.done():
                task.result()

    try:
        yield failed
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
