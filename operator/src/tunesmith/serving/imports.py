"""Import of an adapter from elsewhere (spec.adapterFrom.artifact): its Job, and what follows from it. Pure.

One Job imports an adapter for one base model. Its name is derived from the adapter, the uri and the base model, so the
decision depends on the observed Jobs and the recorded result only.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from tunesmith.api.adapterdeployment import AdapterImport, ImportedArtifact
from tunesmith.api.conditions import AdapterDeploymentReason as Reason
from tunesmith.api.conditions import FailureReason
from tunesmith.api.image_volume import image_volume
from tunesmith.contracts.location import (
    ADAPTER_IMAGE,
    ARTIFACT_FOLDER,
    BASE_IMAGE,
    job_folder,
    owned_name,
    reads_foreign_store,
    volume_claim,
)
from tunesmith.contracts.ownership import controller_of
from tunesmith.contracts.result import ExitCode
from tunesmith.contracts.sentence import one_line
from tunesmith.jobs.classify import find_obstacle, job_outcome
from tunesmith.jobs.observe import COMPONENT_LABEL
from tunesmith.jobs.render import PodInputs, on_disruption, on_exit_codes, owner_reference, pod
from tunesmith.jobs.render import job as trainer_job
from tunesmith.serving.resolve import Artifact, Candidates, Unresolved, named_pool, pool_names

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from tunesmith.api.adapterdeployment import AdapterDeployment
    from tunesmith.api.servingpool import ServingPool
    from tunesmith.contracts.refusal import Refusal
    from tunesmith.jobs.observe import JobView
    from tunesmith.jobs.settings import JobSettings

Object = dict[str, Any]

ADAPTER_LABEL = "tunesmith.dev/adapterdeployment"
IMPORT = "import"
IMPORT_MEMORY = "8Gi"
"""Memory of the pod. The answers of base and adapter are recorded if the base's weights fit into it."""
IMPORT_SECONDS = 6 * 3600
_RESOURCES = {
    "requests": {"cpu": "500m", "memory": "2Gi"},
    "limits": {"cpu": "2", "memory": IMPORT_MEMORY},
}
_OF_PODS = {
    FailureReason.OUT_OF_MEMORY: f"its pod needed more than {IMPORT_MEMORY} of memory: the adapter is too large",
    FailureReason.OUT_OF_DISK: "its pod filled the disk of its node: the base model is too large for it",
    FailureReason.DEADLINE_EXCEEDED: f"its pod needed more than {IMPORT_SECONDS // 3600} hours",
}
"""Messages about failures of the pod: those of training name fields of a FineTuneJob."""
_PODS = 3
"""Pods that the Job starts after failures that another attempt may not have."""
_RETRY = timedelta(minutes=10)
"""Time after which a Job whose failures were not the adapter's fault is replaced."""
_REFUSED_REQUEUE = timedelta(seconds=5)
_MAX_NAME = 40
_MAX_MESSAGE = 2000


@dataclass(frozen=True)
class ImportBase:
    """Base model that an adapter is imported for.

    Attributes:
        uri: its folder.
        revision: its revision on the Hugging Face Hub; None: the newest.
        secret: name of the Secret for the uri; None: the store's credentials.
    """

    uri: str
    revision: str | None = None
    secret: str | None = None

    @property
    def origin(self) -> str:
        """The uri with the revision."""
        return f"{self.uri}@{self.revision}" if self.revision else self.uri


def base_of(pool: ServingPool) -> ImportBase | None:
    """Return the base model of a pool; None if its FineTuneJob has not published it yet."""
    base, published = pool.spec.base_model, pool.status.base_model_artifact
    if base.uri is not None:
        return ImportBase(base.uri, base.revision, base.secret_ref.name if base.secret_ref is not None else None)
    return ImportBase(published.uri) if published is not None else None


