"""Measure what a flood of one API key does to the requests of another one.

A gateway's process in front of a pod that computes `--places` sequences at once, each for a fixed time, and queues the
others in the order of their arrival, as an engine does. One key sends a request at a time; then another key floods the
pod with concurrent requests meanwhile. The same with a gateway that does not know the pod's places and forwards
everything at once, as without turns.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.gateway.gateway_rig import pool_manifest
from tests.gateway.process_rig import ProcessRig

if TYPE_CHECKING:
    from aiohttp import web

MOST_RATIO = 1.5
"""Highest p95 with the flood, relative to that without."""
_UNLIMITED = 100_000


async def measure(rig: ProcessRig, key: str, requests: int) -> list[float]:
    """Return the seconds that each of the requests of a key took, one after the other."""
    taken = []
    for _ in range(requests):
        begin = time.perf_counter()
        status, _ = await rig.chat(key=key)
        if status != 200:  # noqa: PLR2004 - OK
            raise SystemExit(f"a request was answered {status}")
        taken.append(time.perf_counter() - begin)
    return taken


async def run(folder: Path, arguments: argparse.Namespace, known_places: int) -> tuple[list[float], list[float]]:
    """Return the times of the other key's requests without and with the flood."""
    engine = asyncio.Semaphore(arguments.places)

    async def compute(_: web.Request, __: dict[str, object]) -> None:
        async with engine:
            await asyncio.sleep(arguments.seconds)

    async with ProcessRig(folder) as rig:
        rig.put(pool_manifest(engine={"args": [f"--max-num-seqs={known_places}"]}))
        rig.pod.answer = compute
        other, flood = await rig.another_key("other"), await rig.another_key("flood")
        without = await measure(rig, other, arguments.requests)
        stop = asyncio.Event()

        async def send() -> None:
            while not stop.is_set():
                await rig.chat(key=flood)

        clients = [asyncio.create_task(send()) for _ in range(arguments.concurrency)]
        await asyncio.sleep(5 * arguments.seconds)
        during = await measure(rig, other, arguments.requests)
        stop.set()
        await asyncio.gather(*clients)
    return without, during


def p95(taken: list[float]) -> float:
    """Return the 95th percentile in milliseconds."""
    return 1000 * statistics.quantiles(taken, n=20)[-1]


def main() -> int:
    """Print the figures; exit code 1 if the flood makes the other key's p95 longer than `MOST_RATIO` times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--places", type=int, default=16, help="sequences that the pod computes at once (default: 16)")
    parser.add_argument("--seconds", type=float, default=0.25, help="time for one of them (default: 0.25)")
    parser.add_argument("--concurrency", type=int, default=200, help="concurrent requests of the flood (default: 200)")
    parser.add_argument("--requests", type=int, default=40, help="requests of the other key (default: 40)")
    arguments = parser.parse_args()
    sys.stdout.write("| | p95 without the flood | p95 with it | ratio |\n|---|---|---|---|\n")
    ratio = 0.0
    for name, places in (("forwarded at once", _UNLIMITED), ("turns of the keys", arguments.places)):
        with tempfile.TemporaryDirectory() as folder:
            without, during = asyncio.run(run(Path(folder), arguments, places))
        ratio = p95(during) / p95(without)
        sys.stdout.write(f"| {name} | {p95(without):.0f} ms | {p95(during):.0f} ms | {ratio:.2f} |\n")
    return 0 if ratio <= MOST_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
