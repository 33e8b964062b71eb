"""Resolution of an AdapterDeployment: its artifact and its pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunesmith.api.adapterdeployment import PoolReference
from tunesmith.api.conditions import AdapterDeploymentReason as Reason
from tunesmith.api.conditions import FineTuneJobCondition, find, is_true
from tunesmith.api.pool_base_model import BaseModelArtifact
from tunesmith.contracts.location import MERGED_FOLDER, artifact_uri, beside_artifact
from tunesmith.serving.rollback import effective_pool

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from tunesmith.api.adapterdeployment import AdapterDeployment
    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith.api.servingpool import ServingPool

_MAX_NAMES = 5


@dataclass(frozen=True)
class Unresolved:
    """Reason why an artifact or a pool cannot be determined, with a sentence."""

    reason: Reason
    message: str


@dataclass(frozen=True)
class Candidates:
    """Pools that may serve an AdapterDeployment.

    `named`: the pool in `spec.pool`. `admitted`: True if that pool admits the namespace. `own`: pools of its namespace,
    and of the namespaces whose pools the platform shares. `foreign`: other pools with the adapter's base that would
    accept it if `spec.pool` named them.
    """

    named: ServingPool | None = None
    admitted: bool = False
    own: Sequence[ServingPool] = ()
    foreign: Sequence[ServingPool] = ()


@dataclass(frozen=True)
class Artifact:
    """A published adapter, a whole model, or both.

    `fingerprint`: fingerprint of the base that it was trained on, None if its job does not record it. `rank`: rank that
    the engine must accept at least, None if its method does not define one. `whole`: its whole model, None if it has
    none. `refusal`: reason why the engine cannot load it as an adapter, None if it can. `missed_gates`: number of
    evaluation gates that it missed, None if there were none.
    """

    digest: str
    uri: str
    fingerprint: str | None
    origin: str
    rank: int | None = None
    whole: BaseModelArtifact | None = None
    refusal: str | None = None
    missed_gates: int | None = None


def resolve_artifact(
    adapter: AdapterDeployment, name: str, job: FineTuneJob | None, store: str
) -> Artifact | Unresolved:
    """Return the artifact of a FineTuneJob, or the reason why it is not published yet.

    Args:
        adapter: the AdapterDeployment that names it.
        name: name of the FineTuneJob.
        job: the FineTuneJob; None if it does not exist.
        store: the installation's store. The location is computed, never taken from a pod's report.
    """
    namespace = adapter.metadata.namespace
    problem = unfinished(
        job,
        name,
        namespace,
        missing="create it, or correct spec.adapterFrom",
        failed="name another one in spec.adapterFrom",
    )
    if problem is not None:
        return problem
    assert job is not None  # noqa: S101 - `unfinished` returned otherwise
    status = job.status
    assert status.artifact is not None  # noqa: S101
    refusal, whole = None, whole_model(job, store)
    if not status.artifact.servable.vllm:
        reason = status.artifact.servable.reason or "no reason was given"
        refusal = f"the engine cannot load the adapter of FineTuneJob {name}: {reason}"
        if whole is None:
            return Unresolved(Reason.NOT_SERVABLE, refusal)
    return Artifact(
        digest=status.artifact.digest,
        uri=artifact_uri(store, namespace, name, job.metadata.uid),
        fingerprint=status.resolved.base_model_fingerprint if status.resolved is not None else None,
        origin=f"FineTuneJob {name}",
        rank=_rank(job),
        whole=whole,
        refusal=refusal,
        missed_gates=status.evaluation.missed_gates if status.evaluation is not None else None,
    )


def whole_model(job: FineTuneJob, store: str) -> BaseModelArtifact | None:
    """Return the whole model that belongs to a job's artifact; None if it was not published."""
    artifact = job.status.artifact
    if artifact is None or not job.spec.publishes_whole_model:
        return None
    uri = artifact_uri(store, job.metadata.namespace, job.metadata.name, job.metadata.uid)
    if job.spec.method.full is None:
        uri = beside_artifact(uri, MERGED_FOLDER)
    return BaseModelArtifact(digest=artifact.digest, uri=uri)