@dataclass(frozen=True)
class ImportPlan:
    """Result of a decision.

    Attributes:
        artifact: the imported artifact, or the reason why it is missing.
        record: what the status records about the import.
        create: base model of the Job to create; None: no Job is created.
        delete: names of Jobs to delete.
        requeue_after: delay until the next check; None: at the next change.
    """

    artifact: Artifact | Unresolved
    record: AdapterImport | None = None
    create: ImportBase | None = None
    delete: tuple[str, ...] = ()
    requeue_after: timedelta | None = None


def plan_import(
    adapter: AdapterDeployment,
    source: ImportedArtifact,
    pools: Candidates,
    jobs: Mapping[str, JobView],
    now: datetime,
    store: str,
    refusal: Refusal | None = None,
) -> ImportPlan:
    """Decide about the Job of an adapter's import.

    Args:
        adapter: the AdapterDeployment.
        source: its spec.adapterFrom.artifact.
        pools: pools that may serve it: the import is for the base model of one of them.
        jobs: its Jobs, by name.
        now: the time, UTC.
        store: uri of the installation's store.
        refusal: refusal of a write that this plan requests.
    """
    record = adapter.status.adapter_import
    pool = _pool(adapter, pools)
    base = base_of(pool) if not isinstance(pool, Unresolved) else None
    if record is not None and record.artifact is not None and _is_current(record, adapter, source, base):
        return ImportPlan(_artifact(record, source), record)
    if isinstance(pool, Unresolved):
        return ImportPlan(pool, None, delete=tuple(jobs))
    if base is None:
        name = f"{pool.metadata.namespace}/{pool.metadata.name}"
        waiting = Unresolved(Reason.POOL_NOT_REPORTED, f"waits for ServingPool {name} to have its base model")
        return ImportPlan(waiting, None, delete=tuple(jobs))
    forbidden = _forbidden(adapter, source, pool, base, store)
    if forbidden is not None:
        return ImportPlan(forbidden, None, delete=tuple(jobs))
    name = job_name(adapter, source, base)
    stale = tuple(other for other in jobs if other != name)
    job = jobs.get(name)
    if job is None or job.deleting:
        if refusal is not None:
            refused = Unresolved(Reason.IMPORT_REFUSED, refusal.sentence)
            return ImportPlan(refused, None, base, stale, _REFUSED_REQUEUE)
        waiting = Unresolved(Reason.IMPORTING, f"Job {name} imports {source.uri} for the base model {base.uri}")
        return ImportPlan(waiting, None, None if job is not None else base, stale)
    if not job.finished:
        obstacle = find_obstacle(job, now)
        message = f"Job {name} imports {source.uri}"
        message = f"{message}: {obstacle.message}" if obstacle is not None else message
        after = obstacle.requeue_after if obstacle is not None else None
        return ImportPlan(Unresolved(Reason.IMPORTING, message), None, delete=stale, requeue_after=after)
    return _finished(source, base, job, stale, now, location(adapter, source, base, store))


def _pool(adapter: AdapterDeployment, pools: Candidates) -> ServingPool | Unresolved:
    """Return the pool whose base model the adapter is imported for."""
    if adapter.spec.pool is not None:
        return named_pool(adapter, adapter.spec.pool, None, pools)
    if len(pools.own) == 1:
        return pools.own[0]
    if pools.own:
        return Unresolved(
            Reason.SEVERAL_POOLS,
            f"an adapter is imported for the base model of its pool, and namespace {adapter.metadata.namespace} may "
            f"use {pool_names(pools.own)}: name one of them in spec.pool",
        )
    return Unresolved(
        Reason.NO_MATCHING_POOL,
        f"an adapter is imported for the base model of its pool, and namespace {adapter.metadata.namespace} may use "
        "none without naming it: create a ServingPool, or name one in spec.pool",
    )


