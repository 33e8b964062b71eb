"""Downloads of the pictures, sounds and videos that clients name by URL: from public addresses only.

A URL of a tenant must not make the engine call the cluster's services, its cloud's metadata or other machines of a
private network. The address is checked when the connection is made, so names and redirects cannot change it afterwards.

This module runs inside vLLM's API server, so it uses the standard library, and of vLLM only what its API server has.
"""

from __future__ import annotations

import errno
import importlib
import ipaddress
import socket
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable

    RefusedKind = Callable[[ipaddress.IPv4Address | ipaddress.IPv6Address, tuple[()]], str | None]

ADDRESSES = "tunesmith_addresses"
"""Name under which the agent installs tunesmith.contracts.addresses beside this file."""


class RefusedAddressError(OSError):
    """A URL leads to an address that is not public."""


def guard() -> None:
    """Have vLLM download media from public addresses only, without a proxy. A running event loop is needed."""
    aiohttp: Any = importlib.import_module("aiohttp")
    connection: Any = importlib.import_module("vllm.connections").global_http_connection
    # The client that vLLM would create when it needs the first one.
    connector = aiohttp.TCPConnector(socket_factory=public_socket(importlib.import_module(ADDRESSES).refused_kind))
    connection.reuse_client = True
    connection._async_client = aiohttp.ClientSession(connector=connector)  # noqa: SLF001 - vLLM has no setting for it
    connection.get_sync_client = _refuse


def public_socket(refused_kind: RefusedKind) -> Callable[[tuple[Any, ...]], socket.socket]:
    """Return a maker of sockets for addresses in the format of `socket.getaddrinfo`.

    Args:
        refused_kind: tunesmith.contracts.addresses.refused_kind.
    """

    def make(info: tuple[Any, ...]) -> socket.socket:
        family, type_, protocol, _, address = info
        kind = refused_kind(ipaddress.ip_address(str(address[0]).partition("%")[0]), ())
        if kind is not None:
            reason = f"the URL leads to {kind}: name media at a public address, or send a data: URL"
            raise RefusedAddressError(errno.EACCES, reason)
        return socket.socket(family, type_, protocol)

    return make


def _refuse() -> NoReturn:
    raise RefusedAddressError(errno.EACCES, "media are downloaded by the asynchronous client only")
