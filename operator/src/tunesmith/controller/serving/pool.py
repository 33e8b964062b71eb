"""Reconciler of ServingPools: pods, their adapters, readiness gates, and one status write."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from tunesmith.autoscale.activity import Activity
from tunesmith.autoscale.decide import Decision, decide_pods, loaded_pods, pods_for_copies
from tunesmith.autoscale.schedule import minimum
from tunesmith.cluster.errors import ConflictError, NotFoundError
from tunesmith.contracts.agent import (
    control_keys,
    events_keys,
    gateway_keys,
    keys_file,
    metrics_digests,
    pod_tokens,
    serving_keys,
)
from tunesmith.contracts.claims import older_claim
from tunesmith.contracts.environment import CONTROL_KEY, EVENTS_KEY, METRICS_DIGEST, SERVING_KEY
from tunesmith.contracts.labels import POOL_LABEL
from tunesmith.contracts.location import reads_foreign_store
from tunesmith.contracts.refusal import MAX_RETRY_SECONDS
from tunesmith.contracts.scheduling import scheduling_violation
from tunesmith.controller.finetunejob import BASE_JOB
from tunesmith.controller.reconciler import MANAGED, Key, Result, Watch, key_of, label_keys, owner_keys
from tunesmith.controller.serving.agents import Target
from tunesmith.controller.serving.decision_log import log_size
from tunesmith.controller.serving.pool_rollouts import PoolRollouts
from tunesmith.controller.serving.state import MODEL
from tunesmith.serving.adapter import copies_of, copies_of_rollouts, is_whole, needs_room
from tunesmith.serving.crashes import crash_events
from tunesmith.serving.pod import DELETION_COST, READINESS_GATE
from tunesmith.serving.pool import PlacementCache, PoolObservation, PoolPlan, plan, refusal_of_pods
from tunesmith.serving.poolview import PoolView
from tunesmith.serving.render import deployment, disruption_budget, isolation, key_secret, reserved
from tunesmith.serving.rollback import effective_pool, next_rollback
from tunesmith.serving.rolling import Rollout, cause_of, needs_room_check, observe_rollout, stamped, surge
from tunesmith.serving.scale_events import scale_events
from tunesmith.serving.trained_base import BaseModelProblem, forbidden_job, resolve_base, with_base
from tunesmith.streams import Tokens

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tunesmith.api.adapterdeployment import AdapterDeployment
    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith.api.servingpool import ServingPool, ServingPoolStatus
    from tunesmith.cluster.resources import Object
    from tunesmith.contracts.agent import Keys
    from tunesmith.contracts.refusal import Refusal
    from tunesmith.contracts.transitions import NewEvent
    from tunesmith.controller.serving.state import ServingState
    from tunesmith.serving.pod import PoolPod

KIND = "ServingPool"
_TICK_SECONDS = 2.0
_REQUESTS_SECONDS = 10.0
_NUMBER_OF_REQUESTS = re.compile(r"\(\d+ now\)")
_UNSETTLED_SECONDS = 0.3
_RETRY = "tunesmith.dev/retry"
"""Annotation of a Deployment whose pods are refused, changed to trigger a retry."""
_REST = 4
"""Rest after a decision, as a multiple of its duration: one pool takes at most a fifth of the operator's time."""
_MIN_REST_SECONDS = 0.1
_MAX_REST_SECONDS = 2.0


