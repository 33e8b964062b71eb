"""Shared state of the reconcilers of ServingPools and AdapterDeployments: parsed resources, agents, demand."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from tunesmith.api.adapterdeployment import AdapterDeployment
from tunesmith.api.servingpool import ServingPool
from tunesmith.autoscale.demand import DemandTracker
from tunesmith.autoscale.window import Sample, Window
from tunesmith.contracts.agent import STALE_AFTER_SECONDS
from tunesmith.contracts.claims import ModelNameClaim, model_name_claim, precedence
from tunesmith.contracts.labels import POOL_UID_LABEL
from tunesmith.controller.executor import Executor
from tunesmith.controller.finetunejob import BASE_JOB, base_job_key
from tunesmith.controller.parsed import Parsed
from tunesmith.controller.reconciler import key_of
from tunesmith.controller.serving.agents import AgentLinks
from tunesmith.controller.serving.gateways import GatewayLinks
from tunesmith.controller.serving.keyuse import KeyUseWriter
from tunesmith.controller.status import StatusWriter
from tunesmith.serving.pod import PoolPod, observe_pod
from tunesmith.serving.render import deployment_name, is_owned_by, is_pod_of
from tunesmith.serving.resolve import Candidates, candidates

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from tunesmith.cluster.resources import Object, Objects
    from tunesmith.contracts.agent import PodState
    from tunesmith.controller.context import Context
    from tunesmith.controller.serving.agents import AgentLink

MODEL = "model"
"""Index of AdapterDeployments and ServingPools by the global id that they claim."""
SERVED_BY, NAMES, WAITING = "served-by", "names", "waiting"
"""Indexes of AdapterDeployments: by the pool in their status, by the pool in their spec, and those with neither."""
SOURCE = "source"
"""Index of AdapterDeployments by their FineTuneJob."""
OPEN_BASE = "open-base"
"""Index of ServingPools that may admit other namespaces, by the fingerprint of their base."""
POOL = "pool"
"""Index of pods by their pool's UID."""
_MAX_FOREIGN_POOLS = 50
_FIRST_REPORT_SECONDS = 5.0
_SAMPLE_SECONDS = 0.5


@dataclass(frozen=True)
class _ObservedPod:
    """A pod, and the versions of its manifest and of its agent's state."""

    pod: PoolPod
    version: str
    state: PodState | None

    @classmethod
    def observe(cls, manifest: Object, link: AgentLink | None, now: float) -> Self:
        version = manifest["metadata"]["resourceVersion"]
        if link is None:
            return cls(observe_pod(manifest), version, None)
        pod = observe_pod(
            manifest,
            link.state,
            is_reporting=link.is_reporting(now),
            silent_seconds=now - max(link.last_report_at, link.since),
            stream_error=link.error,
        )
        return cls(pod, version, link.state)

    def is_current(self, manifest: Object, link: AgentLink | None, now: float) -> bool:
        """Return True if observing it again would return an equal pod."""
        if self.version != manifest["metadata"]["resourceVersion"]:
            return False
        if link is None:
            return self.pod.silent_seconds is None
        return self.pod.is_reporting and link.is_reporting(now) and link.state is self.state


class _ObservedPods:
    """The pods of a pool, and what they were observed from.

    Args:
        manifests: of its pods, as the cache returned them.
        by_uid: its pods.
        links: their agents; None for a pod that is not followed.
    """

    def __init__(
        self, manifests: Objects, by_uid: Mapping[str, _ObservedPod], links: Mapping[str, AgentLink | None]
    ) -> None:
        self.by_uid = by_uid
        self.pods = [observed.pod for observed in by_uid.values()]
        self.unreported = [pod for pod in self.pods if pod.ready and not pod.stopping and pod.state is None]
        """Ready pods whose agents have not reported."""
        self._manifests = manifests
        self._observed = [(observed, uid, links[uid]) for uid, observed in by_uid.items()]

    def is_current(self, manifests: Objects, links: Mapping[str, AgentLink], now: float) -> bool:
        """Return True if observing the pods again would return equal ones."""
        if manifests is not self._manifests:
            return False
        for observed, uid, link in self._observed:
            if links.get(uid) is not link:
                return False
            if link is None:
                if observed.pod.silent_seconds is not None:
                    return False
            elif link.state is not observed.state or not (
                observed.pod.is_reporting and now - link.last_report_at <= STALE_AFTER_SECONDS
            ):
                return False
        return True


