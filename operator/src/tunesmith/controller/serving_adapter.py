"""AdapterDeployments: source, pool, copies and revisions → one status write. What pods hold follows from the status."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tunesmith.api.servingpool import ServingPool
from tunesmith.autoscale.decide import Decision, decide_copies
from tunesmith.contracts.claims import lost_to
from tunesmith.controller.reconciler import Key, Result, Watch
from tunesmith.serving.rollout import Observation, plan
from tunesmith.serving.source import Artifact, candidates, choose_pool, may_attach, reference, resolve_artifact

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tunesmith.api.adapterdeployment import AdapterDeployment
    from tunesmith.cluster.resources import Object
    from tunesmith.controller.serving_state import ServingState

KIND = "AdapterDeployment"
_TICK_SECONDS = 1.0
_LOST_SECONDS = 5.0
_UNSETTLED_SECONDS = 0.3


class AdapterDeploymentReconciler:
    """Serves what AdapterDeployments ask for."""

    kind = KIND

    def __init__(self, state: ServingState) -> None:
        self._state = state
        self._context = state.context

    @property
    def watches(self) -> Sequence[Watch]:
        """Sources, pools, and the others that claim the same name."""
        return (
            Watch("FineTuneJob", self._keys_of_job),
            Watch("ServingPool", self._keys_of_pool),
            Watch(KIND, self._keys_of_rivals),
        )

    async def reconcile(self, key: Key) -> Result:
        """One pass."""
        manifest = self._context.caches[KIND].get(key.namespace, key.name)
        if manifest is None or manifest["metadata"].get("deletionTimestamp"):
            self._state.forget_windows()
            return Result()
        adapter = self._state.adapters.get(key.namespace, key.name)
        if adapter is None:
            await self._state.report_unreadable(manifest, self._state.adapters.error(manifest))
            return Result()
        job = self._state.jobs.get(key.namespace, adapter.spec.adapter_from.fine_tune_job.name)
        artifact = resolve_artifact(adapter, job, self._context.settings.store)
        fingerprint = artifact.fingerprint if isinstance(artifact, Artifact) else None
        shared = self._context.settings.shared_pool_namespaces
        pools = self._state.pools.list()
        pool = choose_pool(adapter, fingerprint, candidates(adapter, fingerprint, pools, shared))
        serving = pool if isinstance(pool, ServingPool) else self._still_serving(adapter, pools)
        if serving is not None and adapter.status.revisions and not self._state.settled(serving):
            # What the pods hold is not known yet, and a status that says so would only flicker.
            return Result(_UNSETTLED_SECONDS)
        seen = Observation(
            artifact=artifact,
            pool=pool,
            lost_to=lost_to(adapter, self._state.claims(adapter)),
            pods=self._state.pods(serving) if serving is not None else (),
            unplaced=self._state.unplaced.get(serving.metadata.uid, {}) if serving is not None else {},
            decision=self._copies(adapter),
            unknown_demand=self._state.demand.missing(time.monotonic()),
            url=_client_url(self._context.settings.gateway_url),
        )
        status = plan(adapter, seen, self._context.now())
        old = adapter.status.pool
        written = await self._state.write_status(manifest, status, adapter.status.conditions)
        if written and old is not None and old != status.pool:
            # It is no longer among those that read this adapter, and takes it from its pods.
            self._context.queue.add(Key("ServingPool", old.namespace or key.namespace, old.name))
        if seen.lost_to is not None:
            # The name is free again when its holder changes, under whatever name it has then.
            return Result(_LOST_SECONDS)
        return Result(_TICK_SECONDS if adapter.spec.autoscaling is not None else None)

    async def run(self) -> None:
        """Read the gateways' demand."""
        await self._state.gateways.run()

    def _copies(self, adapter: AdapterDeployment) -> Decision:
        rule = adapter.spec.autoscaling
        if rule is None:
            return Decision(adapter.spec.replicas, f"spec.replicas is {adapter.spec.replicas}")
        window = self._state.window(adapter.metadata.uid, [adapter.model], rule.scale_down_delay_seconds)
        return decide_copies(window, adapter.status.desired_replicas, rule)

    def _still_serving(self, adapter: AdapterDeployment, pools: Iterable[ServingPool]) -> ServingPool | None:
        """The pool that served so far, while the new choice is not made."""
        old = adapter.status.pool
        return next(
            (
                pool
                for pool in pools
                if old is not None and reference(pool) == old and may_attach(pool, adapter.metadata.namespace)
            ),
            None,
        )

    def _keys_of_job(self, job: Object) -> Iterable[Key]:
        namespace, name = job["metadata"]["namespace"], job["metadata"]["name"]
        adapters = self._state.adapters.list(namespace)
        return self._state.keys_of(
            adapter for adapter in adapters if adapter.spec.adapter_from.fine_tune_job.name == name
        )

    def _keys_of_pool(self, pool: Object) -> Iterable[Key]:
        """Those that the pool serves, those that name it, those that wait for any, and rivals for its base's name."""
        place = (pool["metadata"]["namespace"], pool["metadata"]["name"])
        base = f"{place[0]}/{pool['spec'].get('modelName')}"
        return self._state.keys_of(
            adapter
            for adapter in self._state.adapters.list()
            if (adapter.status.pool is None and adapter.spec.pool is None)
            or adapter.model == base
            or any(
                named is not None and (named.namespace or adapter.metadata.namespace, named.name) == place
                for named in (adapter.status.pool, adapter.spec.pool)
            )
        )

    def _keys_of_rivals(self, manifest: Object) -> Iterable[Key]:
        metadata = manifest["metadata"]
        model = f"{metadata['namespace']}/{manifest['spec'].get('modelName') or metadata['name']}"
        return self._state.keys_of(
            adapter
            for adapter in self._state.adapters.list(metadata["namespace"])
            if adapter.model == model and adapter.metadata.uid != metadata["uid"]
        )


def _client_url(gateway: str) -> str:
    return f"{gateway.rstrip('/')}/v1" if gateway else ""
