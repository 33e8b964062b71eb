from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tunesmith.api.method import Method
from tunesmith.api.servingpool import ServingPool
from tunesmith.serving.resolve import Artifact, Unresolved, candidates, choose_pool, resolve_artifact

if TYPE_CHECKING:
    from collections.abc import Callable

    from tunesmith.api.adapterdeployment import AdapterDeployment
    from tunesmith.api.finetunejob import FineTuneJob

DIGEST = "sha256:" + "a" * 64
STAMP = "2026-01-01T00:00:00Z"


def condition(type_: str, reason: str = "Because", message: str = "") -> dict[str, Any]:
    return {"type": type_, "status": "True", "reason": reason, "message": message, "lastTransitionTime": STAMP}


def artifact(*, vllm: bool = True, reason: str | None = None) -> dict[str, Any]:
    return {"uri": "s3://elsewhere/x", "digest": DIGEST, "sizeBytes": 1, "servable": {"vllm": vllm, "reason": reason}}


def test_the_artifact_of_a_complete_job_is_at_the_computed_location(
    adapter: Callable[..., AdapterDeployment], job: Callable[..., FineTuneJob]
) -> None:
    done = job(conditions=[condition("Complete")], artifact=artifact(), resolved={"baseModelFingerprint": "sha256:f"})
    assert resolve_artifact(adapter(), "job", done, "s3://store") == Artifact(
        DIGEST, "s3://store/team/job-uid-job/artifact", "sha256:f", "FineTuneJob job", rank=16
    )


@pytest.mark.parametrize(
    ("status", "reason", "message"),
    [
        pytest.param(
            None,
            "FineTuneJobNotFound",
            "waits for FineTuneJob job, which does not exist in namespace team: create it, or correct spec.adapterFrom",
            id="missing",
        ),
        pytest.param({}, "FineTuneJobRunning", "waits for FineTuneJob job, which is Pending", id="new"),
        pytest.param(
            {"phase": "Running", "progress": {"stage": "Training", "step": 30, "totalSteps": 100}},
            "FineTuneJobRunning",
            "waits for FineTuneJob job, which is Running (Training, step 30 of 100)",
            id="training",
        ),
        pytest.param(
            {"phase": "Validating", "progress": {"stage": "Validating"}},
            "FineTuneJobRunning",
            "waits for FineTuneJob job, which is Validating",
            id="validating",
        ),
        pytest.param(
            {"conditions": [condition("Failed", "DatasetInvalid", "line 3 is not JSON.")]},
            "FineTuneJobFailed",
            "FineTuneJob job failed with DatasetInvalid: line 3 is not JSON; name another one in spec.adapterFrom",
            id="failed",
        ),
        pytest.param(
            {"conditions": [condition("Complete")], "artifact": artifact(vllm=False, reason="rank 1024")},
            "NotServable",
            "the engine cannot load the adapter of FineTuneJob job: rank 1024",
            id="not servable",
        ),
    ],
)
def test_the_reason_for_waiting_is_reported(
    status: dict[str, Any] | None,
    reason: str,
    message: str,
    adapter: Callable[..., AdapterDeployment],
    job: Callable[..., FineTuneJob],
) -> None:
    found = resolve_artifact(adapter(), "job", None if status is None else job(**status), "s3://store")
    assert found == Unresolved(reason, message)


OPEN = {"from": "All"}


def choose(
    adapter: AdapterDeployment, fingerprint: str | None, pools: list[ServingPool], shared: tuple[str, ...] = ()
) -> ServingPool | Unresolved:
    return choose_pool(adapter, fingerprint, candidates(adapter, fingerprint, pools, shared))


