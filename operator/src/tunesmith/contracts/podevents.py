"""Encoding and decoding of an agent's event stream: states to lines, and lines to the state."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

from tunesmith.contracts.agent import MAX_ADAPTERS, PodEvent, PodHeader, PodState, Residency
from tunesmith.contracts.crash import MAX_POD_CRASHES
from tunesmith.contracts.traffic import MAX_TRAFFIC_PER_LINE

if TYPE_CHECKING:
    from tunesmith.contracts.crash import EngineCrash
    from tunesmith.contracts.traffic import Traffic

_HEADER = frozenset(PodHeader.model_fields)
_RESIDENCY = tuple(Residency.model_fields)


class StreamOutOfSyncError(Exception):
    """A line does not follow from the preceding ones; the reader needs another snapshot."""


class _Residencies:
    """Revisions by engine name, with a digest over all of them that is updated at each change."""

    def __init__(self) -> None:
        self.by_name: dict[str, Residency] = {}
        self._sum = 0

    @property
    def digest(self) -> str:
        """Digest of the revisions, independent of their order."""
        return f"{self._sum:032x}"

    def put(self, residency: Residency) -> None:
        """Add or replace a revision."""
        self.remove(residency.engine_name)
        self.by_name[residency.engine_name] = residency
        self._sum ^= _residency_hash(residency)

    def remove(self, name: str) -> None:
        """Remove a revision."""
        old = self.by_name.pop(name, None)
        if old is not None:
            self._sum ^= _residency_hash(old)


class EventWriter:
    """Writer of one reader's stream.

    Args:
        traffic: True if the reader wants the traffic of the revisions.
    """

    def __init__(self, *, traffic: bool = False) -> None:
        self._traffic = traffic
        self._sent_traffic: dict[str, Traffic] = {}
        self._sent: _Residencies | None = None
        self._sent_crashes: frozenset[str] = frozenset()

    def line(self, state: PodState) -> bytes:
        """Return the next line: first a snapshot, then the changes since the previous line."""
        snapshot = self._sent is None
        sent = self._sent = _Residencies() if self._sent is None else self._sent
        current = {residency.engine_name: residency for residency in state.adapters}
        changed = [residency for name, residency in current.items() if sent.by_name.get(name) != residency]
        removed = sent.by_name.keys() - current.keys()
        for name in removed:
            sent.remove(name)
        for residency in changed:
            sent.put(residency)
        event = PodEvent(
            **{name: getattr(state, name) for name in _HEADER},
            snapshot=snapshot,
            changed=changed,
            removed=sorted(removed),
            residency_digest=sent.digest,
            crashes=[crash for crash in state.crashes if crash.id not in self._sent_crashes],
            traffic=self._next_traffic(state) if self._traffic else {},
        )
        self._sent_crashes = frozenset(crash.id for crash in state.crashes)
        return event.model_dump_json(by_alias=True, exclude_defaults=True).encode() + b"\n"

    def _next_traffic(self, state: PodState) -> dict[str, Traffic]:
        """Return the traffic of the next line: that of revisions for which it changed since it was sent."""
        assert self._sent is not None  # noqa: S101 - for the type checker
        sent = {name: traffic for name, traffic in self._sent_traffic.items() if name in state.traffic}
        changed = {
            name: traffic
            for name, traffic in state.traffic.items()
            if name in self._sent.by_name and sent.get(name) != traffic
        }
        # The order is that in which they were sent, so those that do not fit into this line are first in the next one.
        waited = [*(changed.keys() - sent.keys()), *(name for name in sent if name in changed)]
        chosen = {name: changed[name] for name in waited[:MAX_TRAFFIC_PER_LINE]}
        self._sent_traffic = {name: traffic for name, traffic in sent.items() if name not in chosen} | chosen
        return chosen


class PodChange(NamedTuple):
    """Changes in one line.

    `names`: the revisions that were added, changed or removed. `crashes`: crashes of the engine; a snapshot repeats
    those that earlier connections reported.
    """

    snapshot: bool
    header: bool
    names: frozenset[str]
    crashes: tuple[EngineCrash, ...] = ()


class EventReader:
    """Reader of one connection's lines."""

    def __init__(self) -> None:
        self._known: _Residencies | None = None
        self._header = PodHeader()
        self._crashes: tuple[EngineCrash, ...] = ()
        self._traffic: dict[str, Traffic] = {}
        self._state: PodState | None = None

    def read(self, line: bytes) -> PodChange:
        """Apply the next line and return its changes.

        Raises:
            ValidationError: it is not a line of such a stream.
            StreamOutOfSyncError: it does not follow from the preceding lines.
        """
        event = PodEvent.model_validate_json(line)
        if self._known is None and not event.snapshot:
            raise StreamOutOfSyncError("the stream does not begin with a snapshot")
        known = self._known or _Residencies()
        names = {residency.engine_name for residency in event.changed} | set(event.removed)
        if event.snapshot:
            names |= known.by_name.keys()
            known = _Residencies()
        for name in event.removed:
            known.remove(name)
        for residency in event.changed:
            known.put(residency)
        if known.digest != event.residency_digest:
            raise StreamOutOfSyncError("the digest of the revisions differs")
        if len(known.by_name) > MAX_ADAPTERS:
            raise StreamOutOfSyncError(f"a pod cannot hold more than {MAX_ADAPTERS} revisions")
        header = PodHeader(**{name: getattr(event, name) for name in _HEADER})
        change = PodChange(
            event.snapshot, self._known is None or header != self._header, frozenset(names), tuple(event.crashes)
        )
        self._known, self._header = known, header
        self._crashes = (*self._crashes, *event.crashes)[-MAX_POD_CRASHES:]
        traffic = {} if event.snapshot else self._traffic
        self._traffic = {name: counts for name, counts in (traffic | event.traffic).items() if name in known.by_name}
        if change.header or change.names or change.crashes or event.traffic:
            self._state = None
        return change

    @property
    def header(self) -> PodHeader:
        """State of the pod without its revisions."""
        return self._header

    def residency(self, name: str) -> Residency | None:
        """Return a revision as the pod reports it; None if the pod reports no such revision."""
        return self._known.by_name.get(name) if self._known is not None else None

    @property
    def state(self) -> PodState:
        """Complete state of the pod; the same object until a line changes it."""
        if self._state is None:
            header = {name: getattr(self._header, name) for name in _HEADER}
            adapters = list(self._known.by_name.values()) if self._known is not None else []
            self._state = PodState.model_construct(
                **header, adapters=adapters, crashes=list(self._crashes), traffic=self._traffic
            )
        return self._state


def _residency_hash(residency: Residency) -> int:
    text = "\0".join(str(getattr(residency, name)) for name in _RESIDENCY)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16])
