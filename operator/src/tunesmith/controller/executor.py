"""Writes of the reconcilers. Refusals of the API server are returned as observations and retried with delays."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunesmith.cluster.errors import ClusterError, ForbiddenError, InvalidError, UnavailableError
from tunesmith.contracts.refusal import MAX_RETRY_SECONDS, Refusal, RefusalCause, cause_of, removed_images
from tunesmith.contracts.sentence import one_line

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tunesmith.cluster.client import PatchType, Propagation
    from tunesmith.cluster.resources import Object
    from tunesmith.controller.context import Context

_REAPPLY_SECONDS = 300.0
_FIRST_DELAY_SECONDS = 5.0
_MAX_MESSAGE = 2048
"""Most characters of the API server's message that are kept."""


@dataclass(frozen=True)
class _LastWrite:
    """The latest response to a write. `refusal`: None if it was accepted."""

    digest: str
    at: float
    generation: int | None = None
    refusal: Refusal | None = None
    delay: float = 0.0


class Executor:
    """Writes on behalf of owners, by the owner's UID.

    A refused write is not repeated until its delay has passed, unless it creates or applies different content. Errors
    that are not refusals are raised, and the queue retries the whole key.
    """

    def __init__(self, context: Context, clock: Callable[[], float] = time.monotonic) -> None:
        self._context = context
        self._clock = clock
        self._last_writes: dict[str, dict[str, _LastWrite]] = {}

    async def apply(self, owner: str, manifest: Object, generation: int | None = None) -> Refusal | None:
        """Apply an object unless it is unchanged since this process recently applied it.

        Args:
            owner: UID of the owner.
            manifest: the full intent.
            generation: the observed generation; None if the object is not watched.
        """
        last = self._last_writes.get(owner, {}).get(_place("apply", manifest))
        if last is not None and last.refusal is None and last.digest == _digest(manifest):
            is_fresh = self._clock() - last.at < _REAPPLY_SECONDS
            if is_fresh and (generation is None or generation == last.generation):
                return None
        return await self._send(
            "apply", owner, manifest, lambda: self._context.apply(manifest), digest=_digest(manifest)
        )

    async def create(self, owner: str, manifest: Object) -> Refusal | None:
        """Create an object.

        Raises:
            AlreadyExistsError: an object of that name exists.
        """
        return await self._send(
            "create", owner, manifest, lambda: self._context.create(manifest), digest=_digest(manifest)
        )

    async def patch(
        self, owner: str, item: Object, body: Object, *, type_: PatchType = "merge", subresource: str | None = None
    ) -> Refusal | None:
        """Patch this incarnation of an object.

        Raises:
            ConflictError: another object has its name.
            NotFoundError: the object does not exist.
        """
        return await self._send(
            "patch",
            owner,
            item,
            lambda: self._context.patch(item, body, type_=type_, subresource=subresource),
            subresource=subresource or "",
        )

    async def delete(self, owner: str, item: Object, propagation: Propagation) -> Refusal | None:
        """Delete this incarnation of an object and its dependents; do nothing if it does not exist."""
        return await self._send("delete", owner, item, lambda: self._context.delete(item, propagation))

    def forget(self, owner: str) -> None:
        """Discard the records of a deleted owner's objects."""
        self._last_writes.pop(owner, None)

    async def _send(
        self,
        verb: str,
        owner: str,
        item: Object,
        write: Callable[[], Awaitable[Object | bool]],
        *,
        digest: str = "",
        subresource: str = "",
    ) -> Refusal | None:
        last_writes = self._last_writes.setdefault(owner, {})
        place, now = _place(verb, item) + subresource, self._clock()
        last = last_writes.get(place)
        before = last if last is not None and last.refusal is not None and last.digest == digest else None
        if before is not None and now - before.at < before.delay:
            return before.refusal
        try:
            written = await write()
        except (InvalidError, ForbiddenError, UnavailableError) as error:
            refusal = _refusal(verb, item, error)
            if refusal is None:
                raise
            delay = max(_FIRST_DELAY_SECONDS, 2 * before.delay) if before is not None else _FIRST_DELAY_SECONDS
            last_writes[place] = _LastWrite(digest, now, refusal=refusal, delay=min(MAX_RETRY_SECONDS, delay))
            return refusal
        stored = written if isinstance(written, dict) and verb in {"apply", "create"} else {}
        removed = removed_images(item, stored) if stored else []
        if removed:
            if verb == "create":
                # A Job would read an empty folder.
                await self._context.delete(stored, "Background")
            message = f"the API server removes the volume {', '.join(removed)} of {describe(item)}, which is an image"
            refusal = Refusal(verb, item["kind"], message, RefusalCause.IMAGE_VOLUME)
            last_writes[place] = _LastWrite(digest, now, refusal=refusal, delay=MAX_RETRY_SECONDS)
            return refusal
        if verb == "apply" and isinstance(written, dict):
            last_writes[place] = _LastWrite(digest, now, written["metadata"].get("generation"))
        else:
            last_writes.pop(place, None)
        return None


def name_taken(verb: str, manifest: Object, message: str) -> Refusal:
    """Return the refusal for an object whose name is taken."""
    return Refusal(verb, manifest["kind"], message, RefusalCause.NAME_TAKEN)


def describe(item: Object) -> str:
    """Return an object's kind, namespace and name, for messages."""
    return f"{item['kind']} {item['metadata'].get('namespace', '')}/{item['metadata']['name']}"


def _refusal(verb: str, item: Object, error: ClusterError) -> Refusal | None:
    """Return the refusal for an error; None if the API server was merely unable to respond."""
    target = describe(item) if verb in {"apply", "create"} else f"to {verb} {describe(item)}"
    cause = cause_of(str(error), forbidden=isinstance(error, ForbiddenError))
    if isinstance(error, UnavailableError) and cause is RefusalCause.INVALID:
        return None
    # A webhook's message may be long; the fix, which follows it, must not be cut.
    message = one_line(str(error), _MAX_MESSAGE)
    return Refusal(verb, item["kind"], f"the API server refuses {target}: {message}", cause)


def _place(verb: str, item: Object) -> str:
    return f"{verb} {describe(item)}"


def _digest(document: Object) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
