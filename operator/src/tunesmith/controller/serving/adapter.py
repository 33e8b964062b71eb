"""Reconciler of AdapterDeployments: source, pool, copies and revisions → one status write.

The adapters that pods hold follow from the status.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

from tunesmith.api.servingpool import ServingPool
from tunesmith.autoscale.decide import Decision, decide_copies, seconds_until_next
from tunesmith.autoscale.schedule import minimum
from tunesmith.cluster.errors import AlreadyExistsError
from tunesmith.contracts.claims import older_claim
from tunesmith.contracts.ownership import controller_of
from tunesmith.controller.executor import Executor, name_taken
from tunesmith.controller.namespaces import KIND as NAMESPACE
from tunesmith.controller.reconciler import MANAGED, Key, Result, Watch, key_of, owner_keys
from tunesmith.controller.serving.decision_log import log_size
from tunesmith.controller.serving.queries import PrometheusQueries
from tunesmith.controller.serving.state import MODEL, NAMES, SERVED_BY, SOURCE, WAITING, is_shared
from tunesmith.jobs.observe import view
from tunesmith.serving.adapter import NO_PROMETHEUS, AdapterObservation, is_base, plan, pods_about, was_never_loaded
from tunesmith.serving.imports import ADAPTER_LABEL, import_job, is_import_of, plan_import
from tunesmith.serving.resolve import Artifact, choose, resolve_artifact
from tunesmith.serving.rollout_status import expressions, rollout_events, without_measures
from tunesmith.serving.scale_events import scale_events

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tunesmith.api.adapterdeployment import AdapterDeployment, AdapterDeploymentStatus
    from tunesmith.cluster.resources import Object
    from tunesmith.contracts.transitions import NewEvent
    from tunesmith.controller.serving.state import ServingState
    from tunesmith.serving.imports import ImportPlan
    from tunesmith.serving.pod import PoolPod
    from tunesmith.serving.resolve import Unresolved

KIND = "AdapterDeployment"
_TICK_SECONDS = 1.0
_NAME_TAKEN_SECONDS = 60.0
_UNSETTLED_SECONDS = 0.3
_MEASURES_SECONDS = 10.0
"""Shortest time between two writes of the figures of a rollout."""


class AdapterDeploymentReconciler:
    """Reconciler of AdapterDeployments."""

    kind = KIND

    def __init__(self, state: ServingState) -> None:
        self._state = state
        self._context = state.context
        self._adapters = self._context.caches[KIND]
        self._executor = Executor(self._context)
        self._uids: dict[Key, str] = {}
        self._pools: dict[Key, tuple[object, ...]] = {}
        self._claims: dict[str, tuple[str, bool]] = {}
        self._queries = PrometheusQueries(self._context.settings.prometheus_url, self._context.now)
        self._written: dict[str, float] = {}
        self._settled: dict[str, tuple[object, ...]] = {}
        """Inputs of the plans whose status is written already: equal inputs need no other plan."""

    @property
    def watches(self) -> Sequence[Watch]:
        """Sources, Jobs of imports, pools, and other AdapterDeployments that claim the same name."""
        return (
            Watch("Job", owner_keys(KIND), MANAGED),
            Watch("Pod", self._keys_of_pod, MANAGED),
            Watch("FineTuneJob", self._keys_of_job),
            Watch("ServingPool", self._keys_of_pool),
            Watch(KIND, self._keys_of_rivals),
            Watch(NAMESPACE, self._keys_of_namespace),
        )

    async def reconcile(self, key: Key) -> Result:
        """Reconcile one AdapterDeployment."""
        manifest = self._context.caches[KIND].get(key.namespace, key.name)
        if manifest is None or manifest["metadata"].get("deletionTimestamp"):
            self._forget(key)
            return Result()
        adapter = self._state.adapters.get(key.namespace, key.name)
        if adapter is None:
            await self._state.statuses.write_unreadable(manifest, self._state.adapters.error(manifest))
            return Result()
        self._uids[key] = adapter.metadata.uid
        imported = await self._import(adapter)
        artifact = imported.artifact if imported is not None else self._trained(adapter)
        fingerprint = artifact.fingerprint if isinstance(artifact, Artifact) else None
        pool = choose(adapter, artifact, self._state.candidates(adapter, fingerprint))
        serving = pool if isinstance(pool, ServingPool) else self._still_serving(adapter)
        if serving is not None and adapter.status.revisions and not self._state.settled(serving):
            # The adapters of the pods are not known yet, and reporting that would make the status flicker.
            return Result(_UNSETTLED_SECONDS)
        pods = self._state.pods(serving) if serving is not None else ()
        decision, decide_later = (
            (_on_all(pods), _TICK_SECONDS) if is_base(adapter, artifact, serving) else self._copies(adapter)
        )
        observation = AdapterObservation(
            artifact=artifact,
            pool=pool,
            lost_to=older_claim(adapter, self._state.claims(adapter)),
            pods=pods,
            unplaced=self._state.unplaced.get(serving.metadata.uid, {}) if serving is not None else {},
            decision=decision,
            unknown_demand=self._state.demand.unknown_reason(time.monotonic()),
            url=_client_url(self._context.settings.gateway_url),
            imported=imported.record if imported is not None else None,
            queries=self._queries.results(adapter.metadata.uid),
            no_queries="" if self._queries.is_enabled else NO_PROMETHEUS,
            comparisons={
                revision.engine_name: tuple(self._state.demand.comparisons(revision.engine_name).values())
                for revision in adapter.status.revisions
                if revision.shadow_percent
            },
        )
        later = imported.requeue_after.total_seconds() if imported is not None and imported.requeue_after else None
        # The first request to a model makes the key due immediately.
        result = Result(later if adapter.spec.autoscaling is None else decide_later)
        inputs = self._inputs(manifest, adapter, observation)
        if inputs is not None and self._settled.get(adapter.metadata.uid) == inputs:
            return result
        status = plan(adapter, observation, self._context.now())
        self._queries.want(adapter.metadata.uid, expressions(adapter, status))
        old = adapter.status.pool
        is_deferred = self._differs_in_measures_only(adapter, status)
        written = not is_deferred and await self._state.statuses.write(
            manifest, status, events=partial(_events, adapter.status)
        )
        if inputs is None or written or is_deferred:
            self._settled.pop(adapter.metadata.uid, None)
        else:
            self._settled[adapter.metadata.uid] = inputs
        if written:
            self._written[adapter.metadata.uid] = time.monotonic()
            log_size(f"{KIND} {key.namespace}/{key.name}", adapter.status.desired_replicas, decision)
        if written and old is not None and old != status.pool:
            # The old pool is no longer indexed for this adapter, and has to remove it from its pods.
            self._context.queue.add(Key("ServingPool", old.namespace or key.namespace, old.name))
        if observation.lost_to is not None:
            # A change of the owner's claim makes the key due; this covers missed changes.
            return Result(_NAME_TAKEN_SECONDS)
        if status.rollout is not None and status.rollout.is_running:
            return Result(_TICK_SECONDS)
        return result

    def _forget(self, key: Key) -> None:
        """Discard the state of a deleted AdapterDeployment."""
        uid = self._uids.pop(key, None)
        if uid is not None:
            self._executor.forget(uid)
            self._state.forget_adapter(uid)
            self._queries.want(uid, {})
            self._written.pop(uid, None)
            self._settled.pop(uid, None)

    def _inputs(
        self, manifest: Object, adapter: AdapterDeployment, observation: AdapterObservation
    ) -> tuple[object, ...] | None:
        """Return what the status depends on besides the time; None if the time or measurements count too."""
        rollout, pool = adapter.status.rollout, observation.pool
        if (rollout is not None and rollout.is_running) or observation.lost_to is not None or observation.comparisons:
            return None
        chosen: object = pool
        if isinstance(pool, ServingPool):
            current = self._context.caches["ServingPool"].get(pool.metadata.namespace, pool.metadata.name)
            chosen = None if current is None else _pool_facts(current)
        names = [revision.engine_name for revision in adapter.status.revisions]
        pods = tuple(
            (
                pod.uid,
                pod.name,
                pod.ready,
                pod.stopping,
                pod.answering,
                pod.is_reporting,
                *map(pod.residency, names),
            )
            for pod in pods_about(observation.pods, adapter.status.revisions)
        )
        return (
            manifest["metadata"]["resourceVersion"],
            observation.artifact,
            chosen,
            pods,
            sum(1 for pod in observation.pods if pod.answering),
            [observation.unplaced.get(name) for name in names],
            observation.decision.replicas,
            observation.unknown_demand,
            observation.imported,
        )

    def _trained(self, adapter: AdapterDeployment) -> Artifact | Unresolved:
        source = adapter.spec.adapter_from.fine_tune_job
        assert source is not None  # noqa: S101 - a rule of the spec: an adapter without it is imported
        job = self._state.jobs.get(adapter.metadata.namespace, source.name)
        return resolve_artifact(adapter, source.name, job, self._context.settings.store)

    async def _import(self, adapter: AdapterDeployment) -> ImportPlan | None:
        """Import the adapter if its source is not a FineTuneJob; return the plan, None if nothing is imported."""
        source, uid = adapter.spec.adapter_from.artifact, adapter.metadata.uid
        found = {job["metadata"]["name"]: job for job in self._context.caches["Job"].owned(uid)}
        jobs = {name: job for name, job in found.items() if is_import_of(adapter, job)}
        if source is None:
            for job in jobs.values():
                await self._executor.delete(uid, job, "Background")
            return None
        views = {
            name: view(job, self._context.caches["Pod"].owned(job["metadata"]["uid"])) for name, job in jobs.items()
        }
        settings = self._context.settings
        decide = partial(
            plan_import,
            adapter,
            source,
            self._state.candidates(adapter, None),
            views,
            self._context.now(),
            settings.store,
        )
        decision = decide()
        for name in decision.delete:
            await self._executor.delete(uid, jobs[name], "Background")
        if decision.create is None:
            return decision
        rendered = import_job(adapter, source, decision.create, settings, self._context.cluster_uid)
        try:
            refusal = await self._executor.create(uid, rendered)
        except AlreadyExistsError:
            name = rendered["metadata"]["name"]
            existing = await self._context.cluster.find("Job", name, adapter.metadata.namespace)
            if existing is None:
                return replace(decision, requeue_after=timedelta(seconds=_TICK_SECONDS))
            if is_import_of(adapter, existing):
                self._context.caches["Job"].put(existing)
                return replace(decision, requeue_after=timedelta(seconds=_TICK_SECONDS))
            message = f"Job {name} exists and does not belong to this AdapterDeployment: delete it"
            refusal = name_taken("create", rendered, message)
        return decision if refusal is None else decide(refusal)

    async def run(self) -> None:
        """Read the gateways' demand, and evaluate the expressions of rollouts."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._state.gateways.run())
            group.create_task(self._state.key_use.run())
            group.create_task(self._queries.run())

    def _differs_in_measures_only(self, adapter: AdapterDeployment, status: AdapterDeploymentStatus) -> bool:
        """Return True if only figures of a rollout changed, and a status was written a moment ago."""
        if time.monotonic() - self._written.get(adapter.metadata.uid, float("-inf")) >= _MEASURES_SECONDS:
            return False
        return status != adapter.status and without_measures(status) == without_measures(adapter.status)

    def _copies(self, adapter: AdapterDeployment) -> tuple[Decision, float]:
        """Return the desired copies, and the seconds until the next decision is due."""
        rule, desired = adapter.spec.autoscaling, adapter.status.desired_replicas
        if rule is None:
            self._state.forget_window(adapter.metadata.uid)
            return Decision(adapter.spec.replicas, f"spec.replicas is {adapter.spec.replicas}"), _TICK_SECONDS
        # A new revision is loaded once, so that an adapter that cannot be loaded is reported before it is needed.
        rollout = adapter.status.rollout
        floor = 1 if was_never_loaded(adapter) or (rollout is not None and rollout.is_running) else 0
        window = self._state.window(adapter.metadata.uid, [adapter.model], rule.scale_down_delay_seconds, floor)
        low = minimum(rule, self._context.now())
        decision = decide_copies(window, desired, rule, low)
        if decision.replicas != desired:
            return decision, _TICK_SECONDS
        return decision, seconds_until_next(window, decision.replicas, rule, low)

    def _still_serving(self, adapter: AdapterDeployment) -> ServingPool | None:
        """Return the pool that has served so far, until the new choice is made."""
        old = adapter.status.pool
        pool = None if old is None else self._state.pools.get(old.namespace or adapter.metadata.namespace, old.name)
        labels = self._context.namespaces.labels(adapter.metadata.namespace)
        return pool if pool is not None and pool.admits(adapter.metadata.namespace, labels) else None

    def _keys_of_pod(self, pod: Object) -> Iterable[Key]:
        """Return the adapter that a pod imports."""
        owner = controller_of(pod, "Job")
        if owner is None or ADAPTER_LABEL not in (pod["metadata"].get("labels") or {}):
            return
        job = self._context.caches["Job"].get(pod["metadata"]["namespace"], owner["name"])
        if job is not None:
            yield from owner_keys(KIND)(job)

    def _keys_of_job(self, job: Object) -> Iterable[Key]:
        metadata = job["metadata"]
        return map(key_of, self._adapters.find(SOURCE, f"{metadata['namespace']}/{metadata['name']}"))

    def _keys_of_pool(self, pool: Object) -> Iterable[Key]:
        """Return the adapters that the pool serves, that name it, that wait for a pool, or that claim its base's name.

        Empty unless something changed that their status depends on, since a pool's status changes with each of them.
        """
        place, current = key_of(pool), self._context.caches["ServingPool"].get(*key_of(pool)[1:])
        view = None if current is None else _pool_facts(current)
        if self._pools.get(place) == view:
            return ()
        if view is None:
            del self._pools[place]
        else:
            self._pools[place] = view
        name, base = f"{place.namespace}/{place.name}", f"{place.namespace}/{pool['spec'].get('modelName')}"
        values = ((SERVED_BY, name), (NAMES, name), (MODEL, base), (WAITING, self._reach(pool)))
        return {key_of(adapter) for index, value in values for adapter in self._adapters.find(index, value)}

    def _reach(self, pool: Object) -> str:
        """Return the namespace whose adapters may use the pool; empty: all namespaces."""
        return "" if is_shared(pool) else pool["metadata"]["namespace"]

    def _keys_of_namespace(self, namespace: Object) -> Iterable[Key]:
        """Return the namespace's adapters, since its labels decide to which pools they may attach."""
        return map(key_of, self._adapters.list(namespace["metadata"]["name"]))

    def _keys_of_rivals(self, manifest: Object) -> Iterable[Key]:
        """Return the other adapters that claim its current or previous model name."""
        key, uid = key_of(manifest), manifest["metadata"]["uid"]
        current = self._adapters.get(key.namespace, key.name)
        is_gone = current is None or current["metadata"]["uid"] != uid
        model = f"{key.namespace}/{manifest['spec'].get('modelName') or key.name}"
        view = None if is_gone else (model, bool(manifest["metadata"].get("deletionTimestamp")))
        old = self._claims.get(uid)
        if old == view:
            return ()
        if view is None:
            del self._claims[uid]
        else:
            self._claims[uid] = view
        models = {model} if old is None else {model, old[0]}
        return {found for name in models for item in self._adapters.find(MODEL, name) if (found := key_of(item)) != key}


def _events(before: AdapterDeploymentStatus, after: AdapterDeploymentStatus) -> list[NewEvent]:
    return [*scale_events("copies", before.desired_replicas, after), *rollout_events(before, after)]


def _pool_facts(pool: Object) -> tuple[object, ...]:
    metadata, spec, status = pool["metadata"], pool["spec"], pool.get("status") or {}
    return (
        metadata["uid"],
        bool(metadata.get("deletionTimestamp")),
        spec.get("modelName"),
        spec.get("baseModel"),
        spec.get("allowedNamespaces"),
        (spec.get("engine") or {}).get("maxLoraRank"),
        (status.get("rollback") or {}).get("rejectedSpec"),
        status.get("baseModelFingerprint"),
        spec.get("equivalentTo"),
        status.get("baseModelArtifact"),
    )


def _on_all(pods: Sequence[PoolPod]) -> Decision:
    """Return the number of pods that serve their base model."""
    return Decision(sum(1 for pod in pods if not pod.stopping), "the model is the base model of every pod of the pool")


def _client_url(gateway: str) -> str:
    return f"{gateway.rstrip('/')}/v1" if gateway else ""
