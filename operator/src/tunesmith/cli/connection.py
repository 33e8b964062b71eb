"""Connection of commands to the cluster, and the installation in it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from tunesmith.cluster.errors import ForbiddenError
from tunesmith.contracts.installation import CONFIG_MAP_NAME, DEFAULT_NAMESPACE, InstallationInfo, parse_installation

if TYPE_CHECKING:
    from tunesmith.cluster.client import Cluster

NAMESPACE_VARIABLE = "TUNESMITH_GATEWAY_NAMESPACE"
"""Environment variable with the installation's namespace if it is not the default one."""


async def connect() -> Cluster:
    """Return a client for the cluster of $KUBECONFIG and $KUBECONTEXT.

    Raises:
        ConfigurationError: no cluster is configured.
    """
    # Imported lazily: its libraries take a second to import, for which other commands should not wait.
    from tunesmith.cluster.client import Cluster  # noqa: PLC0415

    return await Cluster.connect()


async def read_installation(cluster: Cluster) -> InstallationInfo:
    """Return the published facts of the installation; without values if it is not found or may not be read."""
    namespace = os.environ.get(NAMESPACE_VARIABLE) or DEFAULT_NAMESPACE
    try:
        found = await cluster.find("ConfigMap", CONFIG_MAP_NAME, namespace)
    except ForbiddenError:
        return InstallationInfo()
    return parse_installation(found or {})
