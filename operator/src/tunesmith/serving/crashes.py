"""Crashes of a pool's engines: their problem, their part of the status, and the Events about them."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, TypedDict

from tunesmith.api.conditions import EventReason
from tunesmith.api.servingpool import EngineCrashStatus, RefusedRequest
from tunesmith.contracts.crash import REFUSED_SECONDS, SHOWN_DIGITS, CrashLedger
from tunesmith.contracts.sentence import one_line
from tunesmith.contracts.transitions import NewEvent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tunesmith.api.servingpool import ServingPoolStatus
    from tunesmith.contracts.agent import PodState
    from tunesmith.contracts.crash import EngineCrash
    from tunesmith.serving.pod import PoolPod

MAX_REFUSED_REQUESTS = 32
"""Highest number of refused requests in a status."""
_MAX_MESSAGE = 600
_MAX_CRASH_MESSAGE = 1024
_MIN_CRASHES = 3
_RECENT = timedelta(minutes=10)
_LATEST = datetime(9999, 1, 1, tzinfo=UTC).timestamp()


class CrashStatus(TypedDict):
    """Fields of a pool's status."""

    engine_start_seconds: int | None
    engine_crashes: int
    latest_crash: EngineCrashStatus | None
    refused_requests: list[RefusedRequest] | None


def crash_problem(state: PodState, now: datetime) -> str | None:
    """Return a sentence about the engine of a pod that crashed; None if it did not, or serves well again.

    It serves well again unless it crashed several times recently.
    """
    recent = [crash for crash in _counted(state, now) if now - _time(crash) <= _RECENT]
    if not recent or (state.engine_ready and len(recent) < _MIN_CRASHES):
        return None
    count = f", {len(recent)} times in 10 minutes" if len(recent) > 1 else ""
    outlook = "is running again" if state.engine_ready else "is started again"
    return f"the engine stopped ({one_line(recent[-1].reason, _MAX_MESSAGE)}){count}; it {outlook}"


def crash_status(status: ServingPoolStatus, pods: Sequence[PoolPod], now: datetime) -> CrashStatus:
    """Return the fields of the next status.

    Args:
        status: the observed status.
        pods: pods of the pool that are not stopping.
        now: current time.
    """
    starts = [pod.state.engine_start_seconds for pod in pods if pod.state and pod.state.engine_start_seconds]
    crashes = sorted(
        ((crash, pod.name) for pod in pods if pod.state is not None for crash in _counted(pod.state, now)),
        key=lambda found: found[0].at,
    )
    latest = None
    if crashes:
        crash, pod_name = crashes[-1]
        message = one_line(crash.reason, _MAX_CRASH_MESSAGE)
        latest = EngineCrashStatus(pod=pod_name, time=_time(crash), message=message)
    return CrashStatus(
        engine_start_seconds=math.ceil(max(starts)) if starts else status.engine_start_seconds,
        engine_crashes=len(crashes),
        latest_crash=latest,
        refused_requests=_refused(status, [crash for crash, _ in crashes], now),
    )


def crash_events(before: ServingPoolStatus, after: ServingPoolStatus) -> list[NewEvent]:
    """Return the Events about new crashes and newly refused requests."""
    events = []
    latest = after.latest_crash
    if latest is not None and latest != before.latest_crash and (after.engine_crashes or 0) > 0:
        count = after.engine_crashes
        events.append(
            NewEvent(
                EventReason.ENGINE_CRASHED,
                f"pod {latest.pod}: the engine stopped ({latest.message}); {count} "
                f"crash{'' if count == 1 else 'es'} of the pool's engines in the past hour",
                "Warning",
            )
        )
    known = {request.digest for request in before.refused_requests or ()}
    events += [
        NewEvent(
            EventReason.REQUEST_REFUSED,
            f"request {request.digest} to {request.model} was being processed at {request.crashes} crashes of the "
            f"pool's engines: the gateways refuse it until {request.until:%H:%M} UTC",
            "Warning",
        )
        for request in after.refused_requests or ()
        if request.digest not in known
    ]
    return events


def _refused(status: ServingPoolStatus, crashes: Sequence[EngineCrash], now: datetime) -> list[RefusedRequest] | None:
    """Return the refused requests: those of the pods' crashes, and earlier ones, whose pods may be gone."""
    ledger = CrashLedger()
    for crash in crashes:
        ledger.record(crash, now.timestamp())
    found = {request.digest: request for request in status.refused_requests or () if request.until > now}
    for suspect in ledger.refused(now.timestamp()):
        digest = suspect.digest[:SHOWN_DIGITS]
        until = datetime.fromtimestamp(int(suspect.until), UTC)
        found[digest] = RefusedRequest(
            digest=digest, model=one_line(suspect.model, 256), crashes=suspect.crashes, until=until
        )
    newest = sorted(found.values(), key=lambda request: (request.until, request.digest), reverse=True)
    return newest[:MAX_REFUSED_REQUESTS] or None


def _counted(state: PodState, now: datetime) -> list[EngineCrash]:
    return [crash for crash in state.crashes if crash.at + REFUSED_SECONDS > now.timestamp()]


def _time(crash: EngineCrash) -> datetime:
    return datetime.fromtimestamp(int(min(crash.at, _LATEST)), UTC)
