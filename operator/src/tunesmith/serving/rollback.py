"""Roll-back of a pool to the last spec with which all of its pods served. Its status records that spec."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tunesmith.api.servingpool import PoolRollback, ServingPoolSpec
from tunesmith.contracts.sentence import one_line
from tunesmith.serving.rolling import FIELDS_WITHOUT_EFFECT, Cause, spec_digest

if TYPE_CHECKING:
    from tunesmith.api.servingpool import ServingPool
    from tunesmith.serving.rolling import Rollout

_MAX_SPEC = 2**18
_CURRENT = {*FIELDS_WITHOUT_EFFECT, "base_model", "model_name"}
"""Fields that are never rolled back."""


def is_rolled_back(pool: ServingPool, rollback: PoolRollback | None) -> bool:
    """Return True if the spec of a pool failed, so that its pods have the last good one."""
    return effective_pool(pool, rollback) is not pool


def effective_pool(pool: ServingPool, rollback: PoolRollback | None) -> ServingPool:
    """Return the pool with the spec that its pods should have: its own, or the last good one after a roll-back."""
    if (
        rollback is None
        or pool.spec.rolling_update.on_failure != "RollBack"
        or rollback.rejected_spec != spec_digest(pool)
    ):
        return pool
    return _good_pool(pool, rollback) or pool


def next_rollback(pool: ServingPool, rollout: Rollout) -> PoolRollback | None:
    """Return what the status should record; None without `rollingUpdate.onFailure: RollBack`.

    Args:
        pool: the ServingPool with its own spec.
        rollout: observed rollout of the effective spec.
    """
    old = pool.status.rollback
    if pool.spec.rolling_update.on_failure != "RollBack":
        return None
    if is_rolled_back(pool, old):
        return old
    good = PoolRollback(good_spec=old.good_spec) if old is not None else None
    if rollout.change is not None:
        return good
    # A change of the installation is not rolled back: its failure stops the update of the other pools.
    if good is not None and rollout.has_failed and rollout.cause is not Cause.INSTALLATION:
        failed, good_pool = spec_digest(pool), _good_pool(pool, good)
        if good_pool is None or spec_digest(good_pool) == failed:
            return good
        reason = one_line(rollout.failure or "", 1024)
        return PoolRollback(good_spec=good.good_spec, rejected_spec=failed, reason=reason)
    if rollout.serves and not rollout.unfinished and rollout.failure is None:
        text = json.dumps(pool.spec.model_dump(mode="json", by_alias=True, exclude_none=True, exclude=_CURRENT))
        return PoolRollback(good_spec=text) if len(text) <= _MAX_SPEC else None
    return good


def _good_pool(pool: ServingPool, rollback: PoolRollback) -> ServingPool | None:
    """Return the pool with the recorded spec, but the current fields that have no effect on pods.

    None if the recorded spec is no longer valid.
    """
    current = pool.spec.model_dump(mode="json", by_alias=True, exclude_none=True, include=_CURRENT)
    try:
        spec = ServingPoolSpec.model_validate({**json.loads(rollback.good_spec), **current})
    except (ValueError, RecursionError, TypeError):
        return None
    return pool.model_copy(update={"spec": spec})
