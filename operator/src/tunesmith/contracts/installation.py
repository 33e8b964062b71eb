"""ConfigMap that describes an installation to users: written by the chart, read by the CLI, without secrets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT_NAMESPACE = "tunesmith-system"
"""Default namespace of the installation."""
CONFIG_MAP_NAME = "tunesmith-installation"


class InstallationInfo(NamedTuple):
    """Public facts about an installation."""

    url: str = ""
    """Address of the gateway without /v1; empty: unknown."""
    shared_pool_namespaces: tuple[str, ...] = ()
    """Namespaces whose pools any namespace may be allowed to use."""


def parse_installation(config_map: Mapping[str, Any]) -> InstallationInfo:
    """Return the content of the ConfigMap; missing entries are empty."""
    data = config_map.get("data") or {}
    namespaces = str(data.get("sharedPoolNamespaces") or "").split(",")
    return InstallationInfo(str(data.get("url") or ""), tuple(name for name in namespaces if name))