@pytest.mark.parametrize(
    ("spec", "fingerprint", "expected"),
    [
        pytest.param({"pool": {"name": "base"}}, "sha256:f", "base", id="named"),
        pytest.param({"pool": {"name": "young"}}, "sha256:f", "young", id="named before it reports a fingerprint"),
        pytest.param(
            {"pool": {"name": "shared", "namespace": "platform"}}, "sha256:s", "shared", id="named in another namespace"
        ),
        pytest.param({"pool": {"name": "nowhere"}}, "sha256:f", "PoolNotFound", id="named and missing"),
        pytest.param(
            {"pool": {"name": "closed", "namespace": "platform"}}, "sha256:f", "PoolNotAllowed", id="named and closed"
        ),
        pytest.param({"pool": {"name": "base"}}, "sha256:other", "BaseModelMismatch", id="named with another base"),
        pytest.param({}, "sha256:f", "base", id="found by its fingerprint"),
        pytest.param({}, "sha256:s", "shared", id="found in a namespace that the platform shares"),
        pytest.param(
            {"pool": {"name": "foreign", "namespace": "other"}}, "sha256:x", "foreign", id="named and foreign"
        ),
        pytest.param({}, "sha256:two", "SeveralPools", id="several"),
        pytest.param({}, "sha256:none", "PoolNotReported", id="none yet"),
    ],
)
def test_choose_pool(
    spec: dict[str, Any],
    fingerprint: str,
    expected: str,
    adapter: Callable[..., AdapterDeployment],
    pool: Callable[..., ServingPool],
) -> None:
    pools = [
        pool("base"),
        pool("young", fingerprint=None),
        pool("shared", namespace="platform", fingerprint="sha256:s", allowedNamespaces=OPEN),
        pool("closed", namespace="platform"),
        pool("foreign", namespace="other", fingerprint="sha256:x", allowedNamespaces=OPEN),
        pool("young-foreign", namespace="other", fingerprint=None, allowedNamespaces=OPEN),
        pool("one", fingerprint="sha256:two"),
        pool("two", fingerprint="sha256:two"),
    ]
    found = choose(adapter(**spec), fingerprint, pools, ("platform",))
    assert (found.reason if isinstance(found, Unresolved) else found.metadata.name) == expected


@pytest.mark.parametrize(
    ("method", "rank"),
    [
        ({"lora": {"rank": 32}}, 32),
        ({"lora": {"rank": 8, "rankPattern": {"q_proj": 128}}}, 128),
        ({"lora": {"rank": 32, "initialization": "PiSSA"}}, 64),
        ({"qlora": {"rank": 64}}, 64),
        ({"ia3": {}}, None),
    ],
)
def test_lower_bound_of_the_published_rank(method: dict[str, Any], rank: int | None) -> None:
    assert Method.model_validate(method).published_rank == rank


@pytest.mark.parametrize(
    ("spec", "rank", "expected"),
    [
        ({"pool": {"name": "small"}}, 16, "small"),
        ({"pool": {"name": "small"}}, 17, "RankTooHigh"),
        ({"pool": {"name": "small"}}, None, "small"),
        ({}, 17, "large"),
        ({}, 65, "RankTooHigh"),
    ],
    ids=["fits", "too high for the named one", "not known", "another one fits", "too high for all"],
)
def test_an_adapter_gets_no_pool_that_cannot_load_its_rank(
    spec: dict[str, Any],
    rank: int | None,
    expected: str,
    adapter: Callable[..., AdapterDeployment],
    pool: Callable[..., ServingPool],
) -> None:
    pools = [pool("small", engine={"maxLoraRank": 16}), pool("large", engine={"maxLoraRank": 64})]
    serving = adapter(status={"pool": {"name": "small", "namespace": "team"}}, **spec)
    found = choose_pool(serving, "sha256:f", candidates(serving, "sha256:f", pools, ()), rank)
    assert (found.reason if isinstance(found, Unresolved) else found.metadata.name) == expected
    if rank == 17 and isinstance(found, Unresolved):
        assert found.message == (
            "the adapter has rank 17 and ServingPool team/small loads ranks up to 16: train with a lower rank, "
            "name another pool in spec.pool, or ask for a pool with a higher engine.maxLoraRank"
        )


def test_the_message_about_no_matching_pool_names_the_fix(
    adapter: Callable[..., AdapterDeployment], pool: Callable[..., ServingPool]
) -> None:
    found = choose(
        adapter(),
        "sha256:" + "9" * 64,
        [pool("base"), pool("closed", namespace="platform", fingerprint="sha256:" + "9" * 64)],
    )
    assert isinstance(found, Unresolved)
    assert found.message == (
        "no ServingPool that namespace team may use serves the base of this adapter (999999999999): "
        "create a ServingPool with the baseModel that the FineTuneJob names"
    )


@pytest.mark.parametrize(
    ("labels", "expected"),
    [({"tier": "paid"}, "shared"), ({"tier": "free"}, "PoolNotAllowed"), (None, "PoolNotAllowed")],
    ids=["matching", "other", "unknown"],
)
def test_a_selector_admits_namespaces_by_their_labels(
    labels: dict[str, str] | None,
    expected: str,
    adapter: Callable[..., AdapterDeployment],
    pool: Callable[..., ServingPool],
) -> None:
    allowed = {"from": "Selector", "selector": {"matchLabels": {"tier": "paid"}}}
    named = adapter(pool={"name": "shared", "namespace": "platform"})
    pools = [pool("shared", namespace="platform", allowedNamespaces=allowed), pool("own")]
    found = choose_pool(named, "sha256:f", candidates(named, "sha256:f", pools, (), labels))
    assert (found.reason if isinstance(found, Unresolved) else found.metadata.name) == expected
    if isinstance(found, Unresolved):
        assert found.message == (
            "ServingPool platform/shared does not allow namespace team to attach adapters: ask its owners to admit "
            "it in spec.allowedNamespaces, or name another pool; namespace team may attach to ServingPool team/own"
        )