def _forbidden(
    adapter: AdapterDeployment, source: ImportedArtifact, pool: ServingPool, base: ImportBase, store: str
) -> Unresolved | None:
    """Return why the adapter cannot be imported for the pool's base model; None if it can."""
    namespace = adapter.metadata.namespace
    if reads_foreign_store(store, namespace, source.uri):
        return Unresolved(
            Reason.NOT_ALLOWED,
            f"spec.adapterFrom.artifact.uri {source.uri} is in the installation's store, outside of the folder of "
            f"namespace {namespace}: copy the adapter elsewhere",
        )
    name = f"{pool.metadata.namespace}/{pool.metadata.name}"
    if volume_claim(base.uri) is not None and pool.metadata.namespace != namespace:
        return Unresolved(
            Reason.IMPORT_FAILED,
            f"the base model of ServingPool {name}, {base.uri}, cannot be read from namespace {namespace}: an import "
            "needs a base model in a store, in an image or on the Hugging Face Hub, or on a claim of this namespace",
        )
    return None


def _is_current(
    record: AdapterImport, adapter: AdapterDeployment, source: ImportedArtifact, base: ImportBase | None
) -> bool:
    """Return True if the recorded result is that of the spec.

    Without spec.pool, another pool is no reason to import again.
    """
    assert record.artifact is not None  # noqa: S101 - the caller checked it
    same = record.uri == source.uri and source.digest in (None, record.artifact.digest)
    return same and (adapter.spec.pool is None or base is None or record.base_model == base.origin)


def _artifact(record: AdapterImport, source: ImportedArtifact) -> Artifact | Unresolved:
    artifact, adapter = record.artifact, record.adapter
    assert artifact is not None  # noqa: S101 - the caller checked it
    if not artifact.servable.vllm:
        return Unresolved(
            Reason.NOT_SERVABLE,
            f"the engine cannot load the adapter of {source.uri}: {artifact.servable.reason or 'no reason was given'}",
        )
    return Artifact(
        digest=artifact.digest,
        uri=artifact.uri,
        fingerprint=adapter.base_model_fingerprint if adapter is not None else None,
        origin=f"import of {source.uri}",
        rank=adapter.rank if adapter is not None else None,
        missed_gates=adapter.missed_gates if adapter is not None else None,
    )


def _finished(
    source: ImportedArtifact,
    base: ImportBase,
    job: JobView,
    stale: tuple[str, ...],
    now: datetime,
    published: str,
) -> ImportPlan:
    """Decide what follows from a finished Job.

    `published`: folder of its artifact. The location is computed, never taken from a pod's report.
    """
    outcome = job_outcome(job, "import")
    result = outcome.result
    if job.succeeded and result is not None and result.artifact is not None and result.imported is not None:
        record = _record(source, base, job, result.message)
        artifact = result.artifact.model_copy(update={"uri": published})
        record = record.model_copy(update={"artifact": artifact, "adapter": result.imported})
        return ImportPlan(_artifact(record, source), record, delete=stale)
    if job.succeeded:
        # The pod and its report are gone. Another Job finds the published artifact.
        waiting = Unresolved(Reason.IMPORTING, f"Job {job.name} has finished, and its report is gone: it is run again")
        return ImportPlan(waiting, None, delete=(*stale, job.name), requeue_after=_REFUSED_REQUEUE)
    message = _OF_PODS.get(outcome.reason, outcome.message) if outcome.reason is not None else outcome.message
    message = one_line(f"{source.uri} could not be imported: {message}", _MAX_MESSAGE)
    record = _record(source, base, job, message)
    if not outcome.retryable:
        sentence = f"{message}; to try again, change spec.adapterFrom, or delete Job {job.name}"
        return ImportPlan(Unresolved(Reason.IMPORT_FAILED, sentence), record, delete=stale)
    left = (job.finished_at or job.created) + _RETRY - now
    if left <= timedelta(0):
        again = Unresolved(Reason.IMPORT_FAILED, f"{message}; it is tried again")
        return ImportPlan(again, record, delete=(*stale, job.name), requeue_after=_REFUSED_REQUEUE)
    minutes = _RETRY.total_seconds() / 60
    again = Unresolved(Reason.IMPORT_FAILED, f"{message}; it is tried again after {minutes:.0f} minutes")
    return ImportPlan(again, record, delete=stale, requeue_after=left)