def has_base_of(adapter: AdapterDeployment, pool: ServingPool) -> bool:
    """Return True if the pool's base model is the whole model of the adapter's FineTuneJob."""
    job = adapter.spec.adapter_from.fine_tune_job
    return job is not None and pool.base_job == (adapter.metadata.namespace, job.name)


def unfinished(job: FineTuneJob | None, name: str, namespace: str, *, missing: str, failed: str) -> Unresolved | None:
    """Return the reason why a FineTuneJob has not published an artifact that may be served; None if it has.

    Args:
        job: the FineTuneJob; None if it does not exist.
        name: its name.
        namespace: its namespace.
        missing: what to do if it does not exist.
        failed: what to do if it failed.
    """
    if job is None:
        return Unresolved(
            Reason.FINE_TUNE_JOB_NOT_FOUND,
            f"waits for FineTuneJob {name}, which does not exist in namespace {namespace}: {missing}",
        )
    status = job.status
    failure = find(status.conditions, FineTuneJobCondition.FAILED)
    if failure is not None and is_true(status.conditions, FineTuneJobCondition.FAILED):
        return Unresolved(
            Reason.FINE_TUNE_JOB_FAILED,
            f"FineTuneJob {name} failed with {failure.reason}: {failure.message}; {failed}".replace(".; ", "; "),
        )
    if not is_true(status.conditions, FineTuneJobCondition.COMPLETE) or status.artifact is None:
        return Unresolved(Reason.FINE_TUNE_JOB_RUNNING, f"waits for FineTuneJob {name}, which is {_progress(job)}")
    return None


def _rank(job: FineTuneJob) -> int | None:
    """Return a lower bound of the adapter's highest rank; None if its method does not define one."""
    if job.spec.requested_method is None:
        return job.status.resolved.rank if job.status.resolved is not None else None
    return job.spec.method.published_rank


def _progress(job: FineTuneJob) -> str:
    phase = job.status.phase or "Pending"
    progress = job.status.progress
    if progress is None or progress.stage is None or progress.stage == phase:
        return str(phase)
    if progress.step is None or not progress.total_steps:
        return f"{phase} ({progress.stage})"
    return f"{phase} ({progress.stage}, step {progress.step} of {progress.total_steps})"


def candidates(
    adapter: AdapterDeployment,
    fingerprint: str | None,
    pools: Iterable[ServingPool],
    shared: Collection[str],
    labels: Mapping[str, str] | None = None,
) -> Candidates:
    """Return the pools by their role in the choice.

    Args:
        adapter: the AdapterDeployment.
        fingerprint: fingerprint of the base that the adapter was trained on; None if unknown.
        pools: at least those of the adapter's and the shared namespaces, the named one, and those with the fingerprint.
        shared: namespaces whose pools may serve any adapter that names no pool.
        labels: labels of the adapter's namespace; None if unknown.
    """
    namespace = adapter.metadata.namespace
    wanted = adapter.spec.pool
    named = None if wanted is None else (wanted.namespace or namespace, wanted.name)
    own, foreign, found, admitted = [], [], None, False
    for pool in pools:
        key, admits = (pool.metadata.namespace, pool.metadata.name), pool.admits(namespace, labels)
        if key == named:
            found, admitted = pool, admits
        if not admits:
            continue
        if pool.metadata.namespace == namespace or pool.metadata.namespace in shared:
            own.append(pool)
        elif fingerprint is not None and pool.serves(fingerprint):
            foreign.append(pool)
    return Candidates(found, admitted, own, foreign)