class ServingState:
    """State shared by both reconcilers; for one event loop."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.pools = Parsed(context.caches["ServingPool"], ServingPool)
        self.adapters = Parsed(context.caches["AdapterDeployment"], AdapterDeployment)
        self.jobs = context.jobs
        self.statuses = StatusWriter(context)
        self.executor = Executor(context)
        for kind, name, values in _INDEXES:
            context.caches[kind].index(name, values)
        self.agents = AgentLinks(context)
        self.demand = DemandTracker(STALE_AFTER_SECONDS, on_first_requests=self._wake_model)
        self.key_use = KeyUseWriter(context.cluster, context.settings.namespace)
        self.gateways = GatewayLinks(context, self.demand, self.key_use)
        self.unplaced: dict[str, Mapping[str, str]] = {}
        """Reasons why there is no room for copies, by pool UID and engine name."""
        self._windows: dict[str, tuple[float, Window]] = {}
        self._attached: dict[str, tuple[object, tuple[AdapterDeployment, ...]]] = {}
        self._pods: dict[str, _ObservedPods] = {}
        self._pod_manifests: dict[str, tuple[int, Objects]] = {}

    def claims(self, resource: AdapterDeployment | ServingPool) -> list[ModelNameClaim]:
        """Return all claims on the model name that a resource claims."""
        adapters = [model_name_claim(adapter) for adapter in self.adapters.find(MODEL, resource.model)]
        return adapters + [model_name_claim(pool) for pool in self.pools.find(MODEL, resource.model)]

    def candidates(self, adapter: AdapterDeployment, fingerprint: str | None) -> Candidates:
        """Return the pools that may serve an AdapterDeployment."""
        shared = self.context.settings.shared_namespaces
        wanted, labels = adapter.spec.pool, self.context.namespaces.labels(adapter.metadata.namespace)
        named = None
        if wanted is not None:
            named = self.pools.get(wanted.namespace or adapter.metadata.namespace, wanted.name)
        found = [named]
        # The message about a named pool that is missing or does not admit the namespace lists the other pools.
        if named is None or not named.admits(adapter.metadata.namespace, labels):
            for namespace in {adapter.metadata.namespace, *shared}:
                found += self.pools.list(namespace)
            found += self.pools.find(OPEN_BASE, fingerprint or "")[:_MAX_FOREIGN_POOLS]
        pools = {pool.metadata.uid: pool for pool in found if pool is not None}
        return candidates(adapter, fingerprint, pools.values(), shared, labels)

    def attached(self, pool: ServingPool) -> tuple[AdapterDeployment, ...]:
        """Return the AdapterDeployments that the pool serves, oldest first.

        The same tuple is returned until one of them, or a condition for attaching, changes.
        """
        place = f"{pool.metadata.namespace}/{pool.metadata.name}"
        namespaces = self.context.namespaces
        allowed = pool.spec.allowed_namespaces
        inputs = (
            self.context.caches["AdapterDeployment"].revision(SERVED_BY, place),
            allowed,
            namespaces.revision if allowed.selector is not None else 0,
        )
        known = self._attached.get(pool.metadata.uid)
        if known is not None and known[0] == inputs:
            return known[1]
        found = [
            adapter
            for adapter in self.adapters.find(SERVED_BY, place)
            if pool.admits(adapter.metadata.namespace, namespaces.labels(adapter.metadata.namespace))
        ]
        attached = tuple(
            sorted(found, key=lambda adapter: precedence(adapter.metadata.creation_timestamp, adapter.metadata.uid))
        )
        self._attached[pool.metadata.uid] = (inputs, attached)
        return attached

    def pods(self, pool: ServingPool) -> Sequence[PoolPod]:
        """Return the pool's pods, with their agents' reports. The same object is returned for an unchanged pod."""
        uid, now = pool.metadata.uid, time.monotonic()
        links, manifests = self.agents.of(uid), self.pod_manifests(pool)
        known = self._pods.get(uid)
        if known is not None and known.is_current(manifests, links, now):
            return known.pods
        before, observed = known.by_uid if known is not None else {}, {}
        for manifest in manifests:
            pod_uid = manifest["metadata"]["uid"]
            link, old = links.get(pod_uid), before.get(pod_uid)
            if old is None or not old.is_current(manifest, link, now):
                old = _ObservedPod.observe(manifest, link, now)
            observed[pod_uid] = old
        self._pods[uid] = _ObservedPods(manifests, observed, {pod_uid: links.get(pod_uid) for pod_uid in observed})
        return self._pods[uid].pods

    def pod_manifests(self, pool: ServingPool) -> Objects:
        """Return the manifests of the pool's pods."""
        cache, uid = self.context.caches["Pod"], pool.metadata.uid
        revision, known = self._pod_manifests.get(uid, (-1, []))
        if revision != cache.revision(POOL, uid):
            known = [pod for pod in cache.find(POOL, uid) if is_pod_of(pool, pod)]
            self._pod_manifests[uid] = (cache.revision(POOL, uid), known)
        return known

    def deployment(self, pool: ServingPool) -> Object | None:
        """Return the pool's Deployment; None if it does not exist, or has another owner."""
        found = self.context.caches["Deployment"].get(pool.metadata.namespace, deployment_name(pool))
        return found if found is not None and is_owned_by(pool, found) else None

    def settled(self, pool: ServingPool) -> bool:
        """Return True if every ready pod's agent has reported since this process leads, or had enough time to."""
        links, now = self.agents.of(pool.metadata.uid), time.monotonic()
        self.pods(pool)
        for pod in self._pods[pool.metadata.uid].unreported:
            link = links.get(pod.uid)
            if link is None or now - link.since < _FIRST_REPORT_SECONDS:
                return False
        return True

    def window(
        self, uid: str, models: Collection[str], keep_seconds: float, floor: int = 0, bases: Sequence[str] = ()
    ) -> Window:
        """Return the window of an autoscaled resource, updated with the current demand.

        Args:
            uid: UID of the resource.
            models: global ids of its adapters.
            keep_seconds: see `Window.add`.
            floor: size that is needed at any load.
            bases: global ids of models that need no adapter slot, such as a pool's base model.
        """
        now = time.monotonic()
        last, window = self._windows.get(uid) or (float("-inf"), Window())
        if now - last >= _SAMPLE_SECONDS:
            demand = self.demand.read(models, now)
            if bases:
                demand += replace(self.demand.read(bases, now), active=0)
            window.add(Sample.of(demand, now, floor), keep_seconds)
            self._windows[uid] = (now, window)
        return window

    def forget_window(self, uid: str) -> None:
        """Discard the window of a resource that is deleted or no longer autoscaled."""
        self._windows.pop(uid, None)

    def forget_adapter(self, uid: str) -> None:
        """Discard the state of a deleted AdapterDeployment."""
        self.forget_window(uid)
        self.adapters.forget(uid)

    def forget_pool(self, uid: str) -> None:
        """Discard the state of a deleted ServingPool, and stop reading its agents."""
        self.agents.sync(uid, {}, lambda: None)
        self.forget_window(uid)
        self.pools.forget(uid)
        for known in (self.unplaced, self._attached, self._pods, self._pod_manifests):
            known.pop(uid, None)

    def _wake_model(self, model: str) -> None:
        """Make the adapters of a model due on its first requests, since they may be due much later."""
        for item in self.context.caches["AdapterDeployment"].find(MODEL, model):
            self.context.queue.add(key_of(item))


