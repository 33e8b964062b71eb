"""The interface between reconcilers and the controller."""

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
    """Identity of an object to reconcile."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"


class Result(NamedTuple):
    """Result of a reconcile that raised no exception."""

    requeue_after: float | None = None
    """Seconds until the key is due again; None: on the next change."""
    rest: float = 0.0
    """Seconds during which changes do not make the key due, so that an expensive reconcile does not delay others."""


def _no_keys(_: Object) -> Iterable[Key]:
    return ()


@dataclass(frozen=True)
class Watch:
    """A kind whose objects are cached, and the keys to reconcile when one changes."""

    kind: str
    keys: Callable[[Object], Iterable[Key]] = _no_keys
    """Returns the keys; called with the object after each change, and with its last known version after deletion."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels that watched objects must all have; empty: every object of the kind."""

    @property
    def selector(self) -> str:
        """Label selector for the API server."""
        return ",".join(f"{key}={value}" for key, value in sorted(self.labels.items()))

    def matches(self, item: Object) -> bool:
        """Return True if the object has the labels."""
        labels = item["metadata"].get("labels") or {}
        return all(labels.get(key) == value for key, value in self.labels.items())


class Reconciler(Protocol):
    """Reconciler of one kind: brings the cluster to the state in the spec."""

    @property
    def kind(self) -> str:
        """Kind of its keys. Its objects are watched without being listed in `watches`."""

    @property
    def watches(self) -> Sequence[Watch]:
        """Other kinds that it reads."""

    async def reconcile(self, key: Key) -> Result:
        """Observe, decide, write. Called concurrently for different keys, never for the same key."""

    async def run(self) -> None:
        """Run a background task while this process leads; cancelled when it no longer does."""


def key_of(item: Object) -> Key:
    """Return the object's own key."""
    return Key(item["kind"], item["metadata"].get("namespace", ""), item["metadata"]["name"])


def owner_keys(kind: str) -> Callable[[Object], Iterable[Key]]:
    """Return a function that yields the key of the controlling owner if that is of `kind`."""

    def keys(item: Object) -> Iterable[Key]:
        owner = controller_of(item, kind)
        if owner is not None:
            yield Key(kind, item["metadata"].get("namespace", ""), owner["name"])

    return keys


def label_keys(kind: str, label: str) -> Callable[[Object], Iterable[Key]]:
    """Return a function that yields the key of the object of `kind` that a label names, in the same namespace."""

    def keys(item: Object) -> Iterable[Key]:
        name = (item["metadata"].get("labels") or {}).get(label)
        if name:
            yield Key(kind, item["metadata"].get("namespace", ""), name)

    return keys
