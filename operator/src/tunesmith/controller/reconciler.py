"""What a reconciler is: the plug-in point of the controller."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from tunesmith.contracts.ownership import controller_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from tunesmith.cluster.resources import Object

MANAGED = {"app.kubernetes.io/managed-by": "tunesmith"}
"""Labels of every object that Tunesmith owns."""


class Key(NamedTuple):
    """What is reconciled."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"


class Result(NamedTuple):
    """The outcome of a reconcile that raised nothing."""

    requeue_after: float | None = None
    """Seconds until the key is due again; None: when something changes."""
    rest: float = 0.0
    """Seconds during which a change does not make the key due again, so that a long decision does not delay others."""


def _no_keys(_: Object) -> Iterable[Key]:
    return ()


@dataclass(frozen=True)
class Watch:
    """A kind whose objects are cached, and the keys to reconcile when one changes."""

    kind: str
    keys: Callable[[Object], Iterable[Key]] = _no_keys
    """Called with the object after each change, and with the last known one after its deletion."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Only objects with all of these labels; empty: every object of the kind."""

    @property
    def selector(self) -> str:
        """The label selector of the API."""
        return ",".join(f"{key}={value}" for key, value in sorted(self.labels.items()))

    def matches(self, item: Object) -> bool:
        """Whether the object has the labels."""
        labels = item["metadata"].get("labels") or {}
        return all(labels.get(key) == value for key, value in self.labels.items())


class Reconciler(Protocol):
    """Brings one kind to what its spec says."""

    @property
    def kind(self) -> str:
        """The kind of its keys. Its objects are watched without being named in `watches`."""

    @property
    def watches(self) -> Sequence[Watch]:
        """The other kinds that it reads."""

    async def reconcile(self, key: Key) -> Result:
        """Observe, decide, write. Called for one key at a time, for several keys at once."""

    async def run(self) -> None:
        """A task that lives while this process leads; it is cancelled when it no longer does."""


def key_of(item: Object) -> Key:
    """Return the object's own key."""
    return Key(item["kind"], item["metadata"].get("namespace", ""), item["metadata"]["name"])


def owner_keys(kind: str) -> Callable[[Object], Iterable[Key]]:
    """The key of the controlling owner, where that is of `kind`."""

    def keys(item: Object) -> Iterable[Key]:
        owner = controller_of(item, kind)
        if owner is not None:
            yield Key(kind, item["metadata"].get("namespace", ""), owner["name"])

    return keys


def label_keys(kind: str, label: str) -> Callable[[Object], Iterable[Key]]:
    """The key of the object of `kind` that a label names, in the same namespace."""

    def keys(item: Object) -> Iterable[Key]:
        name = (item["metadata"].get("labels") or {}).get(label)
        if name:
            yield Key(kind, item["metadata"].get("namespace", ""), name)

    return keys
