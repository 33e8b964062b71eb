"""Measure one round of scaling decisions: every autoscaled AdapterDeployment and its pool once, under traffic.

Reconcilers, caches, queue, windows and placement are the operator's own; API server, kubelet, agents and gateways are
in memory (`tests/serving/operatorworld.py`), so the figures are the operator's CPU time alone.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
import sys
import time
from unittest import mock

from tests.serving.operatorworld import World
from tunesmith.contracts.agent import AdapterDemand, GatewayDemand
from tunesmith.controller.workqueue import WorkQueue

MAX_SECONDS = 1.0
ROUNDS = 4
"""The first ones also fill caches, and the last one is reported."""


class _Clock:
    """Monotonic seconds that pass only between rounds, so that a slow machine has no more work than a fast one."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def _report(world: World, clock: _Clock, count: int, busy: int) -> None:
    """Let two gateways report requests for some adapters; the others have none."""
    line = {
        f"team/adapter-{number}": AdapterDemand(running=2 + number % 3, arrival_rate=1.0, service_seconds=2.0)
        for number in range(0, count, max(1, count // busy))
    }
    for gateway in ("g1", "g2"):
        world.state.demand.record(gateway, GatewayDemand(models=line), clock.now)


async def _settle(world: World, clock: _Clock, count: int, busy: int) -> None:
    """Reconcile until a whole round writes nothing."""
    writes = -1
    while writes != world.store.writes:
        writes = world.store.writes
        clock.now += 3.0
        _report(world, clock, count, busy)
        world.reconcile_everything()
        await world.converge()


async def measure(count: int, pods: int, busy: int, *, profile: bool) -> tuple[float, float, int]:
    """Return the CPU seconds until all adapters are ready, those of a round, and the writes of that round."""
    clock = _Clock()
    with mock.patch("time.monotonic", clock):
        world = World()
        world.context.queue = WorkQueue(clock)
        world.state.demand.expect({"g1": "gateway one", "g2": "gateway two"}, clock.now)
        bounds = {"minReplicas": pods, "maxReplicas": pods}
        world.add_pool("base", engine={"maxLoras": 8, "maxAdapters": 64}, autoscaling=bounds)
        await world.converge()
        for number in range(count):
            world.add_adapter(number, autoscaling={"minReplicas": 1, "maxReplicas": 8})
        started = time.process_time()
        await _settle(world, clock, count, busy)
        converged = time.process_time() - started
        ready = sum(1 for item in world.adapters() if item["status"]["phase"] == "Ready")
        if ready != count:
            raise RuntimeError(f"{ready} of {count} adapters are ready")
        used, writes = 0.0, 0
        for number in range(ROUNDS):
            clock.now += 1.0
            _report(world, clock, count, busy)
            world.reconcile_everything()
            profiler = cProfile.Profile() if profile and number == ROUNDS - 1 else None
            before, started = world.store.writes, time.process_time()
            if profiler is not None:
                profiler.enable()
            await world.drain()
            if profiler is not None:
                profiler.disable()
                pstats.Stats(profiler).sort_stats("tottime").print_stats(30)
            used, writes = time.process_time() - started, world.store.writes - before
        return converged, used, writes


def main() -> None:
    """Print the table, and exit with 1 above a second of CPU time, or if anything is written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=5000, help="number of AdapterDeployments")
    parser.add_argument("--pods", type=int, default=200, help="number of pods")
    parser.add_argument("--busy", type=int, default=500, help="number of adapters with requests")
    parser.add_argument("--profile", action="store_true", help="print the profile of the last round")
    arguments = parser.parse_args()
    converged, used, writes = asyncio.run(
        measure(arguments.adapters, arguments.pods, arguments.busy, profile=arguments.profile)
    )
    print("| AdapterDeployments | pods | with requests | from creation to Ready | a round | writes of a round |")
    print("|---|---|---|---|---|---|")
    row = (arguments.adapters, arguments.pods, arguments.busy, f"{converged:.1f} s", f"{used:.2f} s", writes)
    print("| " + " | ".join(map(str, row)) + " |")
    sys.exit(used > MAX_SECONDS or writes > 0)


if __name__ == "__main__":
    main()
