"""The gateway's process: construction, start and shutdown of its parts."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from typing import TYPE_CHECKING, Self

import aiohttp
from aiohttp import web

from tunesmith.gateway.access_log import write_record
from tunesmith.gateway.backends import BackendTable
from tunesmith.gateway.catalog import Catalog
from tunesmith.gateway.connections import ClientServer
from tunesmith.gateway.cors import Cors
from tunesmith.gateway.crashes import CrashTable
from tunesmith.gateway.demand import Demand
from tunesmith.gateway.feed import Feed
from tunesmith.gateway.internal import internal_app
from tunesmith.gateway.keys import KeyTable
from tunesmith.gateway.metrics import Metrics
from tunesmith.gateway.proxy import Proxy
from tunesmith.gateway.quotas import Quotas
from tunesmith.gateway.windows import LocalCounters

if TYPE_CHECKING:
    from collections.abc import Callable

    from tunesmith.contracts.agent import Keys
    from tunesmith.gateway.feed import Watcher
    from tunesmith.gateway.oidc import TokenVerifier
    from tunesmith.gateway.settings import GatewaySettings
    from tunesmith.gateway.shared_counters import SharedCounters
    from tunesmith.gateway.tracing import Tracing

LOG = logging.getLogger(__name__)

_IDLE_SECONDS = 3.0
"""Time after which idle connections to engines close: vLLM closes them after 5 s, and a request could fail then."""
_CONNECT_SECONDS = 2.0
_INTERNAL_SHUTDOWN_SECONDS = 0.2
_BACKLOG = 1024
_SHUTDOWN_SECONDS = 1.0
_CLIENT_BUFFER = 128 * 1024
"""Bytes of each kernel buffer of a client's connection; they count towards the container's memory."""
_ENGINE_BUFFER = 32 * 1024
"""Bytes of the kernel's receive buffer of a connection to an engine. Data that is read from it is buffered until the
client has read it."""
_READ_BYTES = 16 * 1024


class TaskStoppedError(Exception):
    """A task of the gateway stopped that must run as long as the process."""


class Gateway:
    """A running gateway: `async with Gateway(settings, keys, cluster) as gateway`.

    Args:
        settings: with the limits that depend on the container's memory.
        gateway_keys: returns the gateway's keys, from which all its tokens are derived.
        watcher: the API server.
    """

    def __init__(self, settings: GatewaySettings, gateway_keys: Callable[[], Keys], watcher: Watcher) -> None:
        self._settings = settings
        loop = asyncio.get_running_loop()
        # Connections are unlimited, since the pods limit the load. Pods' answers are never compressed.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_SECONDS, socket_factory=_engine_socket),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("Accept-Encoding", "User-Agent"),
            read_bufsize=_READ_BYTES,
        )
        self.demand = Demand()
        self.keys = KeyTable()
        self.catalog = Catalog(settings.shared_namespaces)
        self.metrics = Metrics(self.demand, self.catalog.exists)
        self.crashes = CrashTable(time.time)
        self.backends = BackendTable(
            self._session,
            gateway_keys,
            self.crashes,
            clock=loop.time,
            engine_port=settings.engine_port,
            agent_port=settings.agent_port,
        )
        self.feed = Feed(
            watcher,
            settings.namespace,
            settings.watch_namespaces,
            keys=self.keys,
            catalog=self.catalog,
            changed=lambda: self.backends.sync(self.catalog.pods()),
        )
        self._tokens: TokenVerifier | None = None
        oidc = settings.oidc()
        if oidc is not None:
            from tunesmith.gateway.oidc import TokenVerifier  # noqa: PLC0415 - 9 MB if it is used

            self._tokens = TokenVerifier(oidc, self._session, clock=loop.time, wall_clock=time.time)
        counters = LocalCounters(time.time)
        self._shared: SharedCounters | None = None
        if settings.redis_url_file is not None:
            from tunesmith.gateway.shared_counters import SharedCounters, url_in  # noqa: PLC0415 - 15 MB if it is used

            self._shared = SharedCounters(
                url_in(settings.redis_url_file),
                settings.redis_ca_file,
                settings.redis_timeout_seconds,
                counters,
                self.metrics.limits_are_shared,
            )
        self._tracing = _tracing(settings)
        self.proxy = Proxy(
            session=self._session,
            gateway_keys=gateway_keys,
            keys=self.keys,
            tokens=self._tokens,
            catalog=self.catalog,
            backends=self.backends,
            crashes=self.crashes,
            demand=self.demand,
            metrics=self.metrics,
            limits=settings,
            cors=Cors(settings.cors_origins),
            replicas=settings.replicas,
            quotas=Quotas(settings.replicas, counters, self._shared),
            record=write_record if settings.access_log else None,
            tracing=self._tracing,
            clock=loop.time,
            synced=self.feed.synced,
            not_ready=self._not_ready,
        )
        self._server = ClientServer(
            self.proxy.handle,
            settings,
            now=loop.time,
            malformed=self.metrics.malformed,
            request_factory=self._request,
        )
        self._clients = web.ServerRunner(self._server, shutdown_timeout=_SHUTDOWN_SECONDS)
        self._internal = web.AppRunner(
            internal_app(
                self.demand,
                self.metrics,
                gateway_keys,
                self._not_ready,
                require_token=settings.require_metrics_token,
            ),
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=_INTERNAL_SHUTDOWN_SECONDS,
        )
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        await self._clients.setup()
        await self._internal.setup()
        settings = self._settings
        await web.TCPSite(self._internal, settings.host or None, settings.internal_port).start()
        await web.SockSite(
            self._clients, _listening_socket(settings.host or None, settings.port), backlog=_BACKLOG
        ).start()
        self._tasks = [
            asyncio.create_task(self.feed.run(), name="watches"),
            asyncio.create_task(self._server.sweep(), name="connections"),
        ]
        if self._tokens is not None:
            self._tasks.append(asyncio.create_task(self._tokens.run(), name="keys of the issuer"))
        if self._shared is not None:
            self._tasks.append(asyncio.create_task(self._shared.run(), name="shared limits"))
        return self

    async def __aexit__(self, *_: object) -> None:
        # The order matters: running requests still need the pods' states, the operator still needs the demand.
        for site in list(self._clients.sites):
            await site.stop()
        self._server.pre_shutdown()
        await self.proxy.drain(self._settings.drain_seconds)
        await self._clients.cleanup()
        await self._internal.cleanup()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.backends.close()
        await self._session.close()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)

    @property
    def port(self) -> int:
        """Port for clients; the actual one if the system chose it."""
        return int(self._clients.addresses[0][1])

    @property
    def internal_port(self) -> int:
        """Internal port; the actual one if the system chose it."""
        return int(self._internal.addresses[0][1])

    async def run_until(self, stop: asyncio.Event) -> None:
        """Wait for `stop`.

        Raises:
            TaskStoppedError: a permanent task stopped. The process must exit: without the watches, for example, deleted
                keys stay valid.
        """
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({stopped, *self._tasks}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
        for task in self._tasks:
            if task.done():
                error = None if task.cancelled() else task.exception()
                raise TaskStoppedError(f"the task `{task.get_name()}` stopped: {error!r}") from error

    async def linger(self) -> None:
        """Fail the readiness probe and keep serving until load balancers send no new connections."""
        self.proxy.closing = True
        await asyncio.sleep(self._settings.linger_seconds)

    def _not_ready(self) -> str | None:
        if self.proxy.closing:
            return "the gateway is shutting down"
        return self.feed.problem()

    def _request(
        self,
        message: object,
        payload: object,
        protocol: object,
        writer: object,
        task: asyncio.Task[None],
    ) -> web.BaseRequest:
        return web.BaseRequest(
            message,  # type: ignore[arg-type]
            payload,  # type: ignore[arg-type]
            protocol,  # type: ignore[arg-type]
            writer,  # type: ignore[arg-type]
            task,
            asyncio.get_running_loop(),
        )


def _tracing(settings: GatewaySettings) -> Tracing | None:
    """Return the traces, if they are on. Otherwise OpenTelemetry's modules are not loaded: they take 25 MB."""
    if not settings.tracing_endpoint:
        return None
    from tunesmith.gateway.tracing import Tracing  # noqa: PLC0415 - see above

    return Tracing(
        settings.tracing_endpoint, settings.tracing_sampling_ratio, follow_clients=settings.tracing_follow_clients
    )


def _listening_socket(host: str | None, port: int) -> socket.socket:
    """Return the listening socket for clients, dual-stack if no host is given. Connections inherit its buffer sizes.

    Raises:
        OSError: the port is taken.
    """
    both = host is None and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both or ":" in (host or "") else socket.AF_INET
    listener = socket.create_server((host or "", port), family=family, backlog=_BACKLOG, dualstack_ipv6=both)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _CLIENT_BUFFER)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _CLIENT_BUFFER)
    return listener


def _engine_socket(address: tuple[object, ...]) -> socket.socket:
    """Return a socket that detects within 20 s that the peer's machine is gone: answers may be silent for minutes."""
    family, type_, protocol = address[0], address[1], address[2]
    connection = socket.socket(family, type_, protocol)  # type: ignore[arg-type]
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _ENGINE_BUFFER)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _CLIENT_BUFFER)
    if hasattr(socket, "TCP_KEEPIDLE"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    return connection
