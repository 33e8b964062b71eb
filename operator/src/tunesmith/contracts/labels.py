"""Labels by which the operator and the gateways find a pool's pods."""

from __future__ import annotations

POOL_LABEL = "tunesmith.dev/pool"
"""Name of the pod's ServingPool, which is in the same namespace."""
POOL_UID_LABEL = "tunesmith.dev/pool-uid"
"""UID of that ServingPool: excludes the pods of a deleted pool with the same name."""
