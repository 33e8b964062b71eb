"""Exits of the pod's engine: its crashes in the past hour, which outlive the agent's process, and its start time."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tunesmith.contracts.crash import MAX_POD_CRASHES, REFUSED_SECONDS, EngineCrash

if TYPE_CHECKING:
    from pathlib import Path

    from tunesmith.contracts.crash import EngineExit
    from tunesmith_server.engine import EngineState

log = logging.getLogger(__name__)


class _CrashRecord(BaseModel):
    """State in the state folder. `total`: number of crashes since the pod's start."""

    model_config = ConfigDict(extra="ignore")

    total: int = 0
    crashes: list[EngineCrash] = Field(default_factory=list)


class Crashes:
    """Crashes of the engine.

    Args:
        state: folder for the record.
    """

    def __init__(self, state: Path) -> None:
        self._path = state / "crashes.json"
        self._record = _read(self._path)
        self._latest_exit = ""

    @property
    def total(self) -> int:
        """Number of crashes since the pod's start."""
        return self._record.total

    def recent(self, now: float) -> list[EngineCrash]:
        """Return the latest crashes of the past hour, oldest first. `now`: seconds since 1970."""
        return [crash for crash in self._record.crashes if crash.at + REFUSED_SECONDS > now]

    def record(self, report: EngineExit, now: float) -> bool:
        """Record an exit; return True if it is a crash that was not reported before."""
        if report.id == self._latest_exit or report.id in {crash.id for crash in self._record.crashes}:
            return False
        self._latest_exit = report.id
        if not report.is_crash:
            return False
        crash = EngineCrash.model_validate(report.model_dump() | {"at": min(report.at, now)})
        crashes = [*self.recent(now), crash][-MAX_POD_CRASHES:]
        self._record = _CrashRecord(total=self._record.total + 1, crashes=crashes)
        temporary = self._path.with_name(f".{self._path.name}")
        try:
            temporary.write_text(self._record.model_dump_json(by_alias=True))
            temporary.replace(self._path)
        except OSError as error:
            log.warning("%s cannot be written: %s", self._path, error.strerror)
        return True


class StartTime:
    """Measurement of the engine's start, from its process to the first answer that the agent accepts."""

    def __init__(self) -> None:
        self._starting = ""
        self.seconds: float | None = None
        """The latest start time; None before one was measured."""

    def observe(self, state: EngineState, now: float, *, ready: bool) -> None:
        """Observe a running engine. `now`: seconds since 1970. `ready`: it accepts adapters."""
        if not ready:
            self._starting = state.boot_id
        elif self._starting == state.boot_id and state.started_at:
            self._starting = ""
            self.seconds = round(max(0.0, now - state.started_at), 1)


def _read(path: Path) -> _CrashRecord:
    try:
        return _CrashRecord.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return _CrashRecord()
    except (OSError, ValidationError) as error:
        log.warning("%s cannot be read and is replaced: %s", path, type(error).__name__)
        return _CrashRecord()
