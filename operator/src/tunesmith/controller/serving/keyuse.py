"""Writes the last use of API keys, which the gateways report."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from tunesmith.cluster.errors import ClusterError
from tunesmith.contracts.keyuse import KEY_USE_NAME, KEY_USE_SECONDS, key_use_record, newest, parse_key_use

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunesmith.cluster.client import Cluster

LOG = logging.getLogger(__name__)


class KeyUseWriter:
    """Last use of all keys, in one ConfigMap that is written at most once in `seconds`.

    Args:
        cluster: the API server.
        namespace: namespace of the gateways.
        seconds: pause between two writes.
    """

    def __init__(self, cluster: Cluster, namespace: str, seconds: float = KEY_USE_SECONDS) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self._seconds = seconds
        self.times: dict[str, int] = {}
        self._changed = asyncio.Event()

    def record(self, times: Mapping[str, int]) -> None:
        """Add what a gateway reports."""
        for name, at in times.items():
            if at > self.times.get(name, 0):
                self.times[name] = at
                self._changed.set()

    async def run(self) -> None:
        """Write what was reported, until cancelled."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                await self._write()
            except ClusterError as error:
                LOG.warning("cannot write the last use of API keys: %s", error)
                self._changed.set()
            await asyncio.sleep(self._seconds)

    async def _write(self) -> None:
        """Merge with the times of the ConfigMap, which an earlier leader may have written."""
        written = parse_key_use(await self._cluster.find("ConfigMap", KEY_USE_NAME, self._namespace))
        self.times = newest(
            {name: max(self.times.get(name, 0), written.get(name, 0)) for name in self.times.keys() | written}
        )
        await self._cluster.apply(key_use_record(self._namespace, self.times))
