"""Measure the operator's work for many AdapterDeployments in one namespace, and the memory of its caches.

Reconcilers, event handling, caches and queue are the operator's own; API server, kubelet and agents are in memory
(`tests/serving/operatorworld.py`), so the figures are the operator's CPU time alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
import tracemalloc

from tests.serving.operatorworld import World
from tunesmith.cluster.resources import named, resource_of
from tunesmith.controller.reconciler import Key

SLOTS = 256


async def measure(count: int, slots: int) -> dict[str, float]:
    """Measure one size."""
    world = World()
    world.add_pool("base", engine={"maxLoras": 1, "maxAdapters": slots}, replicas=max(1, -(-count // slots)))
    await world.converge()
    for number in range(count):
        world.add_adapter(number)
    started = time.process_time()
    await world.converge()
    converged = time.process_time() - started
    ready = sum(1 for item in world.adapters() if item["status"]["phase"] == "Ready")
    if ready != count:
        raise RuntimeError(f"{ready} of {count} adapters are ready")
    started = time.process_time()
    world.reconcile_everything()
    await world.drain()
    everything = time.process_time() - started
    repeats = 20
    started = time.process_time()
    for _ in range(repeats):
        await world.reconcile(Key("AdapterDeployment", "team", "adapter-0"))
    adapter = (time.process_time() - started) / repeats
    started = time.process_time()
    for _ in range(repeats):
        await world.reconcile(Key("ServingPool", "team", "base"))
    pool = (time.process_time() - started) / repeats
    return {"converged": converged, "everything": everything, "adapter": adapter, "pool": pool}


def cached_bytes(count: int, annotation: int) -> float:
    """Measure the bytes per object of AdapterDeployments with large annotations in the cache."""
    world = World()
    manifest = {
        "apiVersion": "tunesmith.dev/v1alpha1",
        "kind": "AdapterDeployment",
        "spec": {"adapterFrom": {"fineTuneJob": {"name": "job"}}},
    }
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for number in range(count):
        metadata = {
            "name": f"adapter-{number}",
            "namespace": "team",
            "uid": f"uid-{number}",
            "resourceVersion": str(number + 1),
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "annotations": {"note": f"{number:08d}" * (annotation // 8)},
        }
        item = json.loads(json.dumps({**manifest, "metadata": metadata}))
        world.observe(named(item, resource_of("AdapterDeployment")))
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return used / count


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="500,1000,2000,4000", help="numbers of AdapterDeployments")
    parser.add_argument("--slots", type=int, default=SLOTS, help="adapters that one pod holds")
    arguments = parser.parse_args()
    print("| AdapterDeployments | from creation to Ready | all once, nothing changed | one adapter | its pool |")
    print("|---|---|---|---|---|")
    for size in (int(text) for text in arguments.sizes.split(",")):
        found = asyncio.run(measure(size, arguments.slots))
        print(
            f"| {size} | {found['converged']:.2f} s | {found['everything']:.2f} s | {found['adapter'] * 1000:.2f} ms "
            f"| {found['pool'] * 1000:.1f} ms |",
            flush=True,
        )
    print()
    print(f"An object with 250 KiB of annotations takes {cached_bytes(60, 250 * 1024) / 1024:.1f} KiB in the cache.")


if __name__ == "__main__":
    main()