def choose(adapter: AdapterDeployment, artifact: Artifact | Unresolved, pools: Candidates) -> ServingPool | Unresolved:
    """Return the pool that serves an AdapterDeployment: the one whose base model is its artifact, or for an adapter.

    Args:
        adapter: the AdapterDeployment.
        artifact: its artifact; unresolved if its source was deleted.
        pools: result of `candidates`.
    """
    if not isinstance(artifact, Artifact):
        return choose_pool(adapter, None, pools)
    named = pools.named if pools.admitted else None
    if artifact.whole is not None and named is not None and has_base_of(adapter, named):
        return named
    if artifact.refusal is None:
        return choose_pool(adapter, artifact.fingerprint, pools, artifact.rank)
    if adapter.spec.pool is not None:
        found = named_pool(adapter, adapter.spec.pool, None, pools)
        return found if isinstance(found, Unresolved) else _no_pool_of_job(adapter, artifact.refusal)
    matching = [pool for pool in pools.own if has_base_of(adapter, pool)]
    current = [pool for pool in matching if reference(pool) == adapter.status.pool]
    if len(matching) > 1 and not current:
        return Unresolved(
            Reason.SEVERAL_POOLS, f"{pool_names(matching)} serve the model of this FineTuneJob: name one in spec.pool"
        )
    return next(iter(current or matching), None) or _no_pool_of_job(adapter, artifact.refusal)


def _no_pool_of_job(adapter: AdapterDeployment, refusal: str) -> Unresolved:
    namespace, job = adapter.metadata.namespace, adapter.spec.adapter_from.fine_tune_job
    assert job is not None  # noqa: S101 - no other artifact is a whole model
    return Unresolved(
        Reason.NOT_SERVABLE,
        f"{refusal}. Its whole model is served by a ServingPool with baseModel.from: {{fineTuneJob: {{name: "
        f"{job.name}, namespace: {namespace}}}}}: ask the platform's engineers for one, and name it in spec.pool",
    )


def choose_pool(
    adapter: AdapterDeployment, fingerprint: str | None, pools: Candidates, rank: int | None = None
) -> ServingPool | Unresolved:
    """Return the pool that serves the adapter.

    Without `spec.pool` a pool of a foreign namespace is never chosen, since its owner could read the adapter's weights
    and all requests.

    Args:
        adapter: the AdapterDeployment.
        fingerprint: fingerprint of the base that the adapter was trained on; None if unknown (its source was deleted).
        pools: result of `candidates`.
        rank: rank of the adapter; None if unknown.
    """
    if adapter.spec.pool is not None:
        return _if_rank_accepted(named_pool(adapter, adapter.spec.pool, fingerprint, pools), rank)
    namespace = adapter.metadata.namespace
    matching = [pool for pool in pools.own if fingerprint is not None and pool.serves(fingerprint)]
    if matching and not any(_accepts(pool, rank) for pool in matching):
        return _if_rank_accepted(max(matching, key=_max_rank), rank)
    matching = [pool for pool in matching if _accepts(pool, rank)]
    current = adapter.status.pool
    kept = [
        pool
        for pool in (matching if fingerprint is not None else pools.own)
        if current is not None and reference(pool) == current
    ]
    if kept:
        return kept[0]
    # A pool with an equivalent base model only if none has the adapter's own.
    matching = [pool for pool in matching if pool.status.base_model_fingerprint == fingerprint] or matching
    if len(matching) == 1:
        return matching[0]
    if matching:
        return Unresolved(
            Reason.SEVERAL_POOLS,
            f"{pool_names(matching)} serve the base of this adapter: name one of them in spec.pool",
        )
    unreported = [pool for pool in pools.own if pool.status.base_model_fingerprint is None]
    if unreported:
        return Unresolved(
            Reason.POOL_NOT_REPORTED,
            f"waits for {pool_names(unreported)} to report the fingerprint of the base; set spec.pool to choose a "
            "pool without waiting",
        )
    if pools.foreign:
        return Unresolved(
            Reason.POOL_NOT_NAMED,
            f"no ServingPool of namespace {namespace} or shared by the platform serves the base of this adapter; "
            f"{pool_names(pools.foreign)} would accept it if named in spec.pool: its owners can read the adapter and "
            "the requests",
        )
    return Unresolved(
        Reason.NO_MATCHING_POOL,
        f"no ServingPool that namespace {namespace} may use serves the base of this adapter"
        f"{' (' + short(fingerprint) + ')' if fingerprint else ''}: create a ServingPool "
        "with the baseModel that the FineTuneJob names",
    )


def _accepts(pool: ServingPool, rank: int | None) -> bool:
    return rank is None or rank <= _max_rank(pool)


