"""Current demand per model, by which the operator scales."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import TYPE_CHECKING

from tunesmith.contracts.agent import HEARTBEAT_SECONDS, TRAFFIC_SECONDS, AdapterDemand, GatewayDemand
from tunesmith.gateway.broadcast import Broadcast, wait_for_event
from tunesmith.gateway.comparison import Comparisons
from tunesmith.gateway.key_use import KeyUse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

MIN_INTERVAL_SECONDS = 0.1
"""Changes within this time are combined into one line."""


class Demand:
    """Counts of running and waiting sequences by the model's global id."""

    def __init__(self) -> None:
        self.running: Counter[str] = Counter()
        self.running_by_revision: Counter[str] = Counter()
        """Those of forwarded requests, by engine name."""
        self.waiting: Counter[str] = Counter()
        self.comparisons = Comparisons()
        """Comparisons of shadows."""
        self.key_use = KeyUse(time.time)
        """Last use of API keys."""
        self._changed = Broadcast()

    def add_running(self, model: str, engine_name: str, count: int) -> None:
        """Change the number of sequences of forwarded requests."""
        self._add(self.running, model, count)
        self._add(self.running_by_revision, engine_name, count)

    def add_waiting(self, model: str, count: int) -> None:
        """Change the number of sequences of held requests."""
        self._add(self.waiting, model, count)

    def _add(self, counter: Counter[str], model: str, count: int) -> None:
        counter[model] += count
        if not counter[model]:
            del counter[model]
        self._changed.notify()

    def snapshot(self) -> GatewayDemand:
        """Return the current counts; models without requests are omitted."""
        models = self.running.keys() | self.waiting.keys()
        return GatewayDemand(
            models={
                model: AdapterDemand(running=self.running[model], waiting=self.waiting[model])
                for model in sorted(models)
            }
        )

    async def lines(self) -> AsyncIterator[bytes]:
        """Yield NDJSON lines: immediately, on each change, and at least once per heartbeat.

        Comparisons and the use of keys are in the first line, and later if they have changed, at most every
        `TRAFFIC_SECONDS`.
        """
        loop = asyncio.get_running_loop()
        seen, keys_seen, due = 0, 0, loop.time()
        while True:
            changed = self._changed.next()
            line = self.snapshot()
            if loop.time() >= due:
                seen, line.comparisons = self.comparisons.since(seen)
                keys_seen, line.used_keys = self.key_use.since(keys_seen)
                due = loop.time() + TRAFFIC_SECONDS
            yield line.model_dump_json(by_alias=True).encode() + b"\n"
            await asyncio.sleep(MIN_INTERVAL_SECONDS)
            await wait_for_event(changed, HEARTBEAT_SECONDS - MIN_INTERVAL_SECONDS)
