"""Processes of the benchmark: two pods (vLLM and agent), a gateway and a vLLM of its own, on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp

from benchmarks.density import processes
from tests.gateway.gateway_rig import (
    GATEWAY_KEYS,
    OWN_NAMESPACE,
    adapter_manifest,
    pod_manifest,
    pool_manifest,
    write_pool_keys,
)
from tests.server.server_rig import (
    REPOSITORY,
    Artifact,
    Container,
    Pod,
    S3Server,
    agent_container,
    engine_variables,
    free_port,
    vllm_program,
)
from tunesmith.autoscale.activity import Activity
from tunesmith.contracts.agent import (
    PodState,
    ResidencyState,
    control_keys,
    events_keys,
    keys_file,
    pod_tokens,
)
from tunesmith.contracts.apikey import key_record, new_key
from tunesmith.contracts.parity import PARITY_FILE, PARITY_ROWS_FILE
from tunesmith.contracts.podevents import EventReader
from tunesmith.serving.placement import DesiredRevision, PlacementPod, place

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Object = dict[str, Any]
NAMESPACE = "team"
SLOTS = 8
CAPACITY = 512
START_SECONDS = 1800.0
ONE_PROCESS: Mapping[str, str] = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""Variables of an engine that computes in the process of its core, as that of the image for CPUs does."""
_TICK_SECONDS = 2.0
_PARITY_FILES = shutil.ignore_patterns(PARITY_FILE, PARITY_ROWS_FILE)
_ENGINE = [
    *("--max-lora-rank", "8", "--kv-cache-memory-bytes", str(256 * 2**20), "--max-model-len", "512"),
    *("--dtype", "float32", "--max-num-seqs", "64", "--enable-lora"),
]


def artifacts(
    made: Path, fingerprint: str, store: S3Server, count: int, *, prefix: str = "a", parity: bool = True
) -> list[Object]:
    """Publish the first `count` adapters, and return their entries of a desired list.

    Args:
        made: folder with the adapters.
        fingerprint: fingerprint of the base model.
        store: store to publish to.
        count: number of adapters.
        prefix: prefix of their names.
        parity: True to publish the expected answers that they have.
    """
    entries = []
    for number in range(count):
        folder = made / "adapters" / f"{number:04d}"
        if not parity:
            folder = shutil.copytree(
                folder, made / "without-parity" / f"{number:04d}", ignore=_PARITY_FILES, dirs_exist_ok=True
            )
        entries.append(Artifact(folder, fingerprint, rank=8).publish(store, NAMESPACE, f"{prefix}{number:04d}"))
    return entries


class ServingPod:
    """A pod: vLLM with our middleware, and the agent.

    Args:
        slots: adapters that it computes at a time.
        options: further arguments of vLLM.
        variables: further variables of vLLM.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        base: Path,
        store: S3Server,
        capacity: int,
        memory: int,
        *,
        slots: int = SLOTS,
        options: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.uid = f"uid-{name}"
        self.pod = Pod(folder, base, store)
        write_pool_keys(self.pod.keys, pool_manifest())
        metadata = pool_manifest()["metadata"]
        pool = (metadata["namespace"], metadata["uid"])
        self._events_token = pod_tokens(events_keys(GATEWAY_KEYS, *pool), self.uid)[0]
        self._control_token = pod_tokens(control_keys(GATEWAY_KEYS, *pool), self.uid)[0]
        self.agent = agent_container(
            self.pod, pod_uid=self.uid, max_adapters=capacity, max_lora_rank=8, storage=8 * 2**30
        )
        arguments = [
            *("--served-model-name", "serving/base", "--port", str(self.pod.engine_port), "--host", "127.0.0.1"),
            *("--max-loras", str(slots + 1), "--max-cpu-loras", str(capacity + 1)),
            *("--middleware", "tunesmith_middleware.Middleware", "--scheduling-policy", "priority"),
            *("--structured-outputs-config", '{"backend": "guidance"}'),
        ]
        environment = {
            **engine_variables(),
            **ONE_PROCESS,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(self.pod.state / "middleware"),
            "TUNESMITH_SERVING_KEY_FILE": str(self.pod.keys / "serving"),
            "TUNESMITH_POD_UID": self.uid,
            "TUNESMITH_ADMIN_TOKEN_FILE": str(self.pod.state / "admin-token"),
            "TUNESMITH_ADAPTER_MEMORY": str(memory),
            **(variables or {}),
        }
        command = [str(vllm_program()), "serve", str(base), *_ENGINE, *arguments, *options]
        self.engine = Container(command, environment, folder / "engine.log")
        self.state = PodState()
        self._sequence = 0

    @property
    def manifest(self) -> Object:
        """Return the pod as the API server has it."""
        return pod_manifest(pool_manifest(), self.name, self.uid)

    async def follow(self, http: aiohttp.ClientSession) -> None:
        """Read the agent's events until cancelled."""
        headers = {"Authorization": f"Bearer {self._events_token}"}
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with http.get(f"{self.pod.agent_url}/v1/events", headers=headers, timeout=None) as response:
                    reader = EventReader()
                    buffer = b""
                    async for chunk in response.content.iter_any():
                        *lines, buffer = (buffer + chunk).split(b"\n")
                        for line in lines:
                            reader.read(line)
                            self.state = reader.state
            await asyncio.sleep(0.5)

    async def want(self, http: aiohttp.ClientSession, entries: Iterable[Object]) -> None:
        """Send the agent its complete list."""
        self._sequence += 1
        body = {"epoch": 1, "sequence": self._sequence, "adapters": list(entries)}
        headers = {"Authorization": f"Bearer {self._control_token}"}
        async with http.put(f"{self.pod.agent_url}/v1/adapters", json=body, headers=headers) as response:
            response.raise_for_status()

    @property
    def resident(self) -> frozenset[str]:
        """Return the adapters that it serves."""
        return frozenset(a.engine_name for a in self.state.adapters if a.state is ResidencyState.RESIDENT)

    def check(self) -> None:
        """Raise RuntimeError if one of its processes has stopped."""
        for container in (self.agent, self.engine):
            if not container.running():
                raise RuntimeError(f"{container.log} ends with:\n{container.tail()}")


