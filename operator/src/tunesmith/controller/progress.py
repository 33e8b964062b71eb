"""Polling of `/progress` of running training pods, independent of reconciles."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import aiohttp

from tunesmith.contracts.addresses import url_host
from tunesmith.contracts.progress import PROGRESS_MAX_BYTES, PROGRESS_PORT, parse_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tunesmith.api.finetunejob_status import ProgressStatus
    from tunesmith.cluster.resources import Object, Objects

_log = logging.getLogger(__name__)
_INTERVAL_SECONDS = 2.0
_TIMEOUT = aiohttp.ClientTimeout(total=1.0)
_MAX_CONCURRENT = 32
_OK = 200


class ProgressPoller:
    """Latest progress of each running pod. Pods are not trusted: 1 s, 64 KiB, no redirects, a strict schema."""

    def __init__(
        self, pods: Callable[[], Objects], changed: Callable[[Object], None], port: int = PROGRESS_PORT
    ) -> None:
        """Initialise.

        Args:
            pods: returns the running pods.
            changed: called with a pod whose progress has changed.
            port: port of the pods' progress server.
        """
        self._pods = pods
        self._changed = changed
        self._port = port
        self._samples: dict[str, ProgressStatus] = {}
        self._malformed: set[str] = set()
        """UIDs of the running pods whose malformed progress was logged."""

    def newest(self, pods: Iterable[Object]) -> ProgressStatus | None:
        """Return the latest sample of any running pod among these, or None."""
        return next(
            (self._samples[pod["metadata"]["uid"]] for pod in pods if pod["metadata"]["uid"] in self._samples), None
        )

    async def run(self) -> None:
        """Poll every 2 s. Runs until cancelled."""
        slots = asyncio.Semaphore(_MAX_CONCURRENT)
        connector = aiohttp.TCPConnector(limit=_MAX_CONCURRENT, force_close=True)
        async with aiohttp.ClientSession(timeout=_TIMEOUT, connector=connector) as session:
            while True:
                pods = [pod for pod in self._pods() if pod.get("status", {}).get("podIP")]
                self._samples = {
                    uid: self._samples[uid] for uid in (pod["metadata"]["uid"] for pod in pods) if uid in self._samples
                }
                self._malformed &= {pod["metadata"]["uid"] for pod in pods}
                await asyncio.gather(*(self._pull(session, slots, pod) for pod in pods))
                await asyncio.sleep(_INTERVAL_SECONDS)

    async def _pull(self, session: aiohttp.ClientSession, slots: asyncio.Semaphore, pod: Object) -> None:
        uid, address = pod["metadata"]["uid"], pod["status"]["podIP"]
        try:
            async with (
                slots,
                session.get(f"http://{url_host(address)}:{self._port}/progress", allow_redirects=False) as response,
            ):
                if response.status != _OK:
                    return
                body = bytearray()
                async for chunk in response.content.iter_chunked(8192):
                    body += chunk
                    if len(body) > PROGRESS_MAX_BYTES:
                        return
                sample = parse_progress(bytes(body))
        except (aiohttp.ClientError, OSError, TimeoutError):
            # The pod may be starting or stopping; keep the latest sample.
            return
        except ValueError as error:
            if uid not in self._malformed:
                metadata = pod["metadata"]
                _log.warning("pod %s/%s: %s", metadata["namespace"], metadata["name"], str(error)[:500])
            self._malformed.add(uid)
            return
        if self._samples.get(uid) != sample:
            self._samples[uid] = sample
            self._changed(pod)
