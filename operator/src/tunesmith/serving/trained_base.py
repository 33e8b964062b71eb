"""Base model of a pool with `baseModel.from`: the whole model that a FineTuneJob has published.

The base model is never computed from a pod's report: its location follows from the job, and its digest is the one in
the job's status, against which the pods check every file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunesmith.api.conditions import ServingPoolReason
from tunesmith.api.pool_base_model import BaseModelArtifact
from tunesmith.serving.resolve import short, unfinished, whole_model

if TYPE_CHECKING:
    from collections.abc import Collection

    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith.api.servingpool import ServingPool


@dataclass(frozen=True)
class BaseModelProblem:
    """Reason why the FineTuneJob of a pool has no whole model now, with a sentence."""

    reason: ServingPoolReason
    message: str


def resolve_base(pool: ServingPool, job: FineTuneJob | None, store: str) -> BaseModelArtifact | BaseModelProblem | None:
    """Return the artifact that the pods should get, or the reason why it is missing; None for a base with a uri.

    Args:
        pool: the ServingPool.
        job: the FineTuneJob that it names; None if it does not exist.
        store: the installation's store.
    """
    if pool.base_job is None:
        return None
    namespace, name = pool.base_job
    problem = unfinished(job, name, namespace, missing="create it", failed="create it again")
    if problem is not None:
        return BaseModelProblem(ServingPoolReason(problem.reason.value), problem.message + _meanwhile(pool))
    found = None if job is None else whole_model(job, store)
    if found is None:
        message = (
            f"FineTuneJob {namespace}/{name} published an adapter, not a whole model: create it again with "
            "output.merge: Original (Dequantized if it was trained on a 4-bit base model) or with method.full"
        )
        return BaseModelProblem(ServingPoolReason.NO_WHOLE_MODEL, message + _meanwhile(pool))
    return found


def forbidden_job(pool: ServingPool, shared: Collection[str]) -> str | None:
    """Return the reason why a pool must not serve its FineTuneJob's model; None if it may.

    Otherwise whoever may create pools in one namespace could read the models of all others.

    Args:
        pool: the ServingPool.
        shared: namespaces of the platform, whose pools serve other namespaces.
    """
    job, own = pool.base_job, pool.metadata.namespace
    if job is None or job[0] == own or own in shared:
        return None
    return (
        f"spec.baseModel.from names a FineTuneJob of namespace {job[0]}, and pools of namespace {own} may serve only "
        "its own: create the pool in the job's namespace, or in one of the chart's value serving.sharedPoolNamespaces"
    )


def with_base(pool: ServingPool, found: BaseModelArtifact | BaseModelProblem | None) -> ServingPool:
    """Return the pool with the location of its base model: of the artifact found, otherwise of the one recorded."""
    artifact = found if isinstance(found, BaseModelArtifact) else pool.status.base_model_artifact
    if pool.base_job is None or artifact is None:
        return pool
    spec, status = pool.spec, pool.status
    base = spec.base_model.model_copy(update={"uri": artifact.uri})
    return pool.model_copy(
        update={
            "spec": spec.model_copy(update={"base_model": base}),
            "status": status.model_copy(update={"base_model_artifact": artifact}),
        }
    )


def _meanwhile(pool: ServingPool) -> str:
    artifact = pool.status.base_model_artifact
    return "" if artifact is None else f"; the pods keep artifact {short(artifact.digest)}"
