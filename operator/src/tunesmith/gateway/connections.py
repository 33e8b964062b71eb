"""Client connections: their number, their idle time, and the answer to requests that are not HTTP.

aiohttp's server waits for a header as long as for the next request, does not bound the number of connections, and logs
the bytes that it cannot parse, which may contain a key.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import secrets
from collections import Counter
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast

from aiohttp import web
from aiohttp.http_exceptions import ContentEncodingError, LineTooLong
from aiohttp.web_protocol import RequestHandler

from tunesmith.gateway import errors
from tunesmith.gateway.faults import describe_error

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiohttp.streams import StreamReader

    from tunesmith.gateway.limits import Limits

LOG = logging.getLogger(__name__)

MAX_AHEAD_BYTES = 64 * 1024
"""Bytes of further requests that a client may send before the current one is answered; with more, the connection closes
after the answer."""
_READ_BYTES = 32 * 1024
_LINGERING_SECONDS = 5.0
_SWEEP_SECONDS = 1.0
_IPV6_PREFIX_LENGTH = 64
"""Prefix length of the IPv6 network that counts as one client."""


def client_network(peer: object) -> str:
    """Return the client address that connections are counted by: an IPv4 address, or the /64 of an IPv6 one."""
    host = str(peer[0]) if isinstance(peer, tuple) and peer else ""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, _IPV6_PREFIX_LENGTH), strict=False))


class Connection(RequestHandler):
    """One connection of a client."""

    __slots__ = ("_ahead", "_clients", "body", "header_started", "network", "served", "waiting_since", "working")

    def __init__(self, clients: ClientServer, **settings: Any) -> None:  # noqa: ANN401 - aiohttp's
        super().__init__(clients, **settings)
        self._clients = clients
        self._ahead = 0
        self.network = ""
        self.waiting_since = 0.0
        """Time since which the connection waits for a request."""
        self.header_started = False
        self.served = False
        self.working = False
        self.body: StreamReader | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Serve the connection, or refuse it if there are too many."""
        self.waiting_since = self._clients.now()
        self.network = client_network(transport.get_extra_info("peername"))
        if not self._clients.admit(self):
            transport.write(_TOO_MANY_CONNECTIONS)  # type: ignore[attr-defined]
            transport.close()
            return
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Forget the connection."""
        self._clients.forget(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse received bytes. Those that arrive before the answer are bounded, since they have to be buffered."""
        if self.working:
            if self.body is not None and self.body.is_eof():
                self._ahead += len(data)
                if self._ahead > MAX_AHEAD_BYTES:
                    self.close()
                    return
        elif data and not self.header_started:
            self.header_started, self.waiting_since = True, self._clients.now()
        super().data_received(data)

    def begin(self, request: web.BaseRequest) -> None:
        """Record that a request begins."""
        self.working, self.served, self.body, self._ahead = True, True, request.content, 0

    def finish(self) -> None:
        """Record that the request's answer is complete, or all of it is in the send buffers."""
        self.working, self.header_started, self.body = False, False, None
        self.waiting_since = self._clients.now()

    def overdue(self, now: float, limits: Limits) -> bool:
        """Return True if the connection waited too long for a request."""
        if self.working:
            return False
        first_or_partial = self.header_started or not self.served
        return now - self.waiting_since > (limits.header_seconds if first_or_partial else limits.idle_seconds)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 - it repeats what was sent
    ) -> web.StreamResponse:
        """Answer malformed requests and internal faults in OpenAI's schema, without repeating the request."""
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            LOG.error("the answer to a request failed: %s", describe_error(exc))
            error = errors.internal()
        else:
            LOG.debug("a request is not valid HTTP: %s", type(exc).__name__)
            self._clients.malformed()
            error = _parse_error(exc)
        if request.writer.output_size > 0:
            raise ConnectionError("a part of another answer was sent already")
        response = error_response(error, secrets.token_hex(8))
        response.force_close()
        return response

    def log_exception(self, *_: Any, **named: Any) -> None:  # noqa: ANN401 - as aiohttp calls it
        """Log the type and the location of a fault, without its text, which may contain the client's data."""
        LOG.error("a connection failed: %s", describe_error(named.get("exc_info")))


def _parse_error(error: BaseException | None) -> errors.ApiError:
    """Return the answer to a request that aiohttp's parser refused."""
    if isinstance(error, LineTooLong):
        return errors.header_too_large()
    if isinstance(error, ContentEncodingError):
        unknown = any(name in error.message for name in ("(br)", "(zstd)"))  # their libraries are not installed
        return errors.unsupported_encoding() if unknown else errors.body_unreadable()
    return errors.malformed_request()


class ClientServer(web.Server):
    """The server of the clients' port.

    Args:
        handler: answers one request.
        limits: bounds on connections and timeouts.
        now: monotonic seconds.
        malformed: called for each request that is not HTTP.
        request_factory: makes the request objects.
    """

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        limits: Limits,
        *,
        now: Callable[[], float],
        malformed: Callable[[], None],
        request_factory: Callable[..., web.BaseRequest],
    ) -> None:
        super().__init__(self._handle, request_factory=request_factory, handler_cancellation=True)
        self._handler = handler
        self._limits = limits
        self._open: dict[Connection, None] = {}
        self._by_network: Counter[str] = Counter()
        self.now = now
        self.malformed = malformed

    def __call__(self) -> Connection:
        """Return the protocol of a new connection."""
        return Connection(
            self,
            loop=self._loop,
            access_log=None,
            keepalive_timeout=self._limits.idle_seconds + 2 * _SWEEP_SECONDS,
            read_bufsize=_READ_BYTES,
            lingering_time=_LINGERING_SECONDS,
        )

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = cast("Connection", request.protocol)
        connection.begin(request)
        try:
            return await self._handler(request)
        finally:
            connection.finish()

    def admit(self, connection: Connection) -> bool:
        """Return True if the connection is accepted. An idle one is closed to make room for a new one."""
        if self._by_network[connection.network] >= self._limits.max_connections_per_address:
            idle = next(
                (other for other in self._open if not other.working and other.network == connection.network), None
            )
        elif len(self._open) >= self._limits.max_connections:
            idle = next((other for other in self._open if not other.working), None)
        else:
            idle = connection
        if idle is None:
            return False
        if idle is not connection:
            self.forget(idle)
            idle.force_close()
        self._open[connection] = None
        self._by_network[connection.network] += 1
        return True

    def forget(self, connection: Connection) -> None:
        """Stop counting a connection."""
        if connection not in self._open:
            return
        del self._open[connection]
        self._by_network[connection.network] -= 1
        if not self._by_network[connection.network]:
            del self._by_network[connection.network]

    async def sweep(self) -> None:
        """Close connections that wait too long for a request, until cancelled."""
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            now = self.now()
            for connection in [other for other in self._open if other.overdue(now, self._limits)]:
                connection.force_close()


def error_response(error: errors.ApiError, request_id: str, body: bytes | None = None) -> web.Response:
    """Return the response that reports an error; `body` is its body in another schema than OpenAI's."""
    return web.Response(
        status=error.status,
        body=error.body() if body is None else body,
        content_type="application/json",
        headers=error.headers | {"X-Request-Id": request_id},
    )


def _too_many_connections() -> bytes:
    error = errors.too_many_connections()
    body = error.body()
    head = (
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nRetry-After: {error.headers['Retry-After']}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


_TOO_MANY_CONNECTIONS = _too_many_connections()
