"""Leader election by a Lease: one replica leads, and each leader has a higher epoch than its predecessor.

An epoch is the Unix time, in seconds, at which its leader started, but higher than the previous epoch, which the Lease
records. So epochs increase even if the Lease is deleted. The Kubernetes client's own leader election is not used: it
blocks a thread, and has no such epoch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tunesmith.cluster.errors import AlreadyExistsError, ClusterError, ConflictError
from tunesmith.contracts.agent import MAX_EPOCH_LEAD

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from tunesmith.cluster.client import Cluster
    from tunesmith.cluster.resources import Object

LEASE_NAME = "tunesmith-operator"
EPOCH = "tunesmith.dev/epoch"
"""Annotation of the Lease: the epoch of its newest leader."""
_MAX_DIGITS = 15
_log = logging.getLogger(__name__)


class Election:
    """Acquisition and renewal of the Lease.

    A leader that cannot renew stops after 0.8 of the Lease's duration, counted from the start of its last successful
    renewal; another takes over when the Lease has not changed for the whole duration. Both use their own monotonic
    clocks.
    """

    def __init__(self, cluster: Cluster, namespace: str, identity: str, seconds: float) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self._identity = identity
        self._seconds = seconds
        self._lease: Object = {}
        self._last_version: tuple[str, float] = ("", 0.0)
        self._until = 0.0

    def leads(self) -> bool:
        """Return True if the Lease is certainly held now."""
        return time.monotonic() < self._until

    async def run(self, lead: Callable[[int], Awaitable[None]]) -> None:
        """Call `lead(epoch)` whenever this replica becomes the leader, cancel it when it no longer is.

        Runs until cancelled.

        Raises:
            Exception: `lead` raised it.
        """
        while True:
            epoch = await self._acquire()
            _log.info("%s leads, epoch %d", self._identity, epoch)
            leading = asyncio.ensure_future(lead(epoch))
            try:
                await self._keep_renewing(leading)
            finally:
                self._until = 0.0
                leading.cancel()
                await asyncio.wait([leading])
            if not leading.cancelled():
                leading.result()
            _log.warning("%s lost the lease and is waiting for it", self._identity)

    async def release(self) -> None:
        """Release the Lease if this replica holds it, so that another one takes over immediately."""
        self._until = 0.0
        with contextlib.suppress(ClusterError, TimeoutError):
            async with asyncio.timeout(self._seconds):
                # Read it again, since a renewal may have been in flight.
                lease = await self._cluster.find("Lease", LEASE_NAME, self._namespace)
                if lease is not None and lease["spec"].get("holderIdentity") == self._identity:
                    lease["spec"]["holderIdentity"] = ""
                    await self._cluster.replace(lease)

    async def _acquire(self) -> int:
        while True:
            try:
                if await self._try_acquire():
                    return int(self._lease["metadata"]["annotations"][EPOCH])
            except (AlreadyExistsError, ConflictError):
                continue
            except ClusterError as error:
                _log.warning("the lease cannot be read or acquired: %s", error)
            await asyncio.sleep(self._seconds / 5)

    async def _try_acquire(self) -> bool:
        """Acquire the Lease if it is free, expired, or held by this replica since before a restart."""
        started = time.monotonic()
        lease = await self._cluster.find("Lease", LEASE_NAME, self._namespace)
        if lease is None:
            manifest = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease"}
            annotations = {EPOCH: str(next_epoch({}, time.time()))}
            manifest["metadata"] = {  # type: ignore[assignment]
                "name": LEASE_NAME,
                "namespace": self._namespace,
                "annotations": annotations,
            }
            self._lease = await self._cluster.create({**manifest, "spec": self._spec(0)})
            self._until = started + self._seconds * 0.8
            return True
        version = lease["metadata"]["resourceVersion"]
        if version != self._last_version[0]:
            self._last_version = (version, started)
        spec = lease.get("spec") or {}
        duration = spec.get("leaseDurationSeconds") or self._seconds
        if spec.get("holderIdentity") not in ("", None, self._identity) and started - self._last_version[1] < duration:
            return False
        lease["spec"] = self._spec(int(spec.get("leaseTransitions") or 0) + 1)
        annotations = lease["metadata"].get("annotations") or {}
        lease["metadata"]["annotations"] = {**annotations, EPOCH: str(next_epoch(annotations, time.time()))}
        self._lease = await self._cluster.replace(lease)
        self._until = started + self._seconds * 0.8
        return True

    async def _keep_renewing(self, leading: asyncio.Future[None]) -> None:
        """Renew until the Lease is lost or `leading` finishes."""
        while not leading.done() and self.leads():
            await asyncio.wait([leading], timeout=self._seconds / 5)
            started = time.monotonic()
            renewed = {**self._lease, "spec": {**self._lease["spec"], "renewTime": _stamp()}}
            try:
                async with asyncio.timeout(max(0.0, self._until - started)):
                    self._lease = await self._cluster.replace(renewed)
            except ConflictError:
                _log.warning("another replica acquired the lease")
                return
            except (ClusterError, TimeoutError) as error:
                _log.warning("the lease was not renewed: %s", str(error) or "no answer in time")
            else:
                self._until = started + self._seconds * 0.8

    def _spec(self, transitions: int) -> Object:
        now = _stamp()
        return {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": max(1, round(self._seconds)),
            "acquireTime": now,
            "renewTime": now,
            "leaseTransitions": transitions,
        }


def next_epoch(annotations: Mapping[str, str], now: float) -> int:
    """Return the epoch of a leader that starts at `now`, a Unix time, with the Lease's annotations.

    A recorded epoch that agents would refuse as implausible, because it was tampered with, is ignored.
    """
    recorded = annotations.get(EPOCH, "")
    previous = int(recorded) if recorded.isascii() and recorded.isdigit() and len(recorded) <= _MAX_DIGITS else 0
    return max(int(now), previous + 1) if previous < now + MAX_EPOCH_LEAD / 2 else int(now)


def _stamp() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
