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
from tunesmith.cluster.errors import ForbiddenError, InvalidError
from tunesmith.contracts.agent import SILENCE_SECONDS
from tunesmith.contracts.claims import Claim, claim_of
from tunesmith.controller.reconciler import Key
from tunesmith.controller.serving_streams import AgentLinks, GatewayLinks
from tunesmith.serving.notice import notices
from tunesmith.serving.pod import PoolPod, observe_pod
from tunesmith.serving.render import deployment_name, is_owned_by, is_pod_of
from tunesmith.serving.source import may_attach
from tunesmith.serving.unreadable import unreadable_status

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tunesmith.api.adapterdeployment import AdapterDeploymentStatus
    from tunesmith.api.conditions import Condition
    from tunesmith.api.servingpool import ServingPoolStatus
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
        """Return the object; None where it does not exist, is being deleted, or does not fit this release's schema."""
        manifest = self._cache.get(namespace, name)
        return None if manifest is None else self._parse(manifest)

    def list(self, namespace: str | None = None) -> list[M]:
        """Return all objects, or those of one namespace, without those that `get` returns None for."""
        manifests = self._cache.list(namespace)
        if namespace is None and len(self._known) > 2 * len(manifests) + 100:
            self._known.clear()
        return [model for manifest in manifests if (model := self._parse(manifest)) is not None]

    def error(self, manifest: Object) -> str:
        """Return a sentence on why an object does not fit this release's schema."""
        try:
            self._model.model_validate({**manifest, "status": {}})
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            return f"{where} does not fit the schema of this release: {first['msg']}; correct it and apply it again"
        return "it does not fit the schema of this release"

    def _parse(self, manifest: Object) -> M | None:
        metadata = manifest["metadata"]
        if metadata.get("deletionTimestamp"):
            return None
        version, model = self._known.get(metadata["uid"], ("", None))
        if version != metadata["resourceVersion"]:
            model = self._validate(manifest)
            self._known[metadata["uid"]] = (metadata["resourceVersion"], model)
        return model

    def _validate(self, manifest: Object) -> M | None:
        try:
            return self._model.model_validate(manifest)
        except ValidationError:
            place = f"{manifest['kind']} {manifest['metadata'].get('namespace')}/{manifest['metadata']['name']}"
        # A status is observed again; only a spec that cannot be read keeps the object from being served.
        try:
            model = self._model.model_validate({**manifest, "status": {}})
        except ValidationError:
            _log.warning("%s: %s", place, self.error(manifest))
            return None
        _log.warning("the status of %s does not fit the schema of this release and is written again", place)
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
                unheard = now - max(link.heard_at, link.since)
                found.append(
                    observe_pod(
                        manifest,
                        link.state,
                        heard=link.heard(now),
                        unheard_seconds=unheard,
                        stream_error=link.error,
                    )
                )
        return found

    def pod_manifests(self, pool: ServingPool) -> Objects:
        """Return the pool's pods as the API server has them."""
        return [pod for pod in self.context.caches["Pod"].list(pool.metadata.namespace) if is_pod_of(pool, pod)]

    def deployment(self, pool: ServingPool) -> Object | None:
        """Return the pool's own Deployment; None where there is none, or one of that name has another owner."""
        found = self.context.caches["Deployment"].get(pool.metadata.namespace, deployment_name(pool))
        return found if found is not None and is_owned_by(pool, found) else None

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
            demand = self.demand.read(models, now)
            window.add(Sample(now, demand.requests, complete=demand.complete, floor=floor), keep_seconds)
            self._windows[uid] = (now, window)
        return window

    def forget_windows(self) -> None:
        """Drop the windows of resources that are gone or not autoscaled any more."""
        living = {adapter.metadata.uid for adapter in self.adapters.list() if adapter.spec.autoscaling is not None}
        living |= {pool.metadata.uid for pool in self.pools.list() if pool.spec.autoscaling is not None}
        for uid in self._windows.keys() - living:
            del self._windows[uid]

    async def write_status(
        self, manifest: Object, status: ServingPoolStatus | AdapterDeploymentStatus, before: Sequence[Condition]
    ) -> bool:
        """Write a status that differs from the observed one, and an Event for each condition that changed.

        Returns:
            True if it was written.

        Raises:
            ClusterError: it could not be written; a refusal is reported by an Event.
        """
        document = status.manifest()
        if document == manifest.get("status", {}):
            return False
        try:
            written = await self.context.replace_status({**manifest, "status": document})
        except (InvalidError, ForbiddenError) as error:
            message = f"the API server refuses the status, which is out of date: {error}"
            await self.context.recorder.event(manifest, "StatusRefused", message, type_="Warning")
            raise
        for notice in notices(before, status.conditions):
            await self.context.recorder.event(written, notice.reason, notice.message, type_=notice.type)
        return True

    async def report_unreadable(self, manifest: Object, message: str) -> None:
        """Write a condition on an object that does not fit this release's schema. Nothing else of it is changed."""
        document = unreadable_status(manifest, message, self.context.now())
        if document != manifest.get("status"):
            written = await self.context.replace_status({**manifest, "status": document})
            await self.context.recorder.event(written, "InvalidSpec", message, type_="Warning")

    def keys_of(self, adapters: Iterable[AdapterDeployment]) -> list[Key]:
        """Work-queue keys."""
        return [Key("AdapterDeployment", adapter.metadata.namespace, adapter.metadata.name) for adapter in adapters]