def _max_rank(pool: ServingPool) -> int:
    """Return the highest rank that the pool's pods load, also after a roll-back."""
    return effective_pool(pool, pool.status.rollback).spec.engine.max_lora_rank


def _if_rank_accepted(pool: ServingPool | Unresolved, rank: int | None) -> ServingPool | Unresolved:
    """Return the pool if its engine accepts adapters of that rank, otherwise the reason."""
    if isinstance(pool, Unresolved) or _accepts(pool, rank):
        return pool
    name, max_rank = f"{pool.metadata.namespace}/{pool.metadata.name}", _max_rank(pool)
    if rank is not None and rank <= pool.spec.engine.max_lora_rank:
        return Unresolved(
            Reason.RANK_TOO_HIGH,
            f"the adapter has rank {rank}, and ServingPool {name}, whose spec was rolled back, loads ranks up to "
            f"{max_rank}: fix the pool's spec, which allows {pool.spec.engine.max_lora_rank}",
        )
    return Unresolved(
        Reason.RANK_TOO_HIGH,
        f"the adapter has rank {rank} and ServingPool {name} loads ranks up to {max_rank}: train with "
        "a lower rank, name another pool in spec.pool, or ask for a pool with a higher engine.maxLoraRank",
    )


def reference(pool: ServingPool) -> PoolReference:
    """Return the pool's name and namespace."""
    return PoolReference(name=pool.metadata.name, namespace=pool.metadata.namespace)


def short(digest: str) -> str:
    """Return the first 12 hex digits of a digest, for messages."""
    return digest.removeprefix("sha256:")[:12]


def named_pool(
    adapter: AdapterDeployment, wanted: PoolReference, fingerprint: str | None, pools: Candidates
) -> ServingPool | Unresolved:
    """Return the pool in `spec.pool`, or the reason why it cannot serve the adapter."""
    pool, namespace = pools.named, wanted.namespace or adapter.metadata.namespace
    if pool is None:
        return Unresolved(
            Reason.POOL_NOT_FOUND,
            f"waits for ServingPool {wanted.name}, which does not exist in namespace "
            f"{namespace}: create it, or correct spec.pool; {_usable(adapter, pools)}",
        )
    if not pools.admitted:
        return Unresolved(
            Reason.POOL_NOT_ALLOWED,
            f"ServingPool {namespace}/{wanted.name} does not allow namespace "
            f"{adapter.metadata.namespace} to attach adapters: ask its owners to admit it in spec.allowedNamespaces, "
            f"or name another pool; {_usable(adapter, pools)}",
        )
    pool_fingerprint = pool.status.base_model_fingerprint
    if fingerprint is not None and pool_fingerprint is not None and not pool.serves(fingerprint):
        return Unresolved(
            Reason.BASE_MODEL_MISMATCH,
            f"the adapter was trained on the base {short(fingerprint)} and ServingPool "
            f"{namespace}/{wanted.name} serves {short(pool_fingerprint)} "
            f"({pool.spec.base_model.origin}): name a pool with the base that the FineTuneJob names",
        )
    return pool


def _usable(adapter: AdapterDeployment, pools: Candidates) -> str:
    """Return the part of a sentence that names the pools that would accept the adapter."""
    namespace, others = adapter.metadata.namespace, [*pools.own, *pools.foreign]
    if not others:
        return f"no ServingPool allows namespace {namespace} to attach this adapter"
    return f"namespace {namespace} may attach to {pool_names(others)}"


def pool_names(pools: Sequence[ServingPool]) -> str:
    """Return the pools' names for a sentence, such as `ServingPools a/b and a/c`."""
    names = sorted(f"{pool.metadata.namespace}/{pool.metadata.name}" for pool in pools)
    if len(names) > _MAX_NAMES:
        names = [*names[:_MAX_NAMES], f"{len(names) - _MAX_NAMES} more"]
    return (
        f"ServingPool{'s' * (len(names) > 1)} "
        f"{' and '.join([', '.join(names[:-1]), names[-1]] if len(names) > 1 else names)}"
    )
