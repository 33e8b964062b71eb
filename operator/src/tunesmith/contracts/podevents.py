"""Both ends of an agent's event stream: states become lines, and lines become the state again."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from tunesmith.contracts.agent import MAX_ADAPTERS, PodEvent, PodHeader, PodState, Residency

_HEADER = frozenset(PodHeader.model_fields)


class StreamOutOfStepError(Exception):
    """A line does not follow from the ones before it: only another snapshot helps."""


class _Residencies:
    """Revisions by engine name, with a digest of all of them that follows each change."""

    def __init__(self) -> None:
        self.by_name: dict[str, Residency] = {}
        self._sum = 0

    @property
    def digest(self) -> str:
        """The digest; the order of the revisions does not matter."""
        return f"{self._sum:032x}"

    def put(self, residency: Residency) -> None:
        """Add or replace a revision."""
        self.remove(residency.engine_name)
        self.by_name[residency.engine_name] = residency
        self._sum ^= _number(residency)

    def remove(self, name: str) -> None:
        """Forget a revision."""
        old = self.by_name.pop(name, None)
        if old is not None:
            self._sum ^= _number(old)


class EventWriter:
    """Writes the lines of one reader's stream."""

    def __init__(self) -> None:
        self._sent: _Residencies | None = None

    def line(self, state: PodState) -> bytes:
        """Return the next line: a snapshot first, then what changed since the line before."""
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
        )
        return event.model_dump_json(by_alias=True, exclude_defaults=True).encode() + b"\n"


class PodChange(NamedTuple):
    """A line's news. `names`: the revisions that it adds, changes or removes."""

    snapshot: bool
    header: bool
    names: frozenset[str]


class EventReader:
    """Reads the lines of one connection."""

    def __init__(self) -> None:
        self._known: _Residencies | None = None
        self._header = PodHeader()
        self._state: PodState | None = None

    def read(self, line: bytes) -> PodChange:
        """Take the next line over.

        Raises:
            ValidationError: it is not a line of such a stream.
            StreamOutOfStepError: it does not follow from those before it.
        """
        event = PodEvent.model_validate_json(line)
        if self._known is None and not event.snapshot:
            raise StreamOutOfStepError("the stream does not begin with a snapshot")
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
            raise StreamOutOfStepError("the digest of the revisions differs")
        if len(known.by_name) > MAX_ADAPTERS:
            raise StreamOutOfStepError(f"a pod cannot hold more than {MAX_ADAPTERS} revisions")
        header = PodHeader(**{name: getattr(event, name) for name in _HEADER})
        change = PodChange(event.snapshot, self._known is None or header != self._header, frozenset(names))
        self._known, self._header = known, header
        if change.header or change.names:
            self._state = None
        return change

    @property
    def header(self) -> PodHeader:
        """The state without the revisions."""
        return self._header

    def residency(self, name: str) -> Residency | None:
        """Return what the pod reports about a revision."""
        return self._known.by_name.get(name) if self._known is not None else None

    @property
    def state(self) -> PodState:
        """The whole state; the same object until a line changes it."""
        if self._state is None:
            header = {name: getattr(self._header, name) for name in _HEADER}
            adapters = list(self._known.by_name.values()) if self._known is not None else []
            self._state = PodState.model_construct(**header, adapters=adapters)
        return self._state


def _number(residency: Residency) -> int:
    text = "\0".join(
        (residency.engine_name, residency.digest, residency.state, residency.message, str(residency.permanent))
    )
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16])
