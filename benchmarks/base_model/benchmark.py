"""Arrival of a base model on a pod: by one connection, by parallel ranges and from a cache, and its engine's start."""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.server.server_rig import (
    Container,
    Pod,
    S3Server,
    agent_container,
    engine_container,
    model_folder,
    wait_until,
    write_safetensors,
    write_secret,
)
from tests.server.slow_network import SlowNetwork
from tunesmith.contracts.environment import ALLOWED_ADDRESSES

MIB = 2**20
_ONE_CONNECTION = "1"


@dataclass(frozen=True)
class Arrival:
    """Measured run of fetch-base: seconds and processor seconds of the process, peak memory in MiB, and its report."""

    seconds: float
    processor: float
    memory: float
    report: dict[str, object]


def _command(folder: Path, uri: str, secret: dict[str, str], reads: str | None = None) -> list[str]:
    """Return the command of fetch-base with a cache in the folder."""
    (folder / "cache").mkdir(parents=True, exist_ok=True)
    given = write_secret(folder / "secrets/tunesmith-store", secret)
    command = [sys.executable, "-m", "benchmarks.base_model.fetch", *([] if reads is None else ["--reads", reads])]
    command += ["--", "--uri", uri, "--target", str(folder / "base"), "--cache", str(folder / "cache")]
    return [*command, "--secret", str(given)]


def fetch(folder: Path, uri: str, secret: dict[str, str], *, reads: str | None = None) -> Arrival:
    """Run fetch-base in a process of its own."""
    command = _command(folder, uri, secret, reads)
    begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    seconds, after = time.monotonic() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    line = next(line for line in done.stdout.splitlines() if '"origin"' in line)
    memory = float(next(line for line in done.stdout.splitlines() if line.startswith("memory ")).split()[1])
    return Arrival(seconds, processor, memory, json.loads(line[line.index("{") :]))


def _environment() -> dict[str, str]:
    return {**os.environ, ALLOWED_ADDRESSES: "127.0.0.0/8"}


def fetch_after_kill(folder: Path, uri: str, secret: dict[str, str], network: SlowNetwork, size: int) -> Arrival:
    """Kill fetch-base when half of the bytes have arrived, and measure the run that continues."""
    with subprocess.Popen(
        _command(folder, uri, secret), env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as first:
        wait_until(lambda: network.received > size / 2 or first.poll() is not None, "half of the bytes have arrived")
        first.kill()
    network.received = 0
    return fetch(folder, uri, secret)


def download(megabytes: int, rate: float, repeats: int) -> None:
    """Print a table: one file of weights over connections with a limited bandwidth."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        store = S3Server(folder)
        try:
            uri = "s3://tunesmith/models/large"
            values = np.random.default_rng(1).integers(0, 255, megabytes * MIB, np.uint8)
            write_safetensors(folder / "weights", {"a.weight": values}, "U8")
            store.files.put_file(str(folder / "weights"), f"{uri}/model.safetensors")
            store.files.pipe_file(f"{uri}/config.json", b'{"model_type": "llama"}')
            store.files.pipe_file(f"{uri}/tokenizer.json", b"{}")
            print(f"one file of {megabytes} MiB, {rate:g} MiB/s per connection, medians of {repeats}:\n")
            print("| | download and checks | received | processor time | peak memory |\n|---|---|---|---|---|")
            for name, reads in (("one connection", _ONE_CONNECTION), ("parallel ranges", None)):
                found, received = [], 0
                for number in range(repeats):
                    with SlowNetwork(store.port, rate * MIB) as network:
                        secret = {**store.secret, "AWS_ENDPOINT_URL": network.url}
                        found.append(fetch(folder / f"{name}-{number}", uri, secret, reads=reads))
                        received = network.received
                _print(name, received, found)
            with SlowNetwork(store.port, rate * MIB) as network:
                secret = {**store.secret, "AWS_ENDPOINT_URL": network.url}
                resumed = fetch_after_kill(folder / "cut", uri, secret, network, megabytes * MIB)
                _print("continued after a kill", network.received, [resumed])
            # The cache of the last run; the source is asked for the versions only.
            last = folder / f"parallel ranges-{repeats - 1}"
            with SlowNetwork(store.port, rate * MIB) as network:
                secret = {**store.secret, "AWS_ENDPOINT_URL": network.url}
                found = [fetch(last, uri, secret) for _ in range(repeats)]
                _print("from the cache", network.received // repeats, found)
        finally:
            store.stop()


def _print(name: str, received: int, found: list[Arrival]) -> None:
    seconds = statistics.median(float(str(run.report["seconds"])) for run in found)
    processor = statistics.median(run.processor for run in found)
    memory = statistics.median(run.memory for run in found)
    print(f"| {name} | {seconds:.1f} s | {received / MIB:.0f} MiB | {processor:.1f} s | {memory:.0f} MiB |", flush=True)


def start(rate: float) -> None:
    """Print a table: start of the first and the second pod with the demo's model, until the engine is ready."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        store = S3Server(folder)
        try:
            uri = "s3://tunesmith/models/smol"
            for path in model_folder().iterdir():
                if path.is_file():
                    store.files.put_file(str(path), f"{uri}/{path.name}")
            print(f"the demo's model, {rate:g} MiB/s per connection:\n")
            print(
                "| pod | base model | of that, by fetch-base | engine until /health | together |\n|---|---|---|---|---|"
            )
            for name, cached in (
                ("first, empty cache", False),
                ("second, full cache", True),
                ("second, no cache", False),
            ):
                shared = folder / ("node" if name != "second, no cache" else "other-node")
                with SlowNetwork(store.port, rate * MIB) as network:
                    arrived = fetch(shared, uri, {**store.secret, "AWS_ENDPOINT_URL": network.url})
                if (arrived.report["origin"] == "Cache") != cached:
                    raise RuntimeError(f"{name}: {arrived.report}")
                engine = _engine_seconds(folder / name, shared / "base", store)
                own = float(str(arrived.report["seconds"]))
                together = arrived.seconds + engine
                print(
                    f"| {name} | {arrived.seconds:.1f} s | {own:.1f} s | {engine:.1f} s | {together:.1f} s |",
                    flush=True,
                )
        finally:
            store.stop()


def _engine_seconds(folder: Path, base: Path, store: S3Server) -> float:
    pod = Pod(folder, base, store)
    agent, engine = agent_container(pod), engine_container(pod)
    agent.start()
    try:
        wait_until(
            lambda: (pod.state / "middleware").exists() and (pod.state / "admin-token").exists(), "the agent's files"
        )
        begin = time.monotonic()
        engine.start()
        wait_until(lambda: _is_ready(pod.engine_url, engine), "the engine is ready")
        return time.monotonic() - begin
    finally:
        engine.kill()
        agent.kill()


def _is_ready(url: str, engine: Container) -> bool:
    if not engine.running():
        raise RuntimeError(engine.tail())
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2):  # noqa: S310 - this machine's engine
            return True
    except OSError:
        return False


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=512, help="size of the file of weights")
    parser.add_argument("--rate", type=float, default=16, help="MiB/s per connection")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engine", action="store_true", help="also start vLLM")
    given = parser.parse_args()
    download(given.megabytes, given.rate, given.repeats)
    if given.engine:
        print()
        start(given.rate)


if __name__ == "__main__":
    main()
