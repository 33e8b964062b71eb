"""Limits of the connections to the agent: their number, and the time until the first request."""

from __future__ import annotations

import asyncio
import weakref
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

MAX_CONNECTIONS = 512
"""Highest number of concurrent connections: streams of the gateway replicas and of the leading operator, lists, and the
kubelet's probes."""
MAX_CONNECTIONS_PER_ADDRESS = 32
FIRST_REQUEST_SECONDS = 10.0
_IDLE_SECONDS = 15.0


class Connections:
    """Open connections of the agent."""

    def __init__(
        self,
        max_connections: int = MAX_CONNECTIONS,
        max_per_address: int = MAX_CONNECTIONS_PER_ADDRESS,
        first_request_seconds: float = FIRST_REQUEST_SECONDS,
    ) -> None:
        self._max_connections = max_connections
        self._max_per_address = max_per_address
        self._first_request_seconds = first_request_seconds
        self._open: dict[RequestHandler, str] = {}
        self._by_address: Counter[str] = Counter()
        self._requested: weakref.WeakSet[RequestHandler] = weakref.WeakSet()

    def admit(self, connection: RequestHandler, address: str) -> bool:
        """Count one more connection from an address and return True, or return False if it may not be served."""
        if len(self._open) >= self._max_connections or self._by_address[address] >= self._max_per_address:
            return False
        self._open[connection] = address
        self._by_address[address] += 1
        asyncio.get_running_loop().call_later(self._first_request_seconds, self._close_without_request, connection)
        return True

    def forget(self, connection: RequestHandler) -> None:
        """Record that a connection closed."""
        address = self._open.pop(connection, None)
        if address is not None:
            self._by_address[address] -= 1
            if not self._by_address[address]:
                del self._by_address[address]

    @web.middleware
    async def middleware(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Record that a connection has sent a request."""
        self._requested.add(request.protocol)
        return await handler(request)

    def _close_without_request(self, connection: RequestHandler) -> None:
        if connection in self._open and connection not in self._requested:
            connection.force_close()


class _Connection(RequestHandler):
    __slots__ = ("__weakref__", "_connections")

    def __init__(self, connections: Connections, server: web.Server, **settings: Any) -> None:  # noqa: ANN401 - aiohttp's
        super().__init__(server, **settings)
        self._connections = connections

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        peer = transport.get_extra_info("peername")
        if self._connections.admit(self, str(peer[0]) if peer else ""):
            super().connection_made(transport)
        else:
            transport.close()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._connections.forget(self)
        super().connection_lost(exc)


@asynccontextmanager
async def serving(
    application: web.Application, port: int, connections: Connections, host: str | None = None
) -> AsyncIterator[int]:
    """Serve an application within the limits until the block exits; yield the port.

    Raises:
        OSError: the port is in use.
    """
    application.middlewares.insert(0, connections.middleware)
    runner = web.AppRunner(application, shutdown_timeout=1, keepalive_timeout=_IDLE_SECONDS, access_log=None)
    await runner.setup()
    loop, server = asyncio.get_running_loop(), runner.server
    assert server is not None  # noqa: S101 - setup() has made it
    listener = await loop.create_server(
        lambda: _Connection(connections, server, loop=loop, **server._kwargs),  # noqa: SLF001 - as aiohttp's own factory
        host,
        port,
    )
    try:
        yield int(listener.sockets[0].getsockname()[1])
    finally:
        listener.close()
        await runner.cleanup()
