"""Addresses to which a job may connect."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from tunesmith.contracts.addresses import parse_networks, refused_kind

POD, CLOUD, CLUSTER = "of the pod itself", "a link-local or cloud metadata address", "of a private network"
REFUSED = {
    "127.0.0.1": POD,
    "127.255.255.254": POD,
    "0.0.0.0": POD,  # noqa: S104 - connecting to it is connecting to this machine
    "::1": POD,
    "::": POD,
    "169.254.169.254": CLOUD,
    "169.254.170.23": CLOUD,
    "168.63.129.16": CLOUD,
    "fe80::1": CLOUD,
    "0.1.2.3": CLUSTER,
    "10.0.0.7": CLUSTER,
    "172.31.255.255": CLUSTER,
    "192.168.1.1": CLUSTER,
    "100.64.0.1": CLUSTER,
    "100.100.100.200": CLUSTER,
    "192.0.0.192": CLUSTER,
    "198.18.0.1": CLUSTER,
    "240.0.0.1": CLUSTER,
    "255.255.255.255": CLUSTER,
    "fd00:ec2::254": CLUSTER,
    "fc00::1": CLUSTER,
    "fec0::1": CLUSTER,
    "64:ff9b:1::a00:7": CLUSTER,
    "224.0.0.1": "a multicast address",
    "ff02::1": "a multicast address",
    # an IPv6 address that embeds an IPv4 address is treated as that address
    "::ffff:10.0.0.7": CLUSTER,
    "::ffff:169.254.169.254": CLOUD,
    "64:ff9b::127.0.0.1": POD,
    "64:ff9b::a9fe:a9fe": CLOUD,
    "2002:a9fe:a9fe::1": CLOUD,
    "2002:0a00:0007::": CLUSTER,
    "::10.0.0.7": CLUSTER,
    "2001:0:4136:e378:8000:63bf:f5ff:fff8": CLUSTER,  # Teredo of 10.0.0.7
}
PUBLIC = (
    "8.8.8.8",
    "52.216.0.1",
    "172.32.0.1",
    "2600:1f18::1",
    "::ffff:8.8.8.8",
    "64:ff9b::808:808",
    "2002:808:808::1",
)


@pytest.mark.parametrize("address", REFUSED)
def test_special_addresses_are_refused_unless_listed(address: str) -> None:
    kind = refused_kind(ip_address(address), ())
    assert kind is not None
    assert REFUSED[address] in kind


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_allowed(address: str) -> None:
    assert refused_kind(ip_address(address), ()) is None


@pytest.mark.parametrize(
    ("listed", "address", "reached"),
    [
        ("10.0.0.7/32", "10.0.0.7", True),
        ("10.0.0.7/32", "10.0.0.8", False),
        ("10.0.0.7/32", "::ffff:10.0.0.7", True),
        ("10.0.0.7/32", "64:ff9b::a00:7", True),
        ("64:ff9b::/96", "64:ff9b::a00:7", True),
        ("fd00::/8, 10.0.0.0/8", "fd00::7", True),
        ("fd00::/8", "fc00::7", False),
        ("127.0.0.0/8", "127.1.2.3", True),
        ("127.0.0.0/8", "::1", False),
        ("169.254.169.254/32", "169.254.169.254", True),
    ],
)
def test_listed_networks_are_allowed(listed: str, address: str, *, reached: bool) -> None:
    assert (refused_kind(ip_address(address), parse_networks(listed)) is None) is reached


@pytest.mark.parametrize("text", ["s3.store.svc", "10.0.0.7/8", "10.0.0.0/33", "10.0.0.0-10.0.0.9"])
def test_an_invalid_network_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=f"'{text}' is not a network such as"):
        parse_networks(f"10.96.0.0/16,{text}")


def test_an_empty_list_has_no_networks() -> None:
    assert parse_networks("") == ()
