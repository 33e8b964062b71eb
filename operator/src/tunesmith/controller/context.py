"""Context of all reconcilers: the caches, the queue, and writes whose responses update the caches."""

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
    """A write was not sent, since another replica may lead by now."""

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
    """Number that increases with each new leader; 0 until this process leads for the first time."""
    may_write: Callable[[], bool] = lambda: True
    """Returns True if this process certainly leads; False, for example, after a stall in which the Lease expired."""
    written: Callable[[Object], None] = lambda _: None
    """Called with each written object, since the cache ignores its watch event as already known."""
    cluster_uid: str = ""
    """UID of the namespace kube-system; empty if it may not be read. Set before the first reconcile."""
    installation_keys: Keys = ()
    """Keys from which all tokens are derived, newest first. Set before the first reconcile, replaced in a rotation."""
    jobs: Parsed[FineTuneJob] = field(init=False)
    """The FineTuneJobs. Their status is the only record of their attempts."""

    def __post_init__(self) -> None:
        self.jobs = Parsed(self.caches["FineTuneJob"], FineTuneJob, is_status_kept=True)

    def now(self) -> datetime:
        """Return the current time, UTC."""
        return datetime.now(UTC)

    async def create(self, manifest: Object) -> Object:
        """Create an object.

        Raises:
            AlreadyExistsError: an object of that name exists.
        """
        self._check()
        return self._cached(await self.cluster.create(manifest))

    async def apply(self, manifest: Object) -> Object:
        """Apply the full intent on the server side. A Secret is overwritten, since the operator must not read it."""
        self._check()
        if manifest["kind"] == "Secret":
            await self.cluster.overwrite(manifest)
            return manifest
        return self._cached(await self.cluster.apply(manifest))

    async def patch(
        self, item: Object, body: Object, *, type_: PatchType = "merge", subresource: str | None = None
    ) -> Object:
        """Patch this incarnation of an object that another controller manages.

        Raises:
            ConflictError: another object has its name by now.
        """
        self._check()
        metadata = item["metadata"]
        body = {**body, "metadata": {**body.get("metadata", {}), "uid": metadata["uid"]}}
        return self._cached(
            await self.cluster.patch(
                item["kind"], metadata["name"], metadata.get("namespace"), body, type_=type_, subresource=subresource
            )
        )

    async def replace_status(self, manifest: Object) -> Object:
        """Replace the status of an object; `manifest` is the object as read, with the new `status`.

        Raises:
            ConflictError: the object changed since it was read; its key is requeued automatically.
        """
        self._check()
        return self._cached(await self.cluster.replace_status(manifest))

    async def delete(self, item: Object, propagation: Propagation = "Background") -> bool:
        """Delete this incarnation of an object and its dependents; return False if it is already deleted.

        With `Foreground` it remains, marked as being deleted, until its dependents are deleted.
        """
        self._check()
        metadata = item["metadata"]
        return await self.cluster.delete(
            item["kind"], metadata["name"], metadata.get("namespace"), propagation=propagation, uid=metadata["uid"]
        )

    def _check(self) -> None:
        if not self.may_write():
            raise NotLeadingError("this replica no longer leads")

    def _cached(self, item: Object) -> Object:
        if self.caches[item["kind"]].put(item):
            self.written(item)
        return item
