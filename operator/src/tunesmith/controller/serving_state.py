"""What the reconcilers of ServingPools and AdapterDeployments share: parsed resources, agents, demand."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Generic, TypeVar

from pydantic import ValidationError

from tunesmith.api.adapterdeployment import AdapterDeployment
from tunesmith.api.finetunejob import FineTuneJob
from tunesmith.api.model import ApiModel
from tunesmith.api.servingpool import ServingPool
from tunesmith.autoscale.decide import Sample, Window
from tunesmith.autoscale.demand import DemandBoard
from tunesmith.contracts.agent import SILENCE_SECONDS
from tunesmith.contracts.claims import Claim, claim_of
from tunesmith.controller.reconciler import Key
from tunesmith.controller.serving_streams import AgentLinks, GatewayLinks
from tunesmith.serving.pod import PoolPod, observe_pod
from tunesmith.serving.render import POOL_UID_LABEL
from tunesmith.serving.source import may_attach

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tunesmith.cluster.resources import Object, Objects
    from tunesmith.controller.cache import Cache
    from tunesmith.controller.context import Context

_PATIENCE_SECONDS = 5.0
_SAMPLE_SECONDS = 0.5
_log = logging.getLogger(__name__)
M = TypeVar("M", bound=ApiModel)


class Parsed(Generic[M]):
    """The objects of a cache as models; each version is parsed once."""

    def __init__(self, cache: Cache, model: type[M]) -> None:
        self._cache = cache
        self._model = model
        self._known: dict[str, tuple[str, M | None]] = {}

    def get(self, namespace: str, name: str) -> M | None:
        """The object; None where there is none, it is being deleted, or it is not of this release's schema."""
        manifest = self._cache.get(namespace, name)
        return None if manifest is None else self._parse(manifest)

    def list(self, namespace: str | None = None) -> list[M]:
        """All objects, or those of one namespace, without those that `get` gives None for."""
        manifests = self._cache.list(namespace)
        if namespace is None and len(self._known) > 2 * len(manifests) + 100:
            self._known.clear()
        return [model for manifest in manifests if (model := self._parse(manifest)) is not None]

    def _parse(self, manifest: Object) -> M | None:
        metadata = manifest["metadata"]
        if metadata.get("deletionTimestamp"):
            return None
        version, model = self._known.get(metadata["uid"], ("", None))
        if version != metadata["resourceVersion"]:
            try:
                model = self._model.model_validate(manifest)
            except ValidationError as error:
                place = f"{metadata.get('namespace')}/{metadata['name']}"
                _log.warning("%s %s is not of this release's schema: %s", manifest["kind"], place, error)
                model = None
            self._known[metadata["uid"]] = (metadata["resourceVersion"], model)
        return model


class ServingState:
    """Shared by both reconcilers; for one event loop."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.pools = Parsed(context.caches["ServingPool"], ServingPool)
        self.adapters = Parsed(context.caches["AdapterDeployment"], AdapterDeployment)
        self.jobs = Parsed(context.caches["FineTuneJob"], FineTuneJob)
        self.agents = AgentLinks(context)
        self.demand = DemandBoard(SILENCE_SECONDS)
        self.gateways = GatewayLinks(context, self.demand)
        self.unplaced: dict[str, Mapping[str, str]] = {}
        """By pool UID and engine name, why copies have no place."""
        self._windows: dict[str, tuple[float, Window]] = {}

    def claims(self, resource: AdapterDeployment | ServingPool) -> list[Claim]:
        """All claims on the model name that a resource claims."""
        namespace, model = resource.metadata.namespace, resource.model
        adapters = [claim_of(adapter) for adapter in self.adapters.list(namespace) if adapter.model == model]
        return adapters + [claim_of(pool) for pool in self.pools.list(namespace) if pool.model == model]

    def attached(self, pool: ServingPool) -> list[AdapterDeployment]:
        """The AdapterDeployments that the pool serves, the oldest first."""
        place = (pool.metadata.namespace, pool.metadata.name)
        found = [
            adapter
            for adapter in self.adapters.list()
            if adapter.status.pool is not None
            and (adapter.status.pool.namespace or adapter.metadata.namespace, adapter.status.pool.name) == place
            and may_attach(pool, adapter.metadata.namespace)
        ]
        return sorted(found, key=lambda adapter: (str(adapter.metadata.creation_timestamp), adapter.metadata.uid))

    def pods(self, pool: ServingPool) -> list[PoolPod]:
        """The pool's pods, with what their agents said."""
        links, now = self.agents.of(pool.metadata.uid), time.monotonic()
        found = []
        for manifest in self.pod_manifests(pool):
            link = links.get(manifest["metadata"]["uid"])
            if link is None:
                found.append(observe_pod(manifest))
            else:
                found.append(observe_pod(manifest, link.state, heard=link.heard(now)))
        return found

    def pod_manifests(self, pool: ServingPool) -> Objects:
        """The pool's pods as the API server has them."""
        pods = self.context.caches["Pod"].list(pool.metadata.namespace)
        return [pod for pod in pods if (pod["metadata"].get("labels") or {}).get(POOL_UID_LABEL) == pool.metadata.uid]

    def settled(self, pool: ServingPool) -> bool:
        """Whether every ready pod's agent was heard since this process leads, or was given time enough to be."""
        links, now = self.agents.of(pool.metadata.uid), time.monotonic()
        for pod in self.pods(pool):
            if not pod.ready or pod.stopping or pod.state is not None:
                continue
            link = links.get(pod.uid)
            if link is None or now - link.since < _PATIENCE_SECONDS:
                return False
        return True

    def window(self, uid: str, models: Iterable[str], keep_seconds: float, floor: int = 0) -> Window:
        """The window of an autoscaled resource, with demand as it is now."""
        now = time.monotonic()
        last, window = self._windows.get(uid, (float("-inf"), Window()))
        if now - last >= _SAMPLE_SECONDS:
            demand = self.demand.read(now)
            window.add(Sample(now, demand.of(models), complete=demand.complete, floor=floor), keep_seconds)
            self._windows[uid] = (now, window)
        return window

    def forget_windows(self) -> None:
        """Drop the windows of resources that are gone or not autoscaled any more."""
        living = {adapter.metadata.uid for adapter in self.adapters.list() if adapter.spec.autoscaling is not None}
        living |= {pool.metadata.uid for pool in self.pools.list() if pool.spec.autoscaling is not None}
        for uid in self._windows.keys() - living:
            del self._windows[uid]

    def keys_of(self, adapters: Iterable[AdapterDeployment]) -> list[Key]:
        """Work-queue keys."""
        return [Key("AdapterDeployment", adapter.metadata.namespace, adapter.metadata.name) for adapter in adapters]
