"""Guard of a process's connections: refuses addresses that the pods of jobs and pools must not reach.

It checks the address of each connection, after name resolution and at every redirect, whatever library connects: an
audit hook runs before each `connect` of a Python socket, and its exception prevents the connection. It does not see
connections made without Python's sockets: those between ranks (gloo, NCCL, torch's store), which are allowed;
`NATIVE_CLIENTS`, which are disabled; and separate programs, for which `check_server` checks beforehand.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from tunesmith.contracts.addresses import parse_networks, refused_kind
from tunesmith.contracts.environment import ALLOWED_ADDRESSES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tunesmith.contracts.addresses import IPNetwork

NATIVE_CLIENTS = {
    "HF_HUB_DISABLE_XET": "1",  # Rust
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # gRPC's C core, for zonal buckets
}
"""Variables that make libraries use Python's sockets instead of native clients."""


class AddressRefusedError(PermissionError):
    """A connection to a refused address. An OSError, because libraries expect one from sockets.

    Args:
        explanation: the address, its kind and the fix.
    """

    def __init__(self, explanation: str) -> None:
        # Constant: for a name with several addresses some libraries keep a single exception only if all are equal.
        super().__init__("connection to a refused address")
        self.explanation = explanation


class _Guard:
    """Audit hook. A process has a single one, since hooks cannot be removed."""

    def __init__(self) -> None:
        self.allowed: tuple[IPNetwork, ...] | None = None
        """Networks that are allowed besides public addresses; None: every connection is allowed."""
        self.installed = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != "socket.connect" or self.allowed is None or _between_ranks.get():
            return
        connecting, address = arguments
        if connecting.family not in {socket.AF_INET, socket.AF_INET6}:
            return
        self.refuse(str(address[0]))

    def refuse(self, host: str) -> None:
        """Raise AddressRefusedError if a connection to this address, given as text, is not allowed."""
        if self.allowed is None:
            return
        try:
            plain = ipaddress.ip_address(host.partition("%")[0])
        except ValueError:  # a name, which would be resolved after this check
            raise AddressRefusedError(f"{host}, a host name, which cannot be checked; use an address") from None
        kind = refused_kind(plain, self.allowed)
        if kind is not None:
            raise AddressRefusedError(
                f"{host}, {kind}, which jobs and pools may not reach: correct the address, or "
                "ask the platform's administrators to add it to the chart's value trainer.allowedAddresses"
            )


_guard = _Guard()
_between_ranks: ContextVar[bool] = ContextVar("between_ranks", default=False)


@contextmanager
def guarded(environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Keep every thread of this process from connecting to a refused address while the block runs.

    Args:
        environ: environment with the networks that the platform allows.

    Raises:
        ValueError: the platform's list is malformed.
    """
    try:
        allowed = parse_networks(environ.get(ALLOWED_ADDRESSES, ""))
    except ValueError as error:
        raise ValueError(f"{ALLOWED_ADDRESSES} of this pod: {error}") from None
    os.environ.update(NATIVE_CLIENTS)
    if not _guard.installed:
        sys.addaudithook(_guard)
        _guard.installed = True
    before, _guard.allowed = _guard.allowed, allowed
    try:
        yield
    finally:
        _guard.allowed = before


@contextmanager
def between_ranks() -> Iterator[None]:
    """Allow the block's connections: they go to other pods of this job, whose addresses no manifest names."""
    token = _between_ranks.set(True)
    try:
        yield
    finally:
        _between_ranks.reset(token)


def check_server(url: str) -> None:
    """Check the addresses to which a server's or its proxy's name resolves now; do nothing if no guard is active.

    For clients that do not use Python's sockets. Redirects and later changes of the name are not checked.

    Raises:
        AddressRefusedError: a connection to one of the addresses is not allowed.
        OSError: the name cannot be resolved.
    """
    if _guard.allowed is None:
        return
    parts = urlsplit(url)
    proxy = getproxies().get(parts.scheme)
    if proxy and not proxy_bypass(parts.hostname or ""):
        parts = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    for *_, address in socket.getaddrinfo(parts.hostname, None, type=socket.SOCK_STREAM):
        _guard.refuse(str(address[0]))


def refused_connection(error: BaseException) -> AddressRefusedError | None:
    """Return the refused connection among the causes of an error of any library; None if there is none."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        if isinstance(current, AddressRefusedError):
            return current
        seen.add(id(current))
        pending += [current.__cause__, current.__context__]
    return None