class Plain:
    """vLLM alone, with the adapters of some numbers."""

    def __init__(self, folder: Path, base: Path, numbers: Sequence[int], slots: int, threads: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.numbers = numbers
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        arguments = [
            *("--served-model-name", "base", "--port", str(self.port), "--host", "127.0.0.1"),
            *("--max-loras", str(slots), "--max-cpu-loras", str(max(len(numbers), slots))),
        ]
        command = [str(vllm_program()), "serve", str(base), *_ENGINE, *arguments]
        # Threads that wait for each other actively take the cores that other processes need.
        variables = {
            **engine_variables(),
            **ONE_PROCESS,
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        self.engine = Container(command, variables, folder / "engine.log")

    async def load(self, http: aiohttp.ClientSession, made: Path) -> float:
        """Load the adapters, and return the seconds that it took."""
        started = time.monotonic()
        for number in self.numbers:
            body = {"lora_name": f"a{number:04d}", "lora_path": str(made / "adapters" / f"{number:04d}")}
            async with http.post(f"{self.url}/v1/load_lora_adapter", json=body) as response:
                if response.status != 200:  # noqa: PLR2004 - HTTP
                    raise RuntimeError(await response.text())
        return time.monotonic() - started


@dataclass
class Gateway:
    """The gateway's process, and what it knows of the cluster."""

    folder: Path
    pods: list[ServingPod]
    key: str = field(default_factory=new_key)

    async def start(
        self, entries: list[Object], *options: str, program: str = "tests.gateway.local_pods_gateway"
    ) -> None:
        """Start the process with the pool, the pods and an AdapterDeployment for each adapter.

        Args:
            entries: the adapters.
            options: further flags of the gateway.
            program: module that runs it; it gets the pods' ports as its first argument.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "key").write_bytes(keys_file(GATEWAY_KEYS))
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        ports = {pod.uid: (pod.pod.engine_port, pod.pod.agent_port) for pod in self.pods}
        arguments = [
            f"--namespace={OWN_NAMESPACE}",
            f"--gateway-key-file={self.folder / 'key'}",
            f"--port={self.port}",
            f"--internal-port={free_port()}",
            "--linger-seconds=0",
            *options,
        ]
        with (self.folder / "gateway.log").open("wb") as log:
            self.process = await asyncio.create_subprocess_exec(
                str(REPOSITORY / ".venv/bin/python"),
                "-m", program, json.dumps(ports), *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])},
            )  # fmt: skip
        documents = [pool_manifest(), *(pod.manifest for pod in self.pods)]
        documents.append(
            key_record("default", OWN_NAMESPACE, self.key, home=NAMESPACE, namespaces=[NAMESPACE], models=["*"])
        )
        for number, entry in enumerate(entries):
            manifest = adapter_manifest(f"a{number:04d}", NAMESPACE)
            manifest["status"]["revisions"] = [
                {"digest": entry["digest"], "engineName": entry["engineName"], "state": "Resident"}
            ]
            documents.append(manifest)
        assert self.process.stdin is not None  # noqa: S101
        for document in documents:
            self.process.stdin.write(json.dumps(document).encode() + b"\n")
        await self.process.stdin.drain()

    async def stop(self) -> None:
        """Stop the process."""
        if self.process.returncode is None:
            self.process.terminate()
            await self.process.wait()


class Operator:
    """The operator's part: it places the adapters, and moves those that are active together."""

    def __init__(self, pods: list[ServingPod], entries: list[Object], capacity: int, *, slots: int = SLOTS) -> None:
        self._pods = pods
        self._slots = slots
        self._entries = {entry["engineName"]: entry for entry in entries}
        self._capacity = capacity
        self._activity = Activity()
        self._sent: dict[str, tuple[str, ...]] = {}
        self.moves = 0

    async def run(self, http: aiohttp.ClientSession) -> None:
        """Send each pod its list, whenever it changes, until cancelled."""
        while True:
            await self._step(http)
            await asyncio.sleep(_TICK_SECONDS)

    async def _step(self, http: aiohttp.ClientSession) -> None:
        active = {name for pod in self._pods for name in pod.state.use.active}
        self._activity.observe(active, time.monotonic())
        desired = [DesiredRevision(name, 1, busy=name in self._activity.busy) for name in self._entries]
        pods = [
            PlacementPod(
                pod.name,
                ready=pod.state.engine_ready,
                age_rank=rank,
                present=frozenset(a.engine_name for a in pod.state.adapters if a.state is not ResidencyState.UNLOADING),
                resident=pod.resident,
            )
            for rank, pod in enumerate(self._pods)
        ]
        placement = place(desired, pods, self._capacity, slots=self._slots, spread=True)
        for pod in self._pods:
            names = placement.pods[pod.name]
            if names != self._sent.get(pod.name):
                if pod.name in self._sent:
                    self.moves += len(set(names) - set(self._sent[pod.name]))
                await pod.want(http, [self._entries[name] for name in names])
                self._sent[pod.name] = names


def memory(*containers: Container) -> dict[str, int]:
    """Return the resident memory in bytes of all processes of containers, shared pages counted once, by kind."""
    found = {"total": 0}
    for container in containers:
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ValueError):
                if os.getpgid(int(process.name)) == container.group:
                    text = (process / "smaps_rollup").read_text()
                    found["total"] += 1024 * int(re.search(r"^Pss:\s+(\d+)", text, re.MULTILINE)[1])  # type: ignore[index]
    return found


def usage_of(name: str, *containers: Container) -> processes.Usage:
    """Return the processor seconds of all processes of containers so far, by process, with a prefix."""
    found = processes.Usage()
    for container in containers:
        for process, seconds in processes.of_group(container.group).items():
            key = f"{name}: {process}"
            found[key] = found.get(key, 0.0) + seconds
    return found


def usage(pods: Sequence[ServingPod], gateway: Gateway | None = None, store: S3Server | None = None) -> processes.Usage:
    """Return the processor seconds of pods, their gateway and their store so far."""
    found = usage_of("engine", *(pod.engine for pod in pods))
    found.update(usage_of("agent", *(pod.agent for pod in pods)))
    if gateway is not None:
        found["gateway"] = processes.of_process(gateway.process.pid)
    if store is not None:
        found["store"] = processes.of_process(store.process_id)
    return found


def disk(folder: Path) -> int:
    """Return the bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def make(folder: Path, count: int, *, parity: bool = False) -> None:
    """Make the base and the adapters in the trainer's environment; `parity`: with their expected answers."""
    if _is_made(folder, count, parity=parity):
        return
    python = REPOSITORY / "trainer-image/.venv/bin/python"
    program = Path(__file__).with_name("make_adapters.py")
    command = [python, "-W", "ignore", program, folder, f"--count={count}", *["--parity"] * parity]
    done = subprocess.run(command, check=False)
    if done.returncode:
        sys.exit(f"{program} failed")


def _is_made(folder: Path, count: int, *, parity: bool) -> bool:
    listing = folder / "markers.json"
    if not listing.exists() or len(json.loads(listing.read_text())["adapters"]) < count:
        return False
    return not parity or all((folder / "adapters" / f"{number:04d}" / PARITY_FILE).exists() for number in range(count))