def _record(source: ImportedArtifact, base: ImportBase, job: JobView, message: str) -> AdapterImport:
    return AdapterImport(uri=source.uri, base_model=base.origin, job=job.name, message=one_line(message, 2048))


def job_name(adapter: AdapterDeployment, source: ImportedArtifact, base: ImportBase) -> str:
    """Return the name of the Job that imports this uri for this base model."""
    name = adapter.metadata.name[:_MAX_NAME].rstrip("-.")
    return owned_name(name, adapter.metadata.uid, f"{IMPORT}-{_key(source, base)}")


def _key(source: ImportedArtifact, base: ImportBase) -> str:
    """Return eight hex digits of everything that an import depends on."""
    document = [source.manifest(), base.uri, base.revision, base.secret]
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:8]


def location(adapter: AdapterDeployment, source: ImportedArtifact, base: ImportBase, store: str) -> str:
    """Return the folder of the imported artifact in the store."""
    metadata = adapter.metadata
    folder = job_folder(store, metadata.namespace, metadata.name, metadata.uid)
    return f"{folder}/{IMPORT}-{_key(source, base)}/{ARTIFACT_FOLDER}"


def is_import_of(adapter: AdapterDeployment, job: Object) -> bool:
    """Return True if the Job imports for the adapter: its namespace and its controlling owner match."""
    owner = controller_of(job, "AdapterDeployment")
    metadata = adapter.metadata
    return (
        owner is not None
        and job["metadata"].get("namespace") == metadata.namespace
        and (owner["name"], owner["uid"]) == (metadata.name, metadata.uid)
    )


def import_job(
    adapter: AdapterDeployment, source: ImportedArtifact, base: ImportBase, settings: JobSettings, cluster: str = ""
) -> Object:
    """Return the Job that imports an adapter on a CPU. `cluster`: UID of its kube-system, or empty."""
    metadata = adapter.metadata
    output = location(adapter, source, base, settings.store)
    arguments = [IMPORT, "--adapter", source.uri, "--base", base.uri, "--output", output]
    if cluster:
        folder = job_folder(settings.store, metadata.namespace, metadata.name, metadata.uid)
        owner = f"{metadata.namespace}/{metadata.name}/{metadata.uid}"
        arguments += ["--job-folder", folder, "--cluster", cluster, "--owner", owner]
    arguments += ["--digest", source.digest] if source.digest is not None else []
    arguments += ["--base-revision", base.revision] if base.revision is not None else []
    secrets = []
    own = source.secret_ref.name if source.secret_ref is not None else None
    for option, secret in (("--secret", own), ("--base-secret", base.secret)):
        if secret is not None:
            arguments += [option, secret]
            secrets.append(secret)
    claims = [claim[0] for claim in (volume_claim(source.uri), volume_claim(base.uri)) if claim is not None]
    volumes = {ADAPTER_IMAGE: image_volume(source.uri), BASE_IMAGE: image_volume(base.uri)}
    images = {name: image.reference for name, image in volumes.items() if image is not None}
    labels = {
        "app.kubernetes.io/managed-by": "tunesmith",
        COMPONENT_LABEL: IMPORT,
        ADAPTER_LABEL: metadata.uid,
    }
    template = pod(settings, labels, PodInputs(arguments, _RESOURCES, secrets=secrets, claims=claims, images=images))
    template["spec"]["activeDeadlineSeconds"] = IMPORT_SECONDS
    reference = owner_reference(adapter.api_version, adapter.kind, metadata.name, metadata.uid)
    return trainer_job(
        {
            "name": job_name(adapter, source, base),
            "namespace": metadata.namespace,
            "labels": labels,
            "ownerReferences": [reference],
        },
        template,
        [on_disruption("Ignore"), on_exit_codes("FailJob", ExitCode.USER_FAULT)],
        retries=_PODS,
    )
