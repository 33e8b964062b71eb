"""The guard of this process's connections: they go to no address that a job may not reach.

It looks at the address that is really connected to, after names are resolved and at every redirect, whatever library
connects: an audit hook sees each `connect` of a Python socket, and its exception prevents it. What it does not see is
what connects without Python's sockets: the ranks among each other (gloo, NCCL, torch's store), which is as it should
be; `NATIVE_CLIENTS`, which are switched off; and the program of Weights & Biases, before which `check_server` looks.
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

from tunesmith.contracts.addresses import ALLOWED_ADDRESSES, parse_networks, refused
from tunesmith_trainer.errors import AccessDeniedError, InvalidSpecError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tunesmith.contracts.addresses import Network

NATIVE_CLIENTS = {
    "HF_HUB_DISABLE_XET": "1",  # Rust
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # gRPC's C core, for zonal buckets
}
"""Variables that have libraries use Python's sockets instead of their own."""


class AddressRefusedError(PermissionError):
    """A connection to an address that a job may not reach; an OSError, as those of sockets that libraries expect.

    Args:
        told: which, what it is and what to do.
    """

    def __init__(self, told: str) -> None:
        # Always the same: of a name with several addresses some libraries keep one exception only if all say the same.
        super().__init__("jobs may not reach this address")
        self.told = told


class _Guard:
    """The audit hook. One for the process, as none can be removed."""

    def __init__(self) -> None:
        self.allowed: tuple[Network, ...] | None = None
        """None: everything."""
        self.installed = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != "socket.connect" or self.allowed is None or _between_ranks.get():
            return
        connecting, address = arguments
        if connecting.family not in {socket.AF_INET, socket.AF_INET6}:
            return
        self.refuse(str(address[0]))

    def refuse(self, host: str) -> None:
        """Raises AddressRefusedError where a connection to this address, a text, must not be made."""
        if self.allowed is None:
            return
        try:
            plain = ipaddress.ip_address(host.partition("%")[0])
        except ValueError:  # it would be resolved after this look at it
            raise AddressRefusedError(f"{host}, a name, where only an address can be checked") from None
        kind = refused(plain, self.allowed)
        if kind is not None:
            raise AddressRefusedError(
                f"{host}, {kind}, which jobs may not reach: ask the platform to list it in the chart's value"
                " trainer.allowedAddresses, or use another server"
            )


_guard = _Guard()
_between_ranks: ContextVar[bool] = ContextVar("between_ranks", default=False)


@contextmanager
def guarded(environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """No thread of this process connects to a refused address while the block runs.

    Args:
        environ: has what the platform allows.

    Raises:
        InvalidSpecError: the platform's list cannot be read.
    """
    try:
        allowed = parse_networks(environ.get(ALLOWED_ADDRESSES, ""))
    except ValueError as error:
        raise InvalidSpecError(f"{ALLOWED_ADDRESSES} of this pod: {error}") from None
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
    """The connections of the block are to other pods of this job, whose address no manifest names."""
    token = _between_ranks.set(True)
    try:
        yield
    finally:
        _between_ranks.reset(token)


def check_server(url: str) -> None:
    """Looks at what the name of a server, or of the proxy to it, stands for now; where nothing is guarded it does not.

    It is for a client that does not use Python's sockets. Where that is then led by a redirect, or by a name that has
    changed, is not seen.

    Raises:
        AddressRefusedError: one of its addresses must not be connected to.
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


def denied(error: BaseException, what: str) -> AccessDeniedError | None:
    """The failure of what was refused a connection; None where an error has another cause.

    Args:
        error: of any library; they wrap what their sockets raise.
        what: would have been read or written.
    """
    seen: set[int] = set()
    behind: list[BaseException | None] = [error]
    while behind:
        one = behind.pop()
        if one is None or id(one) in seen:
            continue
        if isinstance(one, AddressRefusedError):
            return AccessDeniedError(f"{what} leads to {one.told}")
        seen.add(id(one))
        behind += [one.__cause__, one.__context__]
    return None
