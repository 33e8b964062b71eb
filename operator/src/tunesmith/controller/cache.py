"""Latest known objects of the cluster, by kind, never older than this process's own writes."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from tunesmith.cluster.keep import kept

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tunesmith.cluster.resources import Object, Objects

_MAX_TOMBSTONES = 10_000
_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError)
_Place = tuple[str, str]


class _Index:
    """Objects by the values that a function extracts from them."""

    def __init__(self, values: Callable[[Object], Iterable[str]]) -> None:
        self._values = values
        self._places: dict[str, dict[_Place, Object]] = {}
        self._of: dict[_Place, tuple[str, ...]] = {}
        self._revisions: dict[str, int] = {}
        self._changes = 0

    def find(self, value: str) -> Objects:
        return list(self._places.get(value, {}).values())

    def revision(self, value: str) -> int:
        return self._revisions.get(value, 0)

    def put(self, place: _Place, item: Object) -> None:
        try:
            values = tuple(dict.fromkeys(self._values(item)))
        except _UNREADABLE:
            values = ()
        for value in self._of.get(place, ()):
            if value not in values:
                self._drop(value, place)
        for value in values:
            self._places.setdefault(value, {})[place] = item
            self._touch(value)
        self._of[place] = values

    def remove(self, place: _Place) -> None:
        for value in self._of.pop(place, ()):
            self._drop(value, place)

    def _drop(self, value: str, place: _Place) -> None:
        del self._places[value][place]
        if self._places[value]:
            self._touch(value)
        else:
            del self._places[value]
            self._revisions.pop(value, None)

    def _touch(self, value: str) -> None:
        self._changes += 1
        self._revisions[value] = self._changes


class Cache:
    """The objects of one kind, reduced to the fields that are read. Callers must not change returned objects."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._objects: dict[str, dict[str, Object]] = {}
        self._count = 0
        self._indexes: dict[str, _Index] = {"owner": _Index(_owners)}
        self._deleted: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        return self._count

    def get(self, namespace: str, name: str) -> Object | None:
        """Return the object, or None if it is not known."""
        return self._objects.get(namespace, {}).get(name)

    def list(self, namespace: str | None = None) -> Objects:
        """Return all objects, or those of one namespace."""
        if namespace is not None:
            return list(self._objects.get(namespace, {}).values())
        return [item for objects in self._objects.values() for item in objects.values()]

    def owned(self, uid: str) -> Objects:
        """Return the objects with an owner reference to the UID."""
        return self.find("owner", uid)

    def index(self, name: str, values: Callable[[Object], Iterable[str]]) -> None:
        """Add an index: `find(name, value)` returns the objects for which `values` yields the value."""
        index = self._indexes[name] = _Index(values)
        for item in self.list():
            index.put(_place(item), item)

    def find(self, name: str, value: str) -> Objects:
        """Return the objects for which an index yields a value."""
        return self._indexes[name].find(value)

    def revision(self, name: str, value: str) -> int:
        """Return a number that changes whenever the objects for which an index yields a value change."""
        return self._indexes[name].revision(value)

    def put(self, item: Object) -> bool:
        """Store a version from a watch, a list or a write; return False if it is not newer than the known one."""
        place = _place(item)
        old = self.get(*place)
        if _version(item) <= self._deleted.get(item["metadata"]["uid"], -1):
            return False
        if old is not None and _version(old) >= _version(item):
            return False
        item = kept(item)
        self._objects.setdefault(place[0], {})[place[1]] = item
        self._count += old is None
        for index in self._indexes.values():
            index.put(place, item)
        return True

    def remove(self, item: Object, version: int = 0) -> bool:
        """Remove a deleted object; return False if that incarnation is not known, or no longer known.

        Versions up to the object's, or up to `version` if that is higher, are rejected from then on.
        """
        metadata, place = item["metadata"], _place(item)
        self._deleted[metadata["uid"]] = max(_version(item), version)
        if len(self._deleted) > _MAX_TOMBSTONES:
            self._deleted.popitem(last=False)
        old = self.get(*place)
        if old is None or old["metadata"]["uid"] != metadata["uid"]:
            return False
        objects = self._objects[place[0]]
        del objects[place[1]]
        if not objects:
            del self._objects[place[0]]
        self._count -= 1
        for index in self._indexes.values():
            index.remove(place)
        return True

    def replace(self, items: Iterable[Object], version: str, among: Callable[[Object], bool]) -> Objects:
        """Store a complete list, at `version`, of the objects for which `among` is True; return those that changed.

        Objects that are not in the list are removed, unless this process observed them after the list was made.
        """
        changed, present = [], set()
        for item in items:
            present.add(_place(item))
            if self.put(item):
                changed.append(item)
        missing = [item for item in self.list() if _place(item) not in present and among(item)]
        changed += [item for item in missing if _version(item) <= int(version) and self.remove(item, int(version))]
        return changed


class Caches:
    """Caches by kind."""

    def __init__(self) -> None:
        self._caches: dict[str, Cache] = {}

    def __getitem__(self, kind: str) -> Cache:
        cache = self._caches.get(kind)
        if cache is None:
            cache = self._caches[kind] = Cache(kind)
        return cache

    def kinds(self) -> tuple[str, ...]:
        """Return the kinds that have a cache."""
        return tuple(self._caches)


def _place(item: Object) -> _Place:
    return item["metadata"].get("namespace", ""), item["metadata"]["name"]


def _version(item: Object) -> int:
    # The API server's resourceVersions are etcd revisions: they grow, also across kinds.
    return int(item["metadata"]["resourceVersion"])


def _owners(item: Object) -> Iterable[str]:
    return (reference["uid"] for reference in item["metadata"].get("ownerReferences") or ())
