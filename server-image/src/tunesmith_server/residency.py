"""Plan of the agent's next actions: a pure decision from wanted adapters, loaded adapters and failed attempts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tunesmith.api.parity import ParityMode, ParityVerdict
from tunesmith.contracts.agent import AdapterParity, DesiredAdapter, Residency, ResidencyState

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

UNLOAD_SECONDS = 30.0
"""Time for which an adapter that is no longer wanted stays loaded for its running requests."""
FIRST_RETRY_SECONDS = 1.0
MAX_RETRY_SECONDS = 60.0
MAX_LOADS = 8
"""Number of adapters that are loaded before the next canary: after a restart, the most active ones serve first."""
COLLECT_SECONDS = 3.0
"""Longest time for which a downloaded adapter waits for others, while at least MAX_LOADS are being downloaded."""
MAX_LOAD_REFUSALS = 3
"""Number of refusals by one engine process after which an adapter counts as unfit."""


@dataclass(frozen=True)
class Failure:
    """Failure of the last attempt at a revision. `retry_at`: monotonic seconds; unused if the failure is permanent."""

    message: str
    permanent: bool
    attempts: int
    retry_at: float

    @classmethod
    def after(cls, previous: Failure | None, message: str, *, permanent: bool, now: float) -> Failure:
        """Return the failure that follows `previous`, with twice its delay."""
        attempts = (previous.attempts if previous else 0) + 1
        delay = min(MAX_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2 ** (attempts - 1))
        return cls(message, permanent, attempts, now + delay)


@dataclass(frozen=True)
class Loads:
    """Loads of a revision into the engine. `seconds`: duration of the latest one."""

    count: int
    seconds: float


@dataclass(frozen=True)
class PodObservation:
    """Observed state of the pod.

    Attributes:
        now: monotonic seconds.
        desired: wanted revisions, the most important first.
        folders: folders of the revisions whose checked files are on this pod, by digest.
        downloading: digests that are being fetched.
        failures: failures by engine name.
        engine: paths of the adapters loaded in the engine, by name; None while it is down.
        in_flight: requests in the engine by model.
        unwanted_since: monotonic seconds at which each loaded adapter was first observed to be unwanted.
        max_adapters: number of adapters that may be registered at once.
        unverified: loaded adapters that get no requests until their canary has passed.
        sizes: bytes of the files of each revision on this pod, by digest.
        loads: loads of each revision into the engine, by engine name.
        parity: results of the parity checks, by engine name.
    """

    now: float
    desired: Sequence[DesiredAdapter]
    folders: Mapping[str, str]
    downloading: frozenset[str]
    failures: Mapping[str, Failure]
    engine: Mapping[str, str] | None
    in_flight: Mapping[str, int]
    unwanted_since: Mapping[str, float]
    max_adapters: int
    unverified: frozenset[str] = frozenset()
    sizes: Mapping[str, int] = field(default_factory=dict)
    loads: Mapping[str, Loads] = field(default_factory=dict)
    parity: Mapping[str, AdapterParity] = field(default_factory=dict)


@dataclass
class PodPlan:
    """Actions to take now, and state to report."""

    downloads: list[DesiredAdapter] = field(default_factory=list)
    loads: list[DesiredAdapter] = field(default_factory=list)
    unloads: list[str] = field(default_factory=list)
    report: list[Residency] = field(default_factory=list)


def plan(observed: PodObservation) -> PodPlan:
    """Return the next downloads, loads and unloads, and the state of every revision."""
    result = PodPlan()
    engine = observed.engine or {}
    paths = {adapter.engine_name: observed.folders.get(adapter.digest) for adapter in observed.desired}
    unwanted = [name for name, path in engine.items() if name not in paths or paths[name] != path]
    for name in unwanted:
        waited = observed.now - observed.unwanted_since.get(name, observed.now)
        if not observed.in_flight.get(name) or waited >= UNLOAD_SECONDS:
            result.unloads.append(name)
    free = observed.max_adapters - len(engine)
    fetching: set[str] = set()
    for index, adapter in enumerate(observed.desired):
        if index >= observed.max_adapters:
            message = (
                f"the pod registers at most {observed.max_adapters} adapters (engine.maxAdapters), and the operator "
                f"wants {len(observed.desired)}: raise maxAdapters, add pods or detach adapters"
            )
            result.report.append(_residency(adapter, observed, ResidencyState.FAILED, message))
            continue
        residency, action = _next_action(adapter, observed, free)
        result.report.append(residency)
        if action == "load":
            free -= 1
            result.loads.append(adapter)
        elif action == "download" and adapter.digest not in fetching:
            fetching.add(adapter.digest)
            result.downloads.append(adapter)
    wanted = {residency.engine_name for residency in result.report}
    result.report += [
        Residency(
            engine_name=name, digest="", state=ResidencyState.UNLOADING, message="its running requests finish first"
        )
        for name in unwanted
        if name not in wanted
    ]
    return result


def next_loads(ready: Sequence[DesiredAdapter], downloads: int, waited: float) -> Sequence[DesiredAdapter]:
    """Return the adapters to load now.

    Each group of loads is followed by a canary, so while many adapters arrive they are collected into groups.

    Args:
        ready: adapters that may be loaded, in this order.
        downloads: number of adapters that are being downloaded.
        waited: seconds since the first of them became ready.
    """
    if downloads >= MAX_LOADS and len(ready) < MAX_LOADS and waited < COLLECT_SECONDS:
        return ()
    return ready[:MAX_LOADS]


def _next_action(adapter: DesiredAdapter, observed: PodObservation, free: int) -> tuple[Residency, str]:
    path = observed.folders.get(adapter.digest)
    loaded = (observed.engine or {}).get(adapter.engine_name)
    failure = observed.failures.get(adapter.engine_name)
    if loaded is not None and loaded == path:
        if adapter.engine_name in observed.unverified:
            message = "it is loaded, and the canary has not passed yet"
            return _residency(adapter, observed, ResidencyState.LOADING, message), ""
        return _loaded(adapter, observed), ""
    if failure is not None and (failure.permanent or observed.now < failure.retry_at):
        return _residency(adapter, observed, ResidencyState.FAILED, failure.message, permanent=failure.permanent), ""
    if path is None:
        action = "" if adapter.digest in observed.downloading else "download"
        return _residency(adapter, observed, ResidencyState.DOWNLOADING), action
    if observed.engine is None:
        return _residency(adapter, observed, ResidencyState.LOADING, "the engine is not ready"), ""
    if loaded is not None or free <= 0:
        message = "the engine has not removed an unloaded adapter yet"
        return _residency(adapter, observed, ResidencyState.LOADING, message), ""
    return _residency(adapter, observed, ResidencyState.LOADING), "load"


def _loaded(adapter: DesiredAdapter, observed: PodObservation) -> Residency:
    """Return the state of a loaded adapter, which receives requests once it is resident."""
    if adapter.parity is ParityMode.OFF:
        return _residency(adapter, observed, ResidencyState.RESIDENT)
    parity = observed.parity.get(adapter.engine_name)
    state, message, permanent = ResidencyState.RESIDENT, "", False
    passed = parity is not None and parity.verdict is ParityVerdict.PASSED
    if adapter.parity is ParityMode.REQUIRED and not passed:
        if parity is None or parity.verdict is ParityVerdict.UNFINISHED:
            reason = f": {parity.message}" if parity is not None else ""
            state, message = ResidencyState.LOADING, f"it is loaded, and parity is required{reason}"
        else:
            state, message, permanent = ResidencyState.FAILED, f"parity is required, and {parity.message}", True
    return _residency(adapter, observed, state, message, permanent=permanent, parity=parity)


def _residency(
    adapter: DesiredAdapter,
    observed: PodObservation,
    state: ResidencyState,
    message: str = "",
    *,
    permanent: bool = False,
    parity: AdapterParity | None = None,
) -> Residency:
    loads = observed.loads.get(adapter.engine_name)
    return Residency(
        engine_name=adapter.engine_name,
        digest=adapter.digest,
        state=state,
        message=message,
        permanent=permanent,
        size_bytes=observed.sizes.get(adapter.digest, 0),
        loads=loads.count if loads else 0,
        load_seconds=loads.seconds if loads else 0.0,
        parity=parity,
    )
