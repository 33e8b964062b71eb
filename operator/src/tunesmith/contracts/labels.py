"""Labels of a pool's pods, by which the operator and the gateways find them."""

from __future__ import annotations

POOL_LABEL = "tunesmith.dev/pool"
"""Name of the pod's ServingPool, which is in the same namespace."""
POOL_UID_LABEL = "tunesmith.dev/pool-uid"
"""UID of that ServingPool: pods of a deleted pool of the same name do not count."""
