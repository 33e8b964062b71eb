"""The ConfigMap by which users find an installation: written by the chart, read by the CLI. It holds no secret."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

NAMESPACE = "tunesmith-system"
"""Namespace of the installation unless it is configured otherwise."""
NAME = "tunesmith-installation"


class Installation(NamedTuple):
    """What users may know about an installation."""

    url: str = ""
    """Address of the gateway without /v1; empty: unknown."""
    shared_pool_namespaces: tuple[str, ...] = ()
    """Namespaces whose pools every namespace may be allowed to use."""


def parse_installation(config_map: Mapping[str, Any]) -> Installation:
    """Return what the ConfigMap holds; a missing entry is empty."""
    data = config_map.get("data") or {}
    namespaces = str(data.get("sharedPoolNamespaces") or "").split(",")
    return Installation(str(data.get("url") or ""), tuple(name for name in namespaces if name))
