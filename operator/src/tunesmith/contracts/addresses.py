"""Addresses that the pods of jobs and pools may connect to: public ones, and those that the platform lists.

All others belong to the machine itself, its cloud or a private network, which clusters use for pods and services.
The ranges are those of IANA's special-purpose registries, as `ipaddress` lists them.
"""

from __future__ import annotations

import ipaddress
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    IPAddress = IPv4Address | IPv6Address
    IPNetwork = IPv4Network | IPv6Network

_NAT64 = IPv6Network("64:ff9b::/96")
_COMPATIBLE = IPv6Network("::/96")
"""IPv4-compatible IPv6 addresses (RFC 4291), with the IPv4 address in the low bits; deprecated."""
_SPECIAL = tuple(
    ipaddress.ip_network(text)
    for text in ("192.0.0.0/24", "192.88.99.0/24", "64:ff9b:1::/48", "100::/64", "5f00::/16", "fec0::/10")
)
"""Ranges that some releases of Python treat as public: protocol assignments, relays, local NAT64, discard-only, SRv6
and site-local addresses."""
_AZURE_HOST = IPv4Address("168.63.129.16")
"""A public address by its number, but the host of every virtual machine on Azure."""


def url_host(address: str) -> str:
    """Return an address as it is written in a URL: IPv6 in brackets."""
    return f"[{address}]" if ":" in address else address


def parse_networks(text: str) -> tuple[IPNetwork, ...]:
    """Return the networks of a list such as `10.96.0.0/16,fd00::7/128`.

    Raises:
        ValueError: an entry is not a network.
    """
    networks: list[IPNetwork] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            networks.append(ipaddress.ip_network(part))
        except ValueError as error:
            raise ValueError(
                f"{part!r} is not a network such as 10.96.0.0/16, 10.0.0.7/32 or fd00::/8: {error}"
            ) from None
    return tuple(networks)


def refused_kind(address: IPAddress, allowed: Iterable[IPNetwork]) -> str | None:
    """Return the kind of a refused address, such as "a multicast address"; None if the connection is allowed.

    An IPv6 address that embeds an IPv4 address is treated as that address.
    """
    embedded = _embedded_ipv4(address)
    plain = embedded if embedded is not None else address
    kind = _kind(plain)
    if kind is None or any(candidate in network for network in allowed for candidate in (address, plain)):
        return None
    return kind


def _embedded_ipv4(address: IPAddress) -> IPv4Address | None:
    """Return the IPv4 address that receives packets for this IPv6 address; None if it embeds none."""
    if isinstance(address, IPv4Address):
        return None
    if address in _NAT64 or (address in _COMPATIBLE and not (address.is_loopback or address.is_unspecified)):
        return IPv4Address(int(address) & 0xFFFFFFFF)
    teredo = address.teredo
    return address.ipv4_mapped or address.sixtofour or (teredo[1] if teredo is not None else None)


def _kind(address: IPAddress) -> str | None:
    if address.is_loopback or address.is_unspecified:
        return "an address of the pod itself"
    if address.is_link_local or address == _AZURE_HOST:
        return "a link-local or cloud metadata address"
    if address.is_multicast:
        return "a multicast address"
    public = address.is_global and not any(address in network for network in _SPECIAL)
    return None if public else "an address of a private network"
