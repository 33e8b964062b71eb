"""What was last seen of the cluster, by kind. Never older than what this process wrote itself."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tunesmith.cluster.resources import Object, Objects

_MAX_TOMBSTONES = 10_000


class Cache:
    """The objects of one kind. Callers must not change what it returns: copy first."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._objects: dict[tuple[str, str], Object] = {}
        self._owned: dict[str, dict[tuple[str, str], Object]] = {}
        self._deleted: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._objects)

    def get(self, namespace: str, name: str) -> Object | None:
        """The object, or None."""
        return self._objects.get((namespace, name))

    def list(self, namespace: str | None = None) -> Objects:
        """All objects, or those of one namespace."""
        return [item for (place, _), item in self._objects.items() if namespace is None or place == namespace]

    def owned(self, uid: str) -> Objects:
        """The objects with an owner reference to that uid."""
        return list(self._owned.get(uid, {}).values())

    def put(self, item: Object) -> bool:
        """Take in a version from a watch, a list or a write; False where it is not newer than what is known."""
        metadata = item["metadata"]
        key = (metadata.get("namespace", ""), metadata["name"])
        old = self._objects.get(key)
        if _version(item) <= self._deleted.get(metadata["uid"], -1):
            return False
        if old is not None and _version(old) >= _version(item):
            return False
        if old is not None:
            self._forget_owners(key, old)
        self._objects[key] = item
        for owner in _owners(item):
            self._owned.setdefault(owner, {})[key] = item
        return True

    def remove(self, item: Object, version: int = 0) -> bool:
        """Take in a deletion; False where that incarnation is not known (any more).

        Versions up to the object's, or up to `version` where that is higher, are not taken in again.
        """
        metadata = item["metadata"]
        key = (metadata.get("namespace", ""), metadata["name"])
        self._deleted[metadata["uid"]] = max(_version(item), version)
        if len(self._deleted) > _MAX_TOMBSTONES:
            self._deleted.popitem(last=False)
        old = self._objects.get(key)
        if old is None or old["metadata"]["uid"] != metadata["uid"]:
            return False
        self._forget_owners(key, old)
        del self._objects[key]
        return True

    def replace(self, items: Iterable[Object], version: str, among: Callable[[Object], bool]) -> Objects:
        """Take in a complete list made at `version` of the objects that `among` holds for; the objects that changed.

        Objects that are not in the list are gone, unless this process saw them after the list was made.
        """
        changed, present = [], set()
        for item in items:
            present.add((item["metadata"].get("namespace", ""), item["metadata"]["name"]))
            if self.put(item):
                changed.append(item)
        missing = [item for key, item in self._objects.items() if key not in present and among(item)]
        changed += [item for item in missing if _version(item) <= int(version) and self.remove(item, int(version))]
        return changed

    def _forget_owners(self, key: tuple[str, str], item: Object) -> None:
        for owner in _owners(item):
            siblings = self._owned.get(owner, {})
            siblings.pop(key, None)
            if not siblings:
                self._owned.pop(owner, None)


class Caches:
    """A cache for each kind."""

    def __init__(self) -> None:
        self._caches: dict[str, Cache] = {}

    def __getitem__(self, kind: str) -> Cache:
        return self._caches.setdefault(kind, Cache(kind))

    def kinds(self) -> tuple[str, ...]:
        """The kinds that have one."""
        return tuple(self._caches)


def _version(item: Object) -> int:
    # The API server's resourceVersions are etcd revisions: they grow, also across kinds.
    return int(item["metadata"]["resourceVersion"])


def _owners(item: Object) -> Iterable[str]:
    return (reference["uid"] for reference in item["metadata"].get("ownerReferences") or ())
