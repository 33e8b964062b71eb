"""Roll-back of a pool whose new spec fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tunesmith.api.servingpool import PoolRollback
from tunesmith.serving.resolve import Unresolved, candidates, choose_pool
from tunesmith.serving.rollback import effective_pool, is_rolled_back, next_rollback
from tunesmith.serving.rolling import Cause, Rollout

if TYPE_CHECKING:
    from tunesmith.api.adapterdeployment import AdapterDeployment
    from tunesmith.api.servingpool import ServingPool

Build = Callable[..., Any]
SERVES = Rollout("team/small", serves=True, cause=Cause.SPEC)
CHANGED = Rollout("team/small", change=Cause.SPEC, serves=True)
FAILING = Rollout(
    "team/small",
    serves=True,
    outdated=frozenset({"old"}),
    cause=Cause.SPEC,
    unfinished=True,
    failure="pod new: stopped",
)
FAILED = replace(FAILING, has_failed=True)
OF_THE_INSTALLATION = Rollout(
    "team/small", serves=True, cause=Cause.INSTALLATION, unfinished=True, failure="pod new: stopped", has_failed=True
)


def with_status(pool: ServingPool, rollback: PoolRollback | None) -> ServingPool:
    return pool.model_copy(update={"status": pool.status.model_copy(update={"rollback": rollback})})


@pytest.fixture
def spec(pool: Build) -> Callable[..., ServingPool]:
    def build(rollback: PoolRollback | None = None, **fields: object) -> ServingPool:
        return with_status(pool(rollingUpdate={"onFailure": "RollBack"}, **fields), rollback)

    return build


def test_the_last_spec_with_which_all_pods_served_is_applied_again(spec: Build) -> None:
    good = next_rollback(spec(drainSeconds=5), SERVES)
    assert good is not None
    bad = spec(good, drainSeconds=7, replicas=4)
    for rollout in (CHANGED, FAILING):
        assert next_rollback(bad, rollout) == good
    failed = next_rollback(bad, FAILED)
    assert failed is not None
    assert failed.reason == "pod new: stopped"
    effective = effective_pool(with_status(bad, failed), failed)
    assert (effective.spec.drain_seconds, effective.spec.replicas) == (5, 4), "the number of pods is the current one"
    assert effective.spec.base_model == bad.spec.base_model
    assert next_rollback(with_status(bad, failed), SERVES) == failed, "the rejected spec is not tried again"


def test_a_changed_spec_is_tried(spec: Build) -> None:
    good = next_rollback(spec(drainSeconds=5), SERVES)
    failed = next_rollback(spec(good, drainSeconds=7), FAILED)
    fixed = spec(failed, drainSeconds=8)
    assert not is_rolled_back(fixed, failed)
    assert effective_pool(fixed, failed) is fixed
    assert next_rollback(fixed, CHANGED) == good
    assert next_rollback(fixed, SERVES) == next_rollback(spec(drainSeconds=8), SERVES)


def test_nothing_is_rolled_back_without_a_good_spec(spec: Build) -> None:
    assert next_rollback(spec(), FAILED) is None


def test_a_failed_update_of_the_installation_is_not_rolled_back(spec: Build) -> None:
    good = next_rollback(spec(drainSeconds=5), SERVES)
    assert next_rollback(spec(good, drainSeconds=7), OF_THE_INSTALLATION) == good


def test_a_pod_that_fails_with_the_good_spec_is_not_a_roll_back(spec: Build) -> None:
    good = next_rollback(spec(drainSeconds=5), SERVES)
    assert next_rollback(spec(good, drainSeconds=5), FAILED) == good


def test_without_the_option_nothing_is_recorded(pool: Build) -> None:
    assert next_rollback(pool(), SERVES) is None
    good = PoolRollback(good_spec="{}", rejected_spec="0", reason="x")
    assert effective_pool(pool(), good).spec == pool().spec


@pytest.mark.parametrize("text", ["", "{", "[]", '{"engine": {"maxLoras": -1}}', '{"removed": 1}', "[" * 100_000])
def test_an_unreadable_record_is_ignored(spec: Build, text: str) -> None:
    good = next_rollback(spec(drainSeconds=5), SERVES)
    failed = next_rollback(spec(good, drainSeconds=7), FAILED)
    assert failed is not None
    broken = failed.model_copy(update={"good_spec": text})
    declared = spec(broken, drainSeconds=7)
    assert effective_pool(declared, broken).spec.drain_seconds == 7


def test_a_rolled_back_pool_accepts_the_ranks_of_the_spec_that_its_pods_have(
    spec: Callable[..., ServingPool], adapter: Callable[..., AdapterDeployment]
) -> None:
    good = next_rollback(spec(engine={"maxLoraRank": 16}), SERVES)
    bad = spec(good, engine={"maxLoraRank": 64})
    serving = adapter(pool={"name": bad.metadata.name})

    def chosen(pool: ServingPool, rank: int) -> ServingPool | Unresolved:
        return choose_pool(serving, "sha256:f", candidates(serving, "sha256:f", [pool], ()), rank)

    assert chosen(bad, 64) is bad, "not rolled back"
    rolled_back = with_status(bad, next_rollback(bad, FAILED))
    assert chosen(rolled_back, 16) is rolled_back
    refused = chosen(rolled_back, 32)
    assert isinstance(refused, Unresolved)
    assert refused.message == (
        "the adapter has rank 32, and ServingPool team/base, whose spec was rolled back, loads ranks up to 16: fix the "
        "pool's spec, which allows 64"
    )