def _model(item: Object) -> Iterable[str]:
    metadata = item["metadata"]
    yield f"{metadata['namespace']}/{item['spec'].get('modelName') or metadata['name']}"


def _served_by(adapter: Object) -> Iterable[str]:
    yield from _pool(adapter, (adapter.get("status") or {}).get("pool"))


def _named(adapter: Object) -> Iterable[str]:
    yield from _pool(adapter, adapter["spec"].get("pool"))


def _pool(adapter: Object, reference: Mapping[str, Any] | None) -> Iterable[str]:
    if reference:
        yield f"{reference.get('namespace') or adapter['metadata']['namespace']}/{reference['name']}"


def _waiting(adapter: Object) -> Iterable[str]:
    if not adapter["spec"].get("pool") and not (adapter.get("status") or {}).get("pool"):
        # By namespace, and under "" for all namespaces.
        yield from (adapter["metadata"]["namespace"], "")


def _source(adapter: Object) -> Iterable[str]:
    job = adapter["spec"]["adapterFrom"].get("fineTuneJob")
    if job:
        yield f"{adapter['metadata']['namespace']}/{job['name']}"


def _open_base(pool: Object) -> Iterable[str]:
    found = {(pool.get("status") or {}).get("baseModelFingerprint"), pool["spec"].get("equivalentTo")}
    if is_shared(pool):
        yield from (fingerprint for fingerprint in found if fingerprint)


def is_shared(pool: Object) -> bool:
    """Return True if a pool may admit other namespaces than its own."""
    return bool((pool["spec"].get("allowedNamespaces") or {}).get("from", "Same") != "Same")


def _pool_of_pod(pod: Object) -> Iterable[str]:
    uid = (pod["metadata"].get("labels") or {}).get(POOL_UID_LABEL)
    if uid:
        yield uid


_INDEXES: tuple[tuple[str, str, Callable[[Object], Iterable[str]]], ...] = (
    ("AdapterDeployment", MODEL, _model),
    ("AdapterDeployment", SERVED_BY, _served_by),
    ("AdapterDeployment", NAMES, _named),
    ("AdapterDeployment", WAITING, _waiting),
    ("AdapterDeployment", SOURCE, _source),
    ("ServingPool", MODEL, _model),
    ("ServingPool", OPEN_BASE, _open_base),
    ("ServingPool", BASE_JOB, base_job_key),
    ("Pod", POOL, _pool_of_pod),
)
