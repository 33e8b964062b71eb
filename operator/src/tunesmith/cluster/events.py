"""Kubernetes Events about a resource, one object per distinct event."""

from __future__ import annotations

import contextlib
import hashlib
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal

from tunesmith.cluster.errors import AlreadyExistsError, ClusterError

if TYPE_CHECKING:
    from tunesmith.cluster.client import Cluster
    from tunesmith.cluster.resources import Object

_REPEAT_INTERVAL = timedelta(minutes=10)
_MAX_REMEMBERED = 10_000
_MAX_MESSAGE = 1024


class EventRecorder:
    """Writer of core/v1 Events. An event that repeats within 10 minutes is written once.

    Events are created and never changed: the right to patch events would include reading those of every namespace. A
    failed write never affects the caller.
    """

    def __init__(self, cluster: Cluster, component: str = "tunesmith-operator") -> None:
        self._cluster = cluster
        self._component = component
        self._written: dict[str, datetime] = {}

    async def event(
        self,
        about: Object,
        reason: str,
        message: str,
        *,
        type_: Literal["Normal", "Warning"] = "Normal",
        now: datetime | None = None,
    ) -> None:
        """Write an event about an object that has kind, apiVersion and metadata."""
        now = now or datetime.now(UTC)
        metadata = about["metadata"]
        namespace = metadata.get("namespace") or "default"
        digest = hashlib.sha256("\0".join((metadata["uid"], type_, reason, message)).encode()).hexdigest()[:16]
        last = self._written.get(digest)
        if last is not None and now - last < _REPEAT_INTERVAL:
            return
        if len(self._written) >= _MAX_REMEMBERED:
            self._written.clear()
        self._written[digest] = now
        # Another process finds the name taken during the same period.
        period = int(now.timestamp() // _REPEAT_INTERVAL.total_seconds())
        name = f"{metadata['name']}.{digest}{period:08x}"
        stamp = now.strftime("%Y-%m-%dT%H:%M:%SZ")
        manifest: Object = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": namespace},
            "involvedObject": {
                "apiVersion": about["apiVersion"],
                "kind": about["kind"],
                "name": metadata["name"],
                "namespace": namespace,
                "uid": metadata["uid"],
                "resourceVersion": metadata.get("resourceVersion", ""),
            },
            "reason": reason,
            "message": message[:_MAX_MESSAGE],
            "type": type_,
            "source": {"component": self._component},
            "firstTimestamp": stamp,
            "lastTimestamp": stamp,
            "count": 1,
        }
        try:
            with contextlib.suppress(AlreadyExistsError):
                await self._cluster.create(manifest)
        except ClusterError:
            # The status has the same information; the next pass may write the event.
            self._written.pop(digest, None)
