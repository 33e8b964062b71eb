"""Writes of statuses and of the Events about their changes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, TypeVar

from tunesmith.api.conditions import EventReason
from tunesmith.api.model import StatusModel
from tunesmith.cluster.errors import ForbiddenError, InvalidError
from tunesmith.contracts.sentence import one_line
from tunesmith.contracts.transitions import new_events, readable_conditions, status_of, unreadable_status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tunesmith.cluster.resources import Object
    from tunesmith.contracts.transitions import NewEvent
    from tunesmith.controller.context import Context

S = TypeVar("S", bound=StatusModel)
_MAX_MESSAGE = 800
"""Most characters of the API server's message that are kept; an Event's message has at most 1024."""
_log = logging.getLogger(__name__)


class StatusWriter:
    """Writer of statuses: one write per reconcile, if the status differs from the observed one."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def write(
        self,
        manifest: Object,
        status: S,
        *,
        events: Callable[[S], Iterable[NewEvent]] = lambda _: (),
        fallback: Callable[[S], S] | None = None,
    ) -> bool:
        """Write a status, and an Event for each condition that changed.

        Args:
            manifest: the resource as observed.
            status: the whole next status.
            events: returns the Events about other changes in the written status.
            fallback: returns the status without values reported by a pod, which must not prevent the write of the rest.

        Returns:
            True if it was written.

        Raises:
            ClusterError: the status could not be written; a refusal is reported by an Event.
        """
        if status.manifest() == status_of(manifest):
            return False
        try:
            written = await self._replace(manifest, status.manifest())
        except InvalidError:
            if fallback is None:
                raise
            status = fallback(status)
            written = await self._replace(manifest, status.manifest())
        await self._report(manifest, written, events(status))
        return True

    async def write_unreadable(self, manifest: Object, message: str) -> None:
        """Write conditions of a resource that does not fit this release's schema; the rest stays unchanged."""
        document = unreadable_status(manifest, message, self._context.now())
        if document != status_of(manifest):
            await self._report(manifest, await self._replace(manifest, document), ())

    async def _replace(self, manifest: Object, document: dict[str, Any]) -> Object:
        try:
            return await self._context.replace_status({**manifest, "status": document})
        except (InvalidError, ForbiddenError) as error:
            place = f"{manifest['kind']} {manifest['metadata'].get('namespace')}/{manifest['metadata']['name']}"
            reason = one_line(str(error), _MAX_MESSAGE)
            _log.warning("the status of %s is refused: %s", place, reason)
            message = f"the API server refuses the status, which is out of date: {reason}"
            await self._context.recorder.event(manifest, EventReason.STATUS_REFUSED, message, type_="Warning")
            raise

    async def _report(self, manifest: Object, written: Object, reports: Iterable[NewEvent]) -> None:
        before, after = readable_conditions(status_of(manifest)), readable_conditions(status_of(written))
        for notice in (*new_events(manifest["kind"], before, after), *reports):
            await self._context.recorder.event(written, notice.reason, notice.message, type_=notice.type)