def test_a_missing_pool_is_reported_with_those_that_may_be_used(
    adapter: Callable[..., AdapterDeployment], pool: Callable[..., ServingPool]
) -> None:
    named = adapter(pool={"name": "typo"})
    found = choose(named, "sha256:f", [pool("own"), pool("shared", namespace="other", allowedNamespaces=OPEN)])
    assert isinstance(found, Unresolved)
    assert found.message == (
        "waits for ServingPool typo, which does not exist in namespace team: create it, or correct spec.pool; "
        "namespace team may attach to ServingPools other/shared and team/own"
    )
    alone = choose(named, "sha256:f", [])
    assert isinstance(alone, Unresolved)
    assert alone.message.endswith("; no ServingPool allows namespace team to attach this adapter")


def test_the_serving_pool_is_kept_when_another_is_created(
    adapter: Callable[..., AdapterDeployment], pool: Callable[..., ServingPool]
) -> None:
    serving = adapter(status={"pool": {"name": "two", "namespace": "team"}})
    found = choose(serving, "sha256:f", [pool("one"), pool("two")])
    assert isinstance(found, ServingPool)
    assert found.metadata.name == "two"


def test_an_adapter_whose_source_was_deleted_keeps_its_pool(
    adapter: Callable[..., AdapterDeployment], pool: Callable[..., ServingPool]
) -> None:
    serving = adapter(status={"pool": {"name": "two", "namespace": "team"}})
    found = choose(serving, None, [pool("one"), pool("two")])
    assert isinstance(found, ServingPool)


def test_several_pools_are_named(adapter: Callable[..., AdapterDeployment], pool: Callable[..., ServingPool]) -> None:
    found = choose(adapter(), "sha256:f", [pool("one"), pool("two"), pool("six")])
    assert isinstance(found, Unresolved)
    assert found.message == (
        "ServingPools team/one, team/six and team/two serve the base of this adapter: name one of them in spec.pool"
    )


def test_foreign_pools_are_named_and_their_names_are_bounded(
    adapter: Callable[..., AdapterDeployment], pool: Callable[..., ServingPool]
) -> None:
    foreign = [pool(f"p{number}", namespace="other", allowedNamespaces=OPEN) for number in range(9)]
    found = choose(adapter(), "sha256:f", foreign)
    assert isinstance(found, Unresolved)
    assert found.message == (
        "no ServingPool of namespace team or shared by the platform serves the base of this adapter; ServingPools "
        "other/p0, other/p1, other/p2, other/p3, other/p4 and 4 more would accept it if named in spec.pool: its owners "
        "can read the adapter and the requests"
    )


def test_a_pool_in_the_own_namespace_needs_no_other(
    adapter: Callable[..., AdapterDeployment], pool: Callable[..., ServingPool]
) -> None:
    found = choose(adapter(), "sha256:f", [pool("evil", namespace="other", allowedNamespaces=OPEN), pool("base")])
    assert isinstance(found, ServingPool)
    assert found.metadata.namespace == "team"


def test_a_pool_serves_adapters_of_the_base_model_that_its_own_stands_for(
    adapter: Callable[..., AdapterDeployment], pool: Callable[..., ServingPool]
) -> None:
    trained, quantised = "sha256:" + "1" * 64, "sha256:" + "2" * 64
    exact, cheap = pool("exact", fingerprint=trained), pool("cheap", fingerprint=quantised, equivalentTo=trained)

    def found(serving: AdapterDeployment, *pools: ServingPool) -> ServingPool | Unresolved:
        return choose_pool(serving, trained, candidates(serving, trained, pools, ()))

    assert found(adapter(pool={"name": "cheap"}), exact, cheap) is cheap
    assert found(adapter(), cheap) is cheap
    assert found(adapter(), exact, cheap) is exact
    attached = adapter(status={"pool": {"name": "cheap", "namespace": "team"}})
    assert found(attached, exact, cheap) is cheap, "an adapter is not moved"
    other = adapter(pool={"name": "cheap"})
    refused = choose_pool(other, "sha256:" + "3" * 64, candidates(other, None, [cheap], ()))
    assert isinstance(refused, Unresolved)
    assert refused.reason == "BaseModelMismatch"
