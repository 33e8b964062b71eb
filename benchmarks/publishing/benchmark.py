"""Measure the time from the end of a training pod until a client receives the adapter's first token, step by step.

A real API server with the operator, a gateway, an S3 server, and a warm pod with the agent and vLLM on this machine's
CPUs. Needs the server's environment, and that of the operator for its process and the gateway's:

    uv run --frozen --project server-image python -m benchmarks.publishing.benchmark --repeats 5
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shutil
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import aiohttp

from benchmarks.density import rig
from benchmarks.publishing.world import API, NAMESPACE, World, until
from tests.controlplane.apiserver import ApiServer
from tests.server.server_rig import Artifact, S3Server
from tunesmith.contracts.agent import Residency, ResidencyState
from tunesmith.contracts.artifact import digest_of
from tunesmith.contracts.fingerprint import LocalModelFolder, base_fingerprint
from tunesmith.contracts.location import engine_name
from tunesmith.contracts.podevents import EventReader

if TYPE_CHECKING:
    from collections.abc import Sequence

STEPS = ("job", "placement", "download", "load", "probe", "report", "first token", "all", "ours")
PROCESSES = ("operator", "gateway", "agent", "engine")


class Follower:
    """Reader of the agent's events and of FineTuneJobs, which records when a revision or a job reached each state."""

    def __init__(self, world: World, http: aiohttp.ClientSession) -> None:
        self._world = world
        self._http = http
        self.at: dict[tuple[str, str], float] = {}
        self.loads: dict[str, Residency] = {}

    async def run(self) -> None:
        """Read until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._read_agent())
            group.create_task(self._read_jobs())

    async def _read_jobs(self) -> None:
        async for job in self._world.cluster.watch(f"{API}/namespaces/{NAMESPACE}/finetunejobs"):
            conditions = job.get("status", {}).get("conditions", ())
            if any(found["type"] == "Complete" and found["status"] == "True" for found in conditions):
                self.at.setdefault((job["metadata"]["name"], "complete"), time.monotonic())

    async def _read_agent(self) -> None:
        url, headers = f"{self._world.pod.agent_url}/v1/events", {"Authorization": f"Bearer {self._world.events_token}"}
        async with self._http.get(url, headers=headers, timeout=aiohttp.ClientTimeout(total=None)) as response:
            reader = EventReader()
            async for line in response.content:
                reader.read(line)
                now = time.monotonic()
                for adapter in reader.state.adapters:
                    self._record(adapter, now)

    def _record(self, adapter: Residency, now: float) -> None:
        name = adapter.engine_name
        self.at.setdefault((name, "listed"), now)
        if adapter.state is not ResidencyState.DOWNLOADING:
            self.at.setdefault((name, "downloaded"), now)
        if adapter.loads:
            self.at.setdefault((name, "loaded"), now)
            self.loads[name] = adapter
        if adapter.state is ResidencyState.RESIDENT:
            self.at.setdefault((name, "resident"), now)


async def first_token(http: aiohttp.ClientSession, world: World, model: str) -> float:
    """Request an answer until it begins, and return the time of its first token."""
    body = {
        "model": model,
        "prompt": [3, 4, 5, 6],
        "max_tokens": 4,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    headers = {"Authorization": f"Bearer {world.key}"}
    while True:
        async with http.post(f"{world.gateway_url}/v1/completions", json=body, headers=headers) as response:
            if response.status == 200:  # noqa: PLR2004 - HTTP
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        return time.monotonic()
        await asyncio.sleep(0.01)


async def publish(
    world: World, http: aiohttp.ClientSession, follower: Follower, name: str, artifact: Artifact, parity: str
) -> dict[str, float]:
    """Play a job that publishes an artifact, and return the milliseconds of each step."""
    await world.create_job(name)
    validation = await world.training_pod(name, "validate")
    resolved = {"learningRate": 2e-4, "batchSize": 8, "totalSteps": 30, "baseModelFingerprint": artifact.fingerprint}
    preflight = {"rows": 90, "validationRows": 10, "droppedRows": 0, "tokens": 1234}
    await world.finish(validation, {"outcome": "Succeeded", "preflight": preflight, "resolved": resolved})
    attempt = await world.training_pod(name, "train")
    arguments = attempt["spec"]["containers"][0]["args"]
    uri = arguments[arguments.index("--output") + 1]
    document = artifact.seal()
    for path in artifact.folder.iterdir():
        world.pod.store.files.pipe_file(f"{uri}/{path.name}", path.read_bytes())
    await world.create_adapter(name, parity)

    async def waits() -> bool:
        return bool((await world.status("AdapterDeployment", name)).get("conditions"))

    await until(waits, "the AdapterDeployment waits for its job")
    published = {
        "uri": uri,
        "digest": digest_of(document),
        "sizeBytes": sum(path.stat().st_size for path in artifact.folder.iterdir()),
        "servable": {"vllm": True},
    }
    evaluation = {"baseLoss": 3.0, "loss": 1.5, "lossReductionPercent": 50.0}
    client = asyncio.create_task(first_token(http, world, f"{NAMESPACE}/{name}"))
    before = world.usage()
    started = time.monotonic()
    await world.finish(attempt, {"outcome": "Succeeded", "artifact": published, "evaluation": evaluation})
    answered = await asyncio.wait_for(client, 600)
    used = world.usage().since(before)
    revision = engine_name(NAMESPACE, name, digest_of(document))
    warm = time.monotonic()
    generation = await first_token(http, world, f"{NAMESPACE}/{name}") - warm
    at = {state: follower.at[revision, state] for state in ("listed", "downloaded", "loaded", "resident")}
    load = follower.loads[revision].load_seconds
    seconds = {
        "job": follower.at[name, "complete"] - started,
        "placement": at["listed"] - follower.at[name, "complete"],
        "download": at["downloaded"] - at["listed"],
        "load": load,
        "probe": at["resident"] - at["downloaded"] - load,
        "report": answered - at["resident"] - generation,
        "first token": generation,
        "all": answered - started,
    }
    seconds["ours"] = seconds["job"] + seconds["placement"] + seconds["report"]
    seconds |= {f"{process} (processor)": used[process] for process in PROCESSES}
    return {step: round(1000 * value, 1) for step, value in seconds.items()}


async def measure(folder: Path, repeats: int, parity: str) -> list[dict[str, float]]:
    """Start everything, and publish adapters one after the other; the first one is not counted."""
    rig.make(folder / "made", repeats + 1, parity=True)
    shutil.rmtree(folder / "run", ignore_errors=True)
    (folder / "run/s3").mkdir(parents=True)
    store = S3Server(folder / "run/s3")
    fingerprint = base_fingerprint(LocalModelFolder(folder / "made/base"))
    rows = []
    try:
        with ApiServer(folder / "run/apiserver") as server:
            server.install_crds()
            server.start_controller_manager()
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
                world = World(folder / "run", folder / "made/base", store, server, http)
                following: asyncio.Task[None] | None = None
                try:
                    await world.start()
                    follower = Follower(world, http)
                    following = asyncio.create_task(follower.run())
                    for number in range(repeats + 1):
                        artifact = Artifact(folder / "made/adapters" / f"{number:04d}", fingerprint, rank=8)
                        row = await publish(world, http, follower, f"job-{number}", artifact, parity)
                        print(json.dumps(row), flush=True)
                        rows.append(row)
                finally:
                    if following is not None:
                        following.cancel()
                        with contextlib.suppress(asyncio.CancelledError):
                            await following
                    world.stop()
    finally:
        store.stop()
    return rows[1:]


def report(rows: Sequence[dict[str, Any]]) -> str:
    """Return tables of the medians, in milliseconds: time by step, and processor time by process."""
    tables = []
    for names, suffix in ((STEPS, ""), (PROCESSES, " (processor)")):
        cells = " | ".join(f"{median(row[name + suffix] for row in rows):.0f}" for name in names)
        tables.append(f"| {' | '.join(names)} |\n|{'---|' * len(names)}\n| {cells} |")
    return "\n\n".join(tables)


def main() -> None:
    """Parse the arguments, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("out/publishing"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parity", choices=("Required", "Report", "Off"), default="Required")
    options = parser.parse_args()
    rows = asyncio.run(measure(options.folder.resolve(), options.repeats, options.parity))
    print(report(rows))
    sys.exit(0)


if __name__ == "__main__":
    main()
