"""FineTuneJobs: caches → observe → plan → create Jobs → one status write → events."""

from __future__ import annotations

import contextlib
import logging
from datetime import timedelta
from typing import TYPE_CHECKING

from pydantic import ValidationError

from tunesmith.api.conditions import FailureReason
from tunesmith.api.finetunejob_status import AttemptOutcome, FineTuneJobStatus
from tunesmith.cluster.errors import AlreadyExistsError, ForbiddenError, InvalidError, NotFoundError
from tunesmith.contracts.ownership import controller_of
from tunesmith.controller.progress import ProgressPoller
from tunesmith.controller.reconciler import MANAGED, Key, Result, Watch, label_keys, owner_keys
from tunesmith.finetune import render
from tunesmith.finetune.nodes import gpu_memory_bytes
from tunesmith.finetune.observe import (
    COMPONENT_LABEL,
    TRAIN,
    VALIDATE,
    WORKLOAD_LABEL,
    Observation,
    index_of,
    is_job_of,
    observe,
)
from tunesmith.finetune.plan import Action, CreateAttempt, CreateValidation, Plan, StopJob, plan
from tunesmith.finetune.status import Status, notices, unreadable, without_reports

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith.cluster.resources import Object, Objects
    from tunesmith.controller.context import Context

KIND = "FineTuneJob"
_REFUSED_LOOK = timedelta(seconds=30)
_log = logging.getLogger(__name__)


class _NameTakenError(Exception):
    """An object that the job needs cannot be created: another one has its name."""