class ServingPoolReconciler:
    """Reconciler of ServingPools."""

    kind = KIND

    def __init__(self, state: ServingState) -> None:
        self._state = state
        self._context = state.context
        self._executor = state.executor
        self._views: dict[str, PoolView] = {}
        self._placements: dict[str, PlacementCache] = {}
        self._activities: dict[str, Activity] = {}
        self._rollouts = PoolRollouts(self._context)
        self._written: dict[str, float] = {}
        self._uids: dict[Key, str] = {}

    @property
    def watches(self) -> Sequence[Watch]:
        """Deployment, pods and adapters of a pool."""
        return (
            Watch("Deployment", owner_keys(KIND), MANAGED),
            Watch("Pod", label_keys(KIND, POOL_LABEL), MANAGED),
            Watch("AdapterDeployment", _keys_of_adapter),
            Watch("FineTuneJob", self._keys_of_job),
        )

    async def reconcile(self, key: Key) -> Result:
        """Reconcile one ServingPool."""
        manifest = self._context.caches[KIND].get(key.namespace, key.name)
        if manifest is None or manifest["metadata"].get("deletionTimestamp"):
            self._forget(key)
            return Result()
        pool = self._state.pools.get(key.namespace, key.name)
        if pool is None:
            self._rollouts.forget(manifest["metadata"]["uid"])
            await self._state.statuses.write_unreadable(manifest, self._state.pools.error(manifest))
            return Result()
        barred = forbidden_job(pool, self._context.settings.shared_namespaces)
        found = resolve_base(pool, self._job(pool), self._context.settings.store) if barred is None else None
        declared, pool = pool, with_base(effective_pool(pool, pool.status.rollback), found)
        self._uids[key] = pool.metadata.uid
        self._follow(key, pool)
        if not self._state.settled(pool):
            # Placing adapters without knowing those of the pods would move them needlessly.
            return Result(_UNSETTLED_SECONDS)
        attached = self._state.attached(pool)
        invalid = barred or reserved(pool) or self._forbidden(pool)
        decision, spread = self._pods(pool, attached)
        observed, pods = self._state.deployment(pool), self._state.pods(pool)
        rendered = deployment(pool, self._context.settings, decision.replicas)
        has_base = pool.spec.base_model.uri is not None
        rollout = (
            observe_rollout(pool, rendered, observed, pods, self._context.now())
            if has_base
            else Rollout(f"{key.namespace}/{key.name}")
        )
        rollback = next_rollback(declared, rollout)
        pool = with_base(effective_pool(declared, rollback), found)
        hold = self._rollouts.record(pool.metadata.uid, rollout, self._state.pools.list)
        needs_check = needs_room_check(pool, decision.replicas, rollout)
        has_room = await self._rollouts.has_room(pool, rendered) if needs_check else None
        observation = PoolObservation(
            deployment=observed,
            pods=pods,
            adapters=attached,
            decision=decision,
            spread=spread,
            lost_to=older_claim(pool, self._state.claims(pool)),
            invalid=invalid,
            unknown_demand=self._state.demand.unknown_reason(time.monotonic()),
            rollout=rollout,
            rollback=rollback,
            hold=hold,
            running=self._running(pool, attached, rollout),
            busy=self._busy(pool, pods),
            max_surge=surge(pool, decision.replicas, rollout, observed, has_room=has_room),
            base_problem=found if isinstance(found, BaseModelProblem) else None,
        )
        started = time.perf_counter()
        cache = self._placements.setdefault(pool.metadata.uid, PlacementCache())
        pool_plan = plan(pool, observation, self._context.now(), cache)
        rest = min(_MAX_REST_SECONDS, _REST * (time.perf_counter() - started))
        may_apply = invalid is None and has_base
        refused = await self._apply(pool, observation, pool_plan.replicas) if may_apply else None
        if not may_apply or refused is not None:
            self._rollouts.withdraw(pool.metadata.uid)
        refused = await self._act(pool, pool_plan) or refused
        if refused is not None:
            pool_plan = plan(pool, replace(observation, refusal=refused), self._context.now(), cache)
        self._wake_adapters(pool, observation, pool_plan, attached)
        if not self._differs_in_requests_only(pool, pool_plan.status):
            if await self._state.statuses.write(manifest, pool_plan.status, events=partial(_events, pool.status)):
                log_size(f"{KIND} {key.namespace}/{key.name}", pool.status.desired_replicas, decision)
            self._written[pool.metadata.uid] = time.monotonic()
        return Result(_TICK_SECONDS, rest if rest > _MIN_REST_SECONDS else 0.0)

    def _differs_in_requests_only(self, pool: ServingPool, status: ServingPoolStatus) -> bool:
        """Return True if only figures about requests changed, and a status was written a moment ago."""
        if time.monotonic() - self._written.get(pool.metadata.uid, float("-inf")) >= _REQUESTS_SECONDS:
            return False
        return status != pool.status and _without_requests(status) == _without_requests(pool.status)

    def _forbidden(self, pool: ServingPool) -> str | None:
        """Return the reason why the installation does not allow the pool's pods; None if it allows them."""
        settings, spec = self._context.settings, pool.spec
        uri = spec.base_model.uri
        # The location of a FineTuneJob's model is computed; `forbidden_job` decides about it.
        if pool.base_job is None and uri and reads_foreign_store(settings.store, pool.metadata.namespace, uri):
            return (
                f"spec.baseModel.uri {uri} is in this installation's store, but outside the folder "
                f"of namespace {pool.metadata.namespace}: use a location outside the store"
            )
        return scheduling_violation(spec.scheduling, spec.resources, settings)

    def _keys_of_job(self, job: Object) -> Iterable[Key]:
        """Return the pools whose base model is the result of a FineTuneJob."""
        metadata = job["metadata"]
        pools = self._context.caches[KIND].find(BASE_JOB, f"{metadata['namespace']}/{metadata['name']}")
        return map(key_of, pools)

    def _job(self, pool: ServingPool) -> FineTuneJob | None:
        """Return the FineTuneJob whose whole model is the pool's base; None if it does not exist."""
        return None if pool.base_job is None else self._state.jobs.get(*pool.base_job)

    async def run(self) -> None:
        """Read the agents' streams and send them their lists."""
        await self._state.agents.run()

    def _follow(self, key: Key, pool: ServingPool) -> None:
        targets = {
            pod.uid: self._target(pool, pod, pod.address)
            for pod in self._state.pods(pool)
            if pod.address and not pod.stopping
        }
        self._state.agents.sync(pool.metadata.uid, targets, lambda: self._context.queue.add(key))

    def _target(self, pool: ServingPool, pod: PoolPod, address: str) -> Target:
        place = (pool.metadata.namespace, pool.metadata.uid)

        def installation() -> Keys:
            return self._context.installation_keys

        return Target(
            f"pod {pod.namespace}/{pod.name}",
            address,
            Tokens(installation, lambda keys: pod_tokens(events_keys(gateway_keys(keys), *place), pod.uid)),
            Tokens(installation, lambda keys: pod_tokens(control_keys(keys, *place), pod.uid)),
        )

    def _forget(self, key: Key) -> None:
        """Discard the state of a deleted pool; Kubernetes deletes its dependents by their owner references."""
        uid = self._uids.pop(key, None)
        if uid is not None:
            self._state.forget_pool(uid)
            self._executor.forget(uid)
            self._views.pop(uid, None)
            self._placements.pop(uid, None)
            self._activities.pop(uid, None)
            self._rollouts.forget(uid)
            self._written.pop(uid, None)

    def _pods(self, pool: ServingPool, attached: Sequence[AdapterDeployment]) -> tuple[Decision, bool]:
        """Return the desired pods, and True if adapters may move to spread them."""
        rule = pool.spec.autoscaling
        if rule is None:
            self._state.forget_window(pool.metadata.uid)
            return Decision(pool.spec.replicas, f"spec.replicas is {pool.spec.replicas}"), True
        copies = {adapter.model: copies_of(adapter) for adapter in attached if needs_room(adapter)}
        slots = pool.spec.engine.max_loras
        floor, why = pods_for_copies(copies | copies_of_rollouts(attached), pool.spec.engine.adapter_capacity)
        if not floor and pool.status.base_model_fingerprint is None:
            floor, why = 1, "a new pool starts once, to learn its base model's fingerprint"
        bases = [pool.model, *(adapter.model for adapter in attached if is_whole(adapter))]
        window = self._state.window(pool.metadata.uid, copies.keys(), rule.scale_down_delay_seconds, floor, bases)
        low = minimum(rule, self._context.now())
        decision = decide_pods(window, pool.status.desired_replicas, rule, low, why, slots)
        return decision, loaded_pods(window, rule, slots) > 1

    def _busy(self, pool: ServingPool, pods: Sequence[PoolPod]) -> frozenset[str]:
        """Return the adapters of a pool that are active much of the time, by the reports of its pods."""
        activity = self._activities.setdefault(pool.metadata.uid, Activity())
        activity.observe({name for pod in pods for name in pod.active}, time.monotonic())
        return activity.busy

    async def _apply(self, pool: ServingPool, observation: PoolObservation, replicas: int) -> Refusal | None:
        """Apply each of the pool's objects, even if others are refused; return one of the refusals."""
        refusals = [
            await self._executor.apply(pool.metadata.uid, key_secret(pool, self._pool_keys(pool))),
            await self._executor.apply(pool.metadata.uid, disruption_budget(pool)),
            *[await self._executor.apply(pool.metadata.uid, policy) for policy in self._policies(pool)],
            await self._apply_deployment(pool, observation, replicas),
        ]
        return next((refusal for refusal in reversed(refusals) if refusal is not None), None)

    def _running(self, pool: ServingPool, attached: Sequence[AdapterDeployment], rollout: Rollout) -> int | None:
        """Return the requests for the pool's models while its pods are to be replaced; None otherwise or if unknown."""
        if rollout.change is None and not rollout.outdated:
            return None
        demand = self._state.demand.read([pool.model, *(adapter.model for adapter in attached)], time.monotonic())
        return demand.requests if demand.complete else None

    async def _apply_deployment(self, pool: ServingPool, observation: PoolObservation, replicas: int) -> Refusal | None:
        """Apply the Deployment, but only its number of pods until their replacement may begin."""
        observed = observation.deployment
        if observation.hold is not None and observed is not None:
            if observed["spec"].get("replicas") == replicas:
                return None
            return await self._executor.patch(pool.metadata.uid, observed, {"spec": {"replicas": replicas}})
        manifest = stamped(
            deployment(pool, self._context.settings, replicas, observation.max_surge),
            pool,
            cause_of(observation.rollout),
        )
        if refusal_of_pods(observed) is not None:
            # Kubernetes retries after up to 17 minutes, but at once after a change, which it copies to the ReplicaSet.
            manifest["metadata"]["annotations"][_RETRY] = str(int(self._context.now().timestamp() // MAX_RETRY_SECONDS))
        generation = observed["metadata"]["generation"] if observed is not None else -1
        return await self._executor.apply(pool.metadata.uid, manifest, generation)

    def _policies(self, pool: ServingPool) -> list[Object]:
        network = self._context.settings.network
        return [isolation(pool, network)] if network.policies else []

    def _pool_keys(self, pool: ServingPool) -> dict[str, bytes]:
        """Return the files of the pool's Secret."""
        installation = self._context.installation_keys
        gateway, place = gateway_keys(installation), (pool.metadata.namespace, pool.metadata.uid)
        return {
            CONTROL_KEY: keys_file(control_keys(installation, *place)),
            EVENTS_KEY: keys_file(events_keys(gateway, *place)),
            SERVING_KEY: keys_file(serving_keys(gateway, *place)),
            METRICS_DIGEST: keys_file(metrics_digests(gateway)),
        }

    async def _act(self, pool: ServingPool, pool_plan: PoolPlan) -> Refusal | None:
        """Send the lists, and set deletion costs and gates; return the refusal of one of these writes."""
        refused: Refusal | None = None
        links = self._state.agents.of(pool.metadata.uid)
        for pod in self._state.pod_manifests(pool):
            name, link = pod["metadata"]["name"], links.get(pod["metadata"]["uid"])
            if link is not None and name in pool_plan.assigned:
                link.set_desired(pool_plan.assigned[name])
            try:
                if name in pool_plan.costs:
                    cost = {"annotations": {DELETION_COST: str(pool_plan.costs[name])}}
                    refused = await self._executor.patch(pool.metadata.uid, pod, {"metadata": cost}) or refused
                if name in pool_plan.gates:
                    refused = await self._set_gate(pool, pod, is_open=pool_plan.gates[name]) or refused
            except (NotFoundError, ConflictError):
                continue  # the pod is deleted; the cache will be updated soon
        return refused

    async def _set_gate(self, pool: ServingPool, pod: Object, *, is_open: bool) -> Refusal | None:
        condition = {
            "type": READINESS_GATE,
            "status": "True" if is_open else "False",
            "reason": "AdaptersResident" if is_open else "EngineNotReady",
            "lastTransitionTime": self._context.now().strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        # A strategic merge preserves the kubelet's conditions.
        body: Object = {"status": {"conditions": [condition]}}
        return await self._executor.patch(pool.metadata.uid, pod, body, type_="strategic", subresource="status")

    def _wake_adapters(
        self,
        pool: ServingPool,
        observation: PoolObservation,
        pool_plan: PoolPlan,
        attached: Iterable[AdapterDeployment],
    ) -> None:
        """Make the adapters due whose status depends on changes of the pods or the placement."""
        uid = pool.metadata.uid
        self._state.unplaced[uid] = pool_plan.unplaced
        view = PoolView(tuple(observation.pods), pool_plan.unplaced)
        changed = view.changed_since(self._views.get(uid))
        self._views[uid] = view
        if changed is None:
            for adapter in attached:
                self._context.queue.add(Key("AdapterDeployment", adapter.metadata.namespace, adapter.metadata.name))
            return
        for name in changed:
            for item in self._context.caches["AdapterDeployment"].find(MODEL, name.partition("@")[0]):
                self._context.queue.add(key_of(item))


def _events(before: ServingPoolStatus, after: ServingPoolStatus) -> list[NewEvent]:
    return [*scale_events("pods", before.desired_replicas, after), *crash_events(before, after)]


def _without_requests(status: ServingPoolStatus) -> ServingPoolStatus:
    conditions = [
        condition.model_copy(update={"message": _NUMBER_OF_REQUESTS.sub("", condition.message)})
        for condition in status.conditions
    ]
    return status.model_copy(update={"conditions": conditions, "active_adapters": None, "pods": []})


def _keys_of_adapter(adapter: Object) -> Iterable[Key]:
    """Return the pool that serves an adapter, and the pool that its spec names."""
    namespace = adapter["metadata"]["namespace"]
    for pool in ((adapter.get("status") or {}).get("pool"), adapter["spec"].get("pool")):
        if pool:
            yield Key(KIND, pool.get("namespace") or namespace, pool["name"])
