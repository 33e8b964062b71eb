"""TLS connections of aiohttp that are closed even if the request that opens them is cancelled."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import aiohttp

if TYPE_CHECKING:
    from ssl import SSLContext

    from aiohttp.client_proto import ResponseHandler
    from aiohttp.tracing import Trace

_CLOSE_SECONDS = 0.25
"""Time for connections that are being opened or closed when the connector closes."""


class Connector(aiohttp.TCPConnector):
    """Connector that completes the opening of a connection although its request was cancelled, and then closes it.

    `loop.create_connection` does not close the socket if it is cancelled before the TLS handshake has begun: asyncio
    ignores `close()` of a transport in that state, and the socket stays open until it is garbage-collected.
    """

    def __init__(self, *, limit: int, ssl: SSLContext) -> None:
        super().__init__(limit=limit, ssl=ssl)
        self._opening: set[asyncio.Task[ResponseHandler]] = set()
        self._opened: WeakKeyDictionary[ResponseHandler, asyncio.BaseTransport] = WeakKeyDictionary()

    async def _create_connection(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Trace],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - aiohttp's own
    ) -> ResponseHandler:
        opening = asyncio.ensure_future(super()._create_connection(req, traces, timeout))
        self._opening.add(opening)
        opening.add_done_callback(self._opening.discard)
        try:
            connection = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(self._abort)
            raise
        self._remember(connection)
        return connection

    def _remember(self, connection: ResponseHandler) -> None:
        if connection.transport is not None:
            self._opened[connection] = connection.transport

    def _abort(self, opening: asyncio.Task[ResponseHandler]) -> None:
        if not opening.cancelled() and opening.exception() is None:
            self._remember(opening.result())
            opening.result().abort()

    async def close_all(self) -> None:
        """Close the connector, and wait until its sockets are closed. Connections are not shut down gracefully."""
        await self.close()
        if self._opening:
            _, unfinished = await asyncio.wait(self._opening, timeout=_CLOSE_SECONDS)
            for opening in unfinished:
                opening.cancel()
        closing = []
        for connection, transport in list(self._opened.items()):
            closed = connection.closed
            if closed is not None:
                transport.abort()  # type: ignore[attr-defined]  # a TCP or TLS transport
                closing.append(closed)
        if closing:
            await asyncio.wait(closing, timeout=_CLOSE_SECONDS)
            for closed in closing:
                _ = closed.done() and closed.exception()
        # The callbacks of aborted connections run in the event loop's next iteration.
        await asyncio.sleep(0)
