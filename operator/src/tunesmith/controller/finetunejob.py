"""Reconciler of FineTuneJobs: caches → observe → plan → writes → one status write → Events."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING

from tunesmith.api.conditions import EventReason
from tunesmith.api.finetunejob_status import AttemptOutcome
from tunesmith.cluster.errors import AlreadyExistsError, ForbiddenError, NotFoundError
from tunesmith.contracts.ownership import controller_of
from tunesmith.controller.executor import Executor, name_taken
from tunesmith.controller.progress import ProgressPoller
from tunesmith.controller.reconciler import MANAGED, Key, Result, Watch, label_keys, owner_keys
from tunesmith.controller.status import StatusWriter
from tunesmith.finetune import render
from tunesmith.finetune.gpu_memory import gpu_memory_bytes
from tunesmith.finetune.observe import (
    TRAIN,
    VALIDATE,
    WORKLOAD_LABEL,
    adapter_source,
    base_job,
    continued_job,
    is_job_of,
    observe,
    users_of,
)
from tunesmith.finetune.plan import Action, CreateAttempt, CreateValidation, StopJob, plan
from tunesmith.finetune.quota import quota_shortage
from tunesmith.finetune.start import source_name
from tunesmith.finetune.status import status_events, without_reports
from tunesmith.jobs.observe import COMPONENT_LABEL, index_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith.api.finetunejob_status import FineTuneJobStatus
    from tunesmith.cluster.resources import Object, Objects
    from tunesmith.contracts.refusal import Refusal
    from tunesmith.controller.context import Context

KIND = "FineTuneJob"
_CONTINUED = "continued"
BASE_JOB = "base-job"
"""Index of ServingPools by the FineTuneJob whose whole model is their base."""
"""Index of FineTuneJobs by the one whose adapter they start from."""
_DELETION_RETRY_SECONDS = 300.0
_POD_CREATION_TIME = timedelta(seconds=2)
"""Time that the Job controller may take to create the pods of a Job."""
_log = logging.getLogger(__name__)


class FineTuneJobReconciler:
    """Reconciler of FineTuneJobs."""

    kind = KIND

    def __init__(self, context: Context) -> None:
        self._context = context
        self._executor = Executor(context)
        self._statuses = StatusWriter(context)
        self._uids: dict[Key, str] = {}
        context.caches["Pod"].index(render.JOB_LABEL, _job_of_pod)
        context.caches[KIND].index(_CONTINUED, _continued_job)
        context.caches["ServingPool"].index(BASE_JOB, base_job_key)
        self._progress = ProgressPoller(self._running_pods, self._progressed)

    @property
    def _installation(self) -> render.JobInstallation:
        return render.JobInstallation(self._context.settings, self._context.cluster_uid)

    @property
    def watches(self) -> Sequence[Watch]:
        """Jobs of a FineTuneJob and their pods."""
        return (
            Watch("Job", owner_keys(KIND), MANAGED),
            Watch("Pod", label_keys(KIND, render.JOB_LABEL), MANAGED),
            Watch("AdapterDeployment", _source_of_deployment),
            Watch("ServingPool", _job_of_pool),
            Watch(KIND, self._connected_jobs),
        )

    def _connected_jobs(self, item: Object) -> Iterable[Key]:
        """Yield the FineTuneJobs that start from the adapter of this one, and the one that this one starts from."""
        namespace = item["metadata"].get("namespace", "")
        for job in self._context.caches[KIND].find(_CONTINUED, f"{namespace}/{item['metadata']['name']}"):
            yield Key(KIND, namespace, job["metadata"]["name"])
        source = continued_job(item)
        if source is not None:
            yield Key(KIND, namespace, source)

    async def reconcile(self, key: Key) -> Result:
        """Reconcile one FineTuneJob."""
        manifest = self._context.caches[KIND].get(key.namespace, key.name)
        if manifest is None or manifest["metadata"].get("deletionTimestamp"):
            # Kubernetes deletes its dependents by their owner references.
            uid = self._uids.pop(key, None)
            if uid is not None:
                self._executor.forget(uid)
                self._context.jobs.forget(uid)
            return Result()
        finetunejob = self._context.jobs.get(key.namespace, key.name)
        if finetunejob is None:
            # Not a permanent failure: a newer release may have written it and may be reinstalled.
            await self._statuses.write_unreadable(manifest, self._context.jobs.error(manifest))
            return Result()
        self._uids[key] = finetunejob.metadata.uid
        now, jobs = self._context.now(), await self._jobs(manifest)
        pods = self._pods(manifest, jobs)
        observation = observe(
            finetunejob,
            jobs,
            pods,
            self._progress.newest(pods),
            now,
            await self._workloads(jobs),
            await self._quota_shortages(jobs, now),
            self._source(finetunejob),
            self._users(finetunejob),
        )
        decide = partial(plan, store=self._context.settings.store, allowed=self._context.settings)
        decision = decide(observation)
        by_name = {job["metadata"]["name"]: job for job in jobs}
        for action in decision.actions:
            refusal = await self._do(finetunejob, decision.status, action, by_name)
            if refusal is not None:
                decision = decide(replace(observation, refusal=refusal))
                break
        await self._statuses.write(
            manifest,
            decision.status,
            events=partial(status_events, finetunejob.status),
            fallback=partial(without_reports, finetunejob.status),
        )
        if decision.deletion is not None:
            return await self._delete(manifest, decision.deletion)
        return Result(decision.requeue_after.total_seconds() if decision.requeue_after is not None else None)

    async def _delete(self, manifest: Object, message: str) -> Result:
        """Delete an expired FineTuneJob, after an Event about it. Kubernetes deletes its dependents."""
        await self._context.recorder.event(manifest, EventReason.EXPIRED, message)
        refusal = await self._executor.delete(manifest["metadata"]["uid"], manifest, "Background")
        if refusal is None:
            return Result()
        await self._context.recorder.event(manifest, EventReason.DELETION_REFUSED, refusal.sentence, type_="Warning")
        return Result(_DELETION_RETRY_SECONDS)

    def _source(self, job: FineTuneJob) -> FineTuneJob | None:
        """Return the FineTuneJob whose adapter a job starts from; None if it names none or that does not exist."""
        name = source_name(job)
        return None if name is None else self._context.jobs.get(job.metadata.namespace, name)

    def _users(self, job: FineTuneJob) -> tuple[str, ...]:
        """Return the resources that need a FineTuneJob; read only if it expires."""
        if job.spec.ttl_seconds_after_finished is None:
            return ()
        metadata, caches = job.metadata, self._context.caches
        continuing = caches[KIND].find(_CONTINUED, f"{metadata.namespace}/{metadata.name}")
        # Other pools are not allowed to serve its model, and must not keep it.
        allowed = {metadata.namespace, *self._context.settings.shared_namespaces}
        pools = caches["ServingPool"].find(BASE_JOB, f"{metadata.namespace}/{metadata.name}")
        serving = [pool for pool in pools if pool["metadata"]["namespace"] in allowed]
        return users_of(metadata.name, caches["AdapterDeployment"].list(metadata.namespace), continuing, serving)

    async def run(self) -> None:
        """Pull the progress of running pods."""
        await self._progress.run()

    async def _jobs(self, manifest: Object) -> Objects:
        """Return the Jobs of a FineTuneJob. Before a permanent decision, read the API server instead of the cache."""
        metadata = manifest["metadata"]
        jobs = {job["metadata"]["name"]: job for job in self._context.caches["Job"].owned(metadata["uid"])}
        for attempt in manifest.get("status", {}).get("attempts") or ():
            running = attempt.get("outcome") == AttemptOutcome.RUNNING
            if running and attempt["name"] not in jobs:
                job = await self._context.cluster.find("Job", attempt["name"], metadata["namespace"])
                if job is not None:
                    self._context.caches["Job"].put(job)
                    jobs[attempt["name"]] = job
        for name, job in jobs.items():
            if _is_finished(job):
                await self._complete_pods(name, job)
        return list(jobs.values())

    async def _workloads(self, jobs: Objects) -> Objects:
        """Return the Kueue Workloads of suspended Jobs; read, not watched, since Kueue may not be installed."""
        found: Objects = []
        for job in jobs:
            if job.get("spec", {}).get("suspend"):
                labels = f"{WORKLOAD_LABEL}={job['metadata']['uid']}"
                with contextlib.suppress(NotFoundError, ForbiddenError):
                    found += await self._context.cluster.list("Workload", job["metadata"]["namespace"], labels=labels)
        return found

    def _pods(self, manifest: Object, jobs: Objects) -> Objects:
        """Return the pods of the Jobs and, if a Job is missing, the pods that it may have left."""
        cache, metadata = self._context.caches["Pod"], manifest["metadata"]
        names = {job["metadata"]["name"] for job in jobs}
        if all(attempt["name"] in names for attempt in manifest.get("status", {}).get("attempts") or ()):
            return [pod for job in jobs for pod in cache.owned(job["metadata"]["uid"])]
        return cache.find(render.JOB_LABEL, f"{metadata['namespace']}/{metadata['name']}")

    async def _complete_pods(self, name: str, job: Object) -> None:
        """Read the pods of a finished Job from the API server if the cache does not show them as finished yet."""
        pods = self._context.caches["Pod"].owned(job["metadata"]["uid"])
        if all(pod.get("status", {}).get("phase") in {"Succeeded", "Failed"} for pod in pods) and pods:
            return
        labels = f"batch.kubernetes.io/job-name={name}"
        for pod in await self._context.cluster.list("Pod", job["metadata"]["namespace"], labels=labels):
            self._context.caches["Pod"].put(pod)

    async def _quota_shortages(self, jobs: Objects, now: datetime) -> dict[str, str]:
        """Return the reasons why a ResourceQuota leaves no room for missing pods, by name of the Job.

        Quotas are read only while pods are missing, since the Job controller reports refused pods only by Events.
        """
        found: dict[str, str] = {}
        for job in jobs:
            if not self._misses_pods(job, now):
                continue
            metadata = job["metadata"]
            with contextlib.suppress(NotFoundError, ForbiddenError):
                quotas = await self._context.cluster.list("ResourceQuota", metadata["namespace"])
                full = await self._context.cluster.get("Job", metadata["name"], metadata["namespace"])
                found[metadata["name"]] = quota_shortage(full["spec"]["template"]["spec"], quotas)
        return found

    def _misses_pods(self, job: Object, now: datetime) -> bool:
        metadata, spec = job["metadata"], job.get("spec", {})
        if spec.get("suspend") or "deletionTimestamp" in metadata or _is_finished(job):
            return False
        age = now - datetime.fromisoformat(metadata["creationTimestamp"])
        indexes = {index_of(pod) for pod in self._context.caches["Pod"].owned(metadata["uid"])}
        return age >= _POD_CREATION_TIME and len(indexes) < spec.get("parallelism", 1)

    async def _do(
        self, job: FineTuneJob, status: FineTuneJobStatus, action: Action, jobs: dict[str, Object]
    ) -> Refusal | None:
        match action:
            case CreateValidation():
                resolved = job.model_copy(update={"status": status})
                rendered = render.validation(job, self._installation, await self._gpu_memory(job))
                isolation = render.isolation(job, self._context.settings.network)
                return await self._create(job, *isolation, render.configuration(resolved, VALIDATE), rendered)
            case CreateAttempt(number):
                # The status of the plan has the values that validation resolved in this pass.
                resolved = job.model_copy(update={"status": status})
                rendered = render.attempt(job, number, self._installation)
                supporting = [*render.isolation(job, self._context.settings.network), *render.rank_network(job)]
                return await self._create(job, *supporting, render.configuration(resolved, TRAIN), rendered)
            case StopJob(name):
                # The Job remains until its pods are deleted, so that later passes see whether one is still saving.
                return await self._executor.delete(job.metadata.uid, jobs[name], "Foreground")

    async def _gpu_memory(self, job: FineTuneJob) -> int | None:
        """Return the GPU's memory in bytes, or None. Read once per job, which is much cheaper than watching nodes."""
        if not job.spec.resources.gpus:
            return None
        selector = ",".join(f"{key}={value}" for key, value in (job.spec.scheduling.node_selector or {}).items())
        try:
            return gpu_memory_bytes(job, await self._context.cluster.list("Node", labels=selector))
        except ForbiddenError as error:
            _log.warning("the GPU memory is unknown: %s", error)
            return None

    async def _create(self, job: FineTuneJob, *items: Object) -> Refusal | None:
        """Create each object once and never apply it again: an existing object is accepted unchanged.

        A newer release may render it differently, and the input of a job must not change between attempts.
        """
        for item in items:
            try:
                refusal = await self._executor.create(job.metadata.uid, item)
            except AlreadyExistsError:
                refusal = await self._adopt(job, item) if item["kind"] == "Job" else None
            if refusal is not None:
                return refusal
        return None

    async def _adopt(self, job: FineTuneJob, rendered: Object) -> Refusal | None:
        name = rendered["metadata"]["name"]
        found = await self._context.cluster.find("Job", name, job.metadata.namespace)
        if found is None:
            return None
        if not is_job_of(job.metadata, found):
            message = f"Job {name} exists and does not belong to this FineTuneJob: delete it"
            return name_taken("create", rendered, message)
        self._context.caches["Job"].put(found)
        return None

    def _running_pods(self) -> Objects:
        return [
            pod
            for pod in self._context.caches["Pod"].list()
            if pod["metadata"].get("labels", {}).get(COMPONENT_LABEL) in {VALIDATE, TRAIN}
            and (pod.get("status") or {}).get("phase") == "Running"
            and index_of(pod) == 0
            and self._is_of_a_job(pod)
        ]

    def _is_of_a_job(self, pod: Object) -> bool:
        """Return True if a FineTuneJob's Job controls the pod: requests are sent to no other pods."""
        metadata = pod["metadata"]
        name = (metadata.get("labels") or {}).get(render.JOB_LABEL, "")
        finetunejob = self._context.jobs.get(metadata["namespace"], name)
        owner = controller_of(pod, "Job")
        job = self._context.caches["Job"].get(metadata["namespace"], owner["name"]) if owner is not None else None
        return (
            finetunejob is not None
            and owner is not None
            and job is not None
            and job["metadata"]["uid"] == owner["uid"]
            and is_job_of(finetunejob.metadata, job)
        )

    def _progressed(self, pod: Object) -> None:
        for key in label_keys(KIND, render.JOB_LABEL)(pod):
            self._context.queue.add(key)


def _is_finished(job: Object) -> bool:
    conditions = job.get("status", {}).get("conditions") or ()
    return any(entry["type"] in {"Complete", "Failed"} and entry["status"] == "True" for entry in conditions)


def _job_of_pod(pod: Object) -> Iterable[str]:
    name = (pod["metadata"].get("labels") or {}).get(render.JOB_LABEL)
    if name:
        yield f"{pod['metadata'].get('namespace', '')}/{name}"


def _continued_job(finetunejob: Object) -> Iterable[str]:
    name = continued_job(finetunejob)
    if name:
        yield f"{finetunejob['metadata'].get('namespace', '')}/{name}"


def base_job_key(pool: Object) -> Iterable[str]:
    """Return the key of a pool in the index `BASE_JOB`."""
    job = base_job(pool)
    if job is not None:
        yield "/".join(job)


def _job_of_pool(pool: Object) -> Iterable[Key]:
    job = base_job(pool)
    if job is not None:
        yield Key(KIND, *job)


def _source_of_deployment(deployment: Object) -> Iterable[Key]:
    name = adapter_source(deployment)
    if name:
        yield Key(KIND, deployment["metadata"].get("namespace", ""), name)
