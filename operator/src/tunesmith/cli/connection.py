"""The cluster that commands talk to."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tunesmith.cluster.client import Cluster


async def connect() -> Cluster:
    """The cluster of $KUBECONFIG and $KUBECONTEXT.

    Raises:
        ConfigurationError: there is none.
    """
    # Kubernetes' client takes a second to import; commands without a cluster should not wait for it.
    from tunesmith.cluster.client import Cluster  # noqa: PLC0415

    return await Cluster.connect()
