"""Objects that a reconciler applied: applied again when they differ, and after refusals with growing delays."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunesmith.cluster.errors import ForbiddenError, InvalidError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tunesmith.cluster.resources import Object
    from tunesmith.controller.context import Context

_APPLY_AGAIN_SECONDS = 300.0
_FIRST_DELAY_SECONDS = 5.0
_MAX_DELAY_SECONDS = 120.0


@dataclass(frozen=True)
class _Outcome:
    """The last answer to a manifest. `refusal`: a sentence, None where it was accepted."""

    digest: str
    at: float
    generation: int | None = None
    refusal: str | None = None
    delay: float = 0.0


class AppliedObjects:
    """The objects of each owner, by the owner's UID."""

    def __init__(self, context: Context, clock: Callable[[], float] = time.monotonic) -> None:
        self._context = context
        self._clock = clock
        self._outcomes: dict[str, dict[str, _Outcome]] = {}

    async def ensure(self, owner: str, manifest: Object, generation: int | None = None) -> str | None:
        """Apply an object unless it is as this process applied it a moment ago.

        Args:
            owner: UID of the owner.
            manifest: the full intent.
            generation: as observed; None where the object is not watched.

        Returns:
            None, or a sentence on why the API server, a quota or a policy refuses the object.
        """
        outcomes = self._outcomes.setdefault(owner, {})
        place = describe(manifest)
        digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        last, now = outcomes.get(place), self._clock()
        if last is not None and last.digest == digest:
            if last.refusal is not None and now - last.at < last.delay:
                return last.refusal
            is_fresh = last.refusal is None and now - last.at < _APPLY_AGAIN_SECONDS
            if is_fresh and (generation is None or generation == last.generation):
                return None
        try:
            written = await self._context.apply(manifest)
        except (InvalidError, ForbiddenError) as error:
            before = last.delay if last is not None and last.digest == digest else 0.0
            delay = min(_MAX_DELAY_SECONDS, max(_FIRST_DELAY_SECONDS, 2 * before))
            outcomes[place] = _Outcome(digest, now, refusal=f"the API server refuses {place}: {error}", delay=delay)
            return outcomes[place].refusal
        outcomes[place] = _Outcome(digest, now, written["metadata"].get("generation"))
        return None

    def forget(self, owner: str) -> None:
        """Drop what is known about the objects of an owner that is gone."""
        self._outcomes.pop(owner, None)


def describe(item: Object) -> str:
    """Return an object's kind, namespace and name, for a sentence."""
    return f"{item['kind']} {item['metadata'].get('namespace', '')}/{item['metadata']['name']}"
