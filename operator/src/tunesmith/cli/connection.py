"""The cluster that commands talk to, and the installation in it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from tunesmith.cluster.errors import ForbiddenError
from tunesmith.contracts.installation import NAME, NAMESPACE, Installation, parse_installation

if TYPE_CHECKING:
    from tunesmith.cluster.client import Cluster

NAMESPACE_VARIABLE = "TUNESMITH_GATEWAY_NAMESPACE"
"""Names the installation's namespace where it is not the usual one."""


async def connect() -> Cluster:
    """The cluster of $KUBECONFIG and $KUBECONTEXT.

    Raises:
        ConfigurationError: there is none.
    """
    # Kubernetes' client takes a second to import; commands without a cluster should not wait for it.
    from tunesmith.cluster.client import Cluster  # noqa: PLC0415

    return await Cluster.connect()


async def read_installation(cluster: Cluster) -> Installation:
    """Return what the installation tells its users; nothing where it is not found or may not be read."""
    namespace = os.environ.get(NAMESPACE_VARIABLE) or NAMESPACE
    try:
        found = await cluster.find("ConfigMap", NAME, namespace)
    except ForbiddenError:
        return Installation()
    return parse_installation(found or {})
