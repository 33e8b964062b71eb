"""Current demand per model, by which the operator scales."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import TYPE_CHECKING

from tunesmith.contracts.agent import HEARTBEAT_SECONDS, TRAFFIC_SECONDS, AdapterDemand, GatewayDemand
from tunesmith.contracts.load import NEGLIGIBLE_RATE, Load
from tunesmith.gateway.broadcast import Broadcast, wait_for_event
from tunesmith.gateway.comparison import Comparisons
from tunesmith.gateway.key_use import KeyUse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

MIN_INTERVAL_SECONDS = 0.1
"""Changes within this time are combined into one line."""


class Demand:
    """Counts of running and waiting sequences by the model's global id, their arrival rate and service time.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._loads: dict[str, Load] = {}
        self._arriving: dict[str, Load] = {}
        """Those whose rate is not negligible."""
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

    def arrive(self, model: str, count: int) -> None:
        """Record the sequences of a new request, before it is held or forwarded."""
        load = self._arriving[model] = self._load(model)
        load.arrive(count, self._clock())
        self._changed.notify()

    def finish(self, model: str, count: int, seconds: float) -> None:
        """Record the sequences of a request that a pod accepted, and the time that they were on it."""
        self._load(model).finish(count, seconds, self._clock())

    def keep(self, exists: Callable[[str], bool]) -> None:
        """Discard what is known about models that do not exist."""
        self.comparisons.keep(exists)
        self._loads = {model: load for model, load in self._loads.items() if exists(model)}

    def _load(self, model: str) -> Load:
        load = self._loads.get(model)
        if load is None:
            load = self._loads[model] = Load()
        return load

    def _add(self, counter: Counter[str], model: str, count: int) -> None:
        counter[model] += count
        if not counter[model]:
            del counter[model]
        self._changed.notify()

    def snapshot(self) -> GatewayDemand:
        """Return the current figures; models without requests for some seconds are omitted."""
        now = self._clock()
        rates = {model: rate for model, load in self._arriving.items() if (rate := load.rate(now)) >= NEGLIGIBLE_RATE}
        self._arriving = {model: self._arriving[model] for model in rates}
        return GatewayDemand(
            models={
                model: AdapterDemand(
                    running=self.running[model],
                    waiting=self.waiting[model],
                    arrival_rate=round(rates.get(model, 0.0), 3),
                    service_seconds=self._loads[model].service_seconds if model in self._loads else None,
                )
                for model in sorted(self.running.keys() | self.waiting.keys() | rates.keys())
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
