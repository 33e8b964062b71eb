"""What every reconciler gets: the caches, the queue, and writes whose answers go into the caches."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tunesmith.api.finetunejob import FineTuneJob
from tunesmith.cluster.errors import ClusterError
from tunesmith.controller.cache import Caches
from tunesmith.controller.metrics import Metrics
from tunesmith.controller.namespaces import NamespaceLabels
from tunesmith.controller.parsed import Parsed
from tunesmith.controller.workqueue import WorkQueue

if TYPE_CHECKING:
    from collections.abc import Callable

    from tunesmith.cluster.client import Cluster, PatchType, Propagation
    from tunesmith.cluster.events import EventRecorder
    from tunesmith.cluster.resources import Object
    from tunesmith.contracts.agent import Keys
    from tunesmith.controller.settings import OperatorSettings


class NotLeadingError(ClusterError):
    """A write was held back: another replica may lead by now."""

    label = "not_leading"


@dataclass
class Context:
    """The controller's state that reconcilers share."""

    cluster: Cluster
    settings: OperatorSettings
    recorder: EventRecorder
    metrics: Metrics = field(default_factory=Metrics)
    caches: Caches = field(default_factory=Caches)
    namespaces: NamespaceLabels = field(default_factory=NamespaceLabels)
    queue: WorkQueue = field(default_factory=WorkQueue)
    epoch: int = 0
    """Rises with each new leader; 0 while this process has not led yet."""
    may_write: Callable[[], bool] = lambda: True
    """Whether this process surely leads now; it does not after a stall in which the Lease ran out."""
    written: Callable[[Object], None] = lambda _: None
    """Called with each object that was written: its watch event will be nothing new to the cache."""
    cluster_uid: str = ""
    """Uid of the namespace kube-system; empty where it may not be read. Set before the first reconcile."""
    installation_keys: Keys = ()
    """The keys that all tokens derive from, newest first. Set before the first reconcile, renewed in a rotation."""
    jobs: Parsed[FineTuneJob] = field(init=False)
    """The FineTuneJobs. Their status is the record of their attempts, which nothing else holds."""

    def __post_init__(self) -> None:
        self.jobs = Parsed(self.caches["FineTuneJob"], FineTuneJob, is_status_kept=True)

    def now(self) -> datetime:
        """The time, UTC."""
        return datetime.now(UTC)

    async def create(self, manifest: Object) -> Object:
        """Create an object.

        Raises:
            AlreadyExistsError: there is one of that name.
        """
        self._check()
        return self._seen(await self.cluster.create(manifest))

    async def apply(self, manifest: Object) -> Object:
        """Server-side apply of the full intent. A Secret is overwritten: the operator must not be able to read it."""
        self._check()
        if manifest["kind"] == "Secret":
            await self.cluster.overwrite(manifest)
            return manifest
        return self._seen(await self.cluster.apply(manifest))

    async def patch(
        self, item: Object, body: Object, *, type_: PatchType = "merge", subresource: str | None = None
    ) -> Object:
        """Change this incarnation of an object that somebody else owns.

        Raises:
            ConflictError: another object has its name by now.
        """
        self._check()
        metadata = item["metadata"]
        body = {**body, "metadata": {**body.get("metadata", {}), "uid": metadata["uid"]}}
        return self._seen(
            await self.cluster.patch(
                item["kind"], metadata["name"], metadata.get("namespace"), body, type_=type_, subresource=subresource
            )
        )

    async def replace_status(self, manifest: Object) -> Object:
        """Write the status of an object as it was read, with another `status`.

        Raises:
            ConflictError: the object changed since it was read; the key comes back by itself.
        """
        self._check()
        return self._seen(await self.cluster.replace_status(manifest))

    async def delete(self, item: Object, propagation: Propagation = "Background") -> bool:
        """Delete this incarnation of an object and what it owns; False where it is gone already.

        With `Foreground` it stays, marked as being deleted, until what it owns is gone.
        """
        self._check()
        metadata = item["metadata"]
        return await self.cluster.delete(
            item["kind"], metadata["name"], metadata.get("namespace"), propagation=propagation, uid=metadata["uid"]
        )

    def _check(self) -> None:
        if not self.may_write():
            raise NotLeadingError("this replica no longer leads")

    def _seen(self, item: Object) -> Object:
        if self.caches[item["kind"]].put(item):
            self.written(item)
        return item
