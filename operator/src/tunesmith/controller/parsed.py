"""Cached objects as pydantic models; each version is parsed once."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Generic, TypeVar

from pydantic import ValidationError

from tunesmith.api.model import ApiModel

if TYPE_CHECKING:
    import builtins

    from tunesmith.cluster.resources import Object, Objects
    from tunesmith.controller.cache import Cache

M = TypeVar("M", bound=ApiModel)
_log = logging.getLogger(__name__)


class Parsed(Generic[M]):
    """The objects of a cache as models."""

    def __init__(self, cache: Cache, model: type[M], *, is_status_kept: bool = False) -> None:
        """Initialise; objects of the cache are parsed on demand.

        Args:
            cache: the objects of one kind.
            model: model of that kind.
            is_status_kept: True if the status is a record that cannot be observed again; an object whose status does
                not fit the schema is then treated like one whose spec does not.
        """
        self._cache = cache
        self._model = model
        self._is_status_kept = is_status_kept
        self._known: dict[str, tuple[str, M | None]] = {}

    def get(self, namespace: str, name: str) -> M | None:
        """Return the object; None if it does not exist, is being deleted, or does not fit this release's schema."""
        manifest = self._cache.get(namespace, name)
        return None if manifest is None else self._parse(manifest)

    def list(self, namespace: str | None = None) -> list[M]:
        """Return all objects, or those of one namespace, except those for which `get` returns None."""
        return self._models(self._cache.list(namespace))

    def find(self, index: str, value: str) -> builtins.list[M]:
        """Return the objects for which an index of the cache yields a value."""
        return self._models(self._cache.find(index, value))

    def forget(self, uid: str) -> None:
        """Discard a deleted object."""
        self._known.pop(uid, None)

    def error(self, manifest: Object) -> str:
        """Return the reason why an object does not fit this release's schema, as a sentence."""
        try:
            self._model.model_validate(manifest if self._is_status_kept else {**manifest, "status": {}})
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            return f"{where} does not fit the schema of this release: {first['msg']}; correct it and apply it again"
        return "it does not fit the schema of this release"

    def _models(self, manifests: Objects) -> builtins.list[M]:
        return [model for manifest in manifests if (model := self._parse(manifest)) is not None]

    def _parse(self, manifest: Object) -> M | None:
        metadata = manifest["metadata"]
        if metadata.get("deletionTimestamp"):
            return None
        version, model = self._known.get(metadata["uid"], ("", None))
        if version != metadata["resourceVersion"]:
            model = self._validate(manifest)
            self._known[metadata["uid"]] = (metadata["resourceVersion"], model)
        return model

    def _validate(self, manifest: Object) -> M | None:
        try:
            return self._model.model_validate(manifest)
        except ValidationError:
            place = f"{manifest['kind']} {manifest['metadata'].get('namespace')}/{manifest['metadata']['name']}"
        if not self._is_status_kept:
            # A status can be observed again; only an unreadable spec prevents the object from being served.
            try:
                model = self._model.model_validate({**manifest, "status": {}})
            except ValidationError:
                pass
            else:
                _log.warning("the status of %s does not fit the schema of this release and is recomputed", place)
                return model
        _log.warning("%s: %s", place, self.error(manifest))
        return None