class FineTuneJobReconciler:
    """Trains what FineTuneJobs ask for."""

    kind = KIND

    def __init__(self, context: Context) -> None:
        self._context = context
        context.caches["Pod"].index(render.JOB_LABEL, _job_of_pod)
        self._progress = ProgressPoller(self._running_pods, self._progressed)

    @property
    def _installation(self) -> render.Installation:
        return render.Installation(self._context.settings, self._context.cluster_uid)

    @property
    def watches(self) -> Sequence[Watch]:
        """Its Jobs and their pods."""
        return (
            Watch("Job", owner_keys(KIND), MANAGED),
            Watch("Pod", label_keys(KIND, render.JOB_LABEL), MANAGED),
        )

    async def reconcile(self, key: Key) -> Result:
        """One pass."""
        manifest = self._context.caches[KIND].get(key.namespace, key.name)
        if manifest is None or manifest["metadata"].get("deletionTimestamp"):
            # What it owns is removed by its owner references.
            return Result()
        try:
            jobs = await self._jobs(manifest)
            pods = self._pods(manifest, jobs)
            sample = self._progress.newest(pods)
            seen = observe(manifest, jobs, pods, sample, self._context.now(), await self._workloads(jobs))
        except ValidationError as error:
            # Not a failure for good: a newer release may have written it and may come back.
            await self._report_unreadable(manifest, error)
            return Result()
        decided = plan(seen, self._context.settings.store, self._context.settings)
        status, look_again = await self._act(seen, decided, manifest, {job["metadata"]["name"]: job for job in jobs})
        await self._write(manifest, seen.job.status, status)
        return Result(look_again.total_seconds() if look_again is not None else None)

    async def _report_unreadable(self, manifest: Object, error: ValidationError) -> None:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        message = f"{where} does not have the form that this release of the operator expects: {first['msg']}"
        _log.warning("FineTuneJob %s: %s", manifest["metadata"]["name"], message)
        document = unreadable(manifest, message, self._context.now())
        if document != manifest.get("status"):
            written = await self._context.replace_status({**manifest, "status": document})
            await self._context.recorder.event(written, FailureReason.INVALID_SPEC, message, type_="Warning")

    async def run(self) -> None:
        """Pull the progress of running pods."""
        await self._progress.run()

    async def _jobs(self, manifest: Object) -> Objects:
        """The Jobs of a FineTuneJob. What would be decided upon for good is read from the API server, not the cache."""
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
            conditions = job.get("status", {}).get("conditions") or ()
            if any(entry["type"] in {"Complete", "Failed"} and entry["status"] == "True" for entry in conditions):
                await self._complete_pods(name, job)
        return list(jobs.values())

    async def _workloads(self, jobs: Objects) -> Objects:
        """What Kueue has of the Jobs that wait in a queue; read, not watched: clusters without Kueue have none."""
        found: Objects = []
        for job in jobs:
            if job.get("spec", {}).get("suspend"):
                labels = f"{WORKLOAD_LABEL}={job['metadata']['uid']}"
                with contextlib.suppress(NotFoundError, ForbiddenError):
                    found += await self._context.cluster.list("Workload", job["metadata"]["namespace"], labels=labels)
        return found

    def _pods(self, manifest: Object, jobs: Objects) -> Objects:
        """The pods of the Jobs, and where a Job is gone those that it may have left."""
        cache, metadata = self._context.caches["Pod"], manifest["metadata"]
        names = {job["metadata"]["name"] for job in jobs}
        if all(attempt["name"] in names for attempt in manifest.get("status", {}).get("attempts") or ()):
            return [pod for job in jobs for pod in cache.owned(job["metadata"]["uid"])]
        return cache.find(render.JOB_LABEL, f"{metadata['namespace']}/{metadata['name']}")

    async def _complete_pods(self, name: str, job: Object) -> None:
        """A Job's end can be told before its pods' ends: then the pods are read."""
        pods = self._context.caches["Pod"].owned(job["metadata"]["uid"])
        if all(pod.get("status", {}).get("phase") in {"Succeeded", "Failed"} for pod in pods) and pods:
            return
        labels = f"batch.kubernetes.io/job-name={name}"
        for pod in await self._context.cluster.list("Pod", job["metadata"]["namespace"], labels=labels):
            self._context.caches["Pod"].put(pod)

    async def _act(
        self, seen: Observation, decided: Plan, manifest: Object, jobs: dict[str, Object]
    ) -> tuple[FineTuneJobStatus, timedelta | None]:
        """Carry the actions out; the status that is true afterwards, and when to look again."""
        status = Status(seen.job, seen.now)
        try:
            for action in decided.actions:
                await self._do(seen.job, decided.status, action, manifest, jobs)
        except _NameTakenError as error:
            status.held("NameTaken", str(error))
        except ForbiddenError as error:
            status.held("CreateRefused", f"the API server refuses an object that the job needs: {error}")
        except InvalidError as error:
            message = f"the API server refuses what the spec leads to: {error}"
            if not seen.job.status.attempts:
                status.failed(FailureReason.INVALID_SPEC, message)
                return status.build(), None
            # A rule of the cluster changed: what was trained so far must not be lost by that.
            status.held("CreateRefused", message)
        else:
            return decided.status, decided.look_again
        return status.build(), _REFUSED_LOOK

    async def _do(
        self, job: FineTuneJob, status: FineTuneJobStatus, action: Action, manifest: Object, jobs: dict[str, Object]
    ) -> None:
        match action:
            case CreateValidation():
                rendered = render.validation(job, self._installation, await self._gpu_memory(job))
                isolation = render.isolation(job, self._context.settings.network)
                await self._create(manifest, *isolation, render.configuration(job, VALIDATE), rendered)
            case CreateAttempt(number):
                # The status that goes with the action holds what validation resolved in this very pass.
                resolved = job.model_copy(update={"status": status})
                rendered = render.attempt(job, number, self._installation)
                beside = [*render.isolation(job, self._context.settings.network), *render.meeting(job)]
                await self._create(manifest, *beside, render.configuration(resolved, TRAIN), rendered)
            case StopJob(name):
                # It stays until its pod is gone, so that what follows sees whether one still saves.
                await self._context.delete(jobs[name], "Foreground")

    async def _gpu_memory(self, job: FineTuneJob) -> int | None:
        """Read once per job: watching nodes would be far more work than this one question."""
        if not job.spec.resources.gpus:
            return None
        selector = ",".join(f"{key}={value}" for key, value in (job.spec.scheduling.node_selector or {}).items())
        try:
            return gpu_memory_bytes(job, await self._context.cluster.list("Node", labels=selector))
        except ForbiddenError as error:
            _log.warning("the GPUs' memory is not known: %s", error)
            return None

    async def _create(self, manifest: Object, *items: Object) -> None:
        """Create each object once and never apply it again: one that exists is the one that was meant.

        A newer release may render it otherwise, and what an attempt reads must not change between attempts.

        Raises:
            _NameTakenError: a Job of that name is not the FineTuneJob's.
        """
        for item in items:
            try:
                await self._context.create(item)
            except AlreadyExistsError:
                if item["kind"] == "Job":
                    await self._adopt(manifest, item["metadata"]["name"])

    async def _adopt(self, manifest: Object, name: str) -> None:
        job = await self._context.cluster.find("Job", name, manifest["metadata"]["namespace"])
        if job is None:
            return
        if not is_job_of(manifest, job):
            raise _NameTakenError(
                f"Job {name} exists and does not belong to this FineTuneJob: delete it, so that it can be created"
            )
        self._context.caches["Job"].put(job)

    async def _write(self, manifest: Object, old: FineTuneJobStatus, new: FineTuneJobStatus) -> None:
        if new == old:
            return
        try:
            written = await self._context.replace_status({**manifest, "status": new.manifest()})
        except InvalidError as error:
            # What a pod reports must not keep the rest of the truth from being written.
            _log.warning("FineTuneJob %s: the status is refused: %s", manifest["metadata"]["name"], error)
            await self._context.recorder.event(manifest, "StatusRefused", str(error)[:1024], type_="Warning")
            new = without_reports(old, new)
            written = await self._context.replace_status({**manifest, "status": new.manifest()})
        for notice in notices(old, new):
            await self._context.recorder.event(written, notice.reason, notice.message, type_=notice.type)

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
        """True if a FineTuneJob's Job controls the pod: no other pod is sent requests."""
        metadata = pod["metadata"]
        name = (metadata.get("labels") or {}).get(render.JOB_LABEL, "")
        manifest = self._context.caches[KIND].get(metadata["namespace"], name)
        owner = controller_of(pod, "Job")
        job = self._context.caches["Job"].get(metadata["namespace"], owner["name"]) if owner is not None else None
        return (
            manifest is not None
            and owner is not None
            and job is not None
            and job["metadata"]["uid"] == owner["uid"]
            and is_job_of(manifest, job)
        )

    def _progressed(self, pod: Object) -> None:
        for key in label_keys(KIND, render.JOB_LABEL)(pod):
            self._context.queue.add(key)


def _job_of_pod(pod: Object) -> Iterable[str]:
    name = (pod["metadata"].get("labels") or {}).get(render.JOB_LABEL)
    if name:
        yield f"{pod['metadata'].get('namespace', '')}/{name}"
