"""Two pods with real engines behind two gateways: engines that are killed under load, and a request that kills them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.gateway.gateway_rig import (
    GATEWAY_KEYS,
    OWN_NAMESPACE,
    adapter_manifest,
    pod_manifest,
    pool_manifest,
    write_pool_keys,
)
from tests.server.fatal_engine import FATAL_WORD
from tests.server.http_client import call, open_stream
from tests.server.server_rig import (
    REPOSITORY,
    MissingPartError,
    Pod,
    S3Server,
    agent_container,
    engine_container,
    free_port,
    listens,
    make_adapter,
    wait_until,
)
from tunesmith.contracts.agent import (
    PodState,
    ResidencyState,
    control_keys,
    events_keys,
    keys_file,
    pod_tokens,
)
from tunesmith.contracts.apikey import key_record, new_key
from tunesmith.contracts.crash import CrashLedger
from tunesmith.contracts.podevents import EventReader

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.long

KILLS = 10
CLIENTS = 3
POOL = pool_manifest("pool", "team", model="smol", holdSeconds=3600)
PLACE = (POOL["metadata"]["namespace"], POOL["metadata"]["uid"])
NAMES = ("pirate", "poet")


class CrashingPod:
    """A pod with its supervisor, engine and agent, and a reader of its agent's stream."""

    def __init__(self, name: str, folder: Path, base: Path, store: S3Server, entries: list[dict[str, str]]) -> None:
        self.name, self.uid = name, f"uid-{name}"
        self.pod = Pod(folder, base, store)
        write_pool_keys(self.pod.keys, POOL)
        self.agent = agent_container(self.pod, pod_uid=self.uid)
        path = f"{self.pod.state / 'middleware'}:{REPOSITORY / 'tests/server'}"
        self.engine = engine_container(
            self.pod, "--middleware", "fatal_engine.Middleware", TUNESMITH_POD_UID=self.uid, PYTHONPATH=path
        )
        self._entries = entries
        self.state = PodState()
        self.changed = threading.Condition()

    def start(self) -> None:
        self.agent.start()
        wait_until(lambda: listens(self.pod.agent_port), f"the agent listens; see {self.agent.log}", 60)
        self.engine.start()
        body = {"epoch": 1, "sequence": 1, "adapters": self._entries}
        token = pod_tokens(control_keys(GATEWAY_KEYS, *PLACE), self.uid)[0]
        assert call(f"{self.pod.agent_url}/v1/adapters", "PUT", body, token).status == 200
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        token = pod_tokens(events_keys(GATEWAY_KEYS, *PLACE), self.uid)[0]
        url, reader = f"{self.pod.agent_url}/v1/events", EventReader()
        with contextlib.suppress(OSError, ValueError), open_stream(url, "GET", None, token, None) as lines:
            for line in lines:
                reader.read(line)
                self.state = reader.state

    @property
    def serves(self) -> bool:
        resident = {entry.engine_name for entry in self.state.adapters if entry.state is ResidencyState.RESIDENT}
        return self.state.engine_ready and {entry["engineName"] for entry in self._entries} <= resident

    def wait_serving(self, crashes: int) -> None:
        def serving() -> bool:
            assert self.engine.running(), self.engine.tail()
            return self.state.engine_crashes >= crashes and self.serves

        wait_until(serving, f"{self.name} serves; see {self.engine.log} and {self.agent.log}", 1800)

    def kill_engine(self) -> None:
        """SIGKILL to all processes of the engine, not to their supervisor."""
        supervisor = self.engine.group
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if int(process.name) != supervisor and os.getpgid(int(process.name)) == supervisor:
                    os.kill(int(process.name), signal.SIGKILL)

    @property
    def manifest(self) -> dict[str, Any]:
        return pod_manifest(POOL, self.name, self.uid)

    def stop(self) -> None:
        self.engine.kill()
        self.agent.kill()


def served_adapter(name: str, *entries: dict[str, str], **shares: Any) -> dict[str, Any]:
    """An AdapterDeployment with entries of the desired list as its revisions, the newest one first."""
    adapter = adapter_manifest(name, pool=("team", "pool"), digests=("a",) * len(entries), **shares)
    for revision, entry in zip(adapter["status"]["revisions"], entries, strict=True):
        revision |= {"digest": entry["digest"], "engineName": entry["engineName"]}
    return adapter


class GatewayProcess:
    """A gateway that knows the pods and adapters."""

    def __init__(self, folder: Path, key: str, pods: list[CrashingPod], adapters: list[dict[str, Any]]) -> None:
        folder.mkdir()
        (folder / "key").write_bytes(keys_file(GATEWAY_KEYS))
        port, internal_port = free_port(), free_port()
        self.url, self.internal_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{internal_port}"
        ports = {pod.uid: (pod.pod.engine_port, pod.pod.agent_port) for pod in pods}
        command = [
            *(str(REPOSITORY / ".venv/bin/python"), "-m", "tests.gateway.local_pods_gateway", json.dumps(ports)),
            *(f"--namespace={OWN_NAMESPACE}", f"--gateway-key-file={folder / 'key'}", f"--port={port}"),
            *(f"--internal-port={internal_port}", "--linger-seconds=0", "--drain-seconds=1"),
        ]
        self.log = folder / "gateway.log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=log, stderr=log)
        record = key_record("default", OWN_NAMESPACE, key, home="team", namespaces=["team"], models=["*"])
        self.put(POOL, *(pod.manifest for pod in pods), *adapters, record)
        wait_until(lambda: listens(port), f"the gateway listens; see {self.log}", 120)

    def put(self, *documents: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        for document in documents:
            self._process.stdin.write(json.dumps(document).encode() + b"\n")
        self._process.stdin.flush()

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()


@dataclass
class Outcome:
    """One request of the load. `begun`: a part of its answer had arrived before an error."""

    started: float
    finished: float
    status: int
    text: str
    stream: bool

    @property
    def is_answered(self) -> bool:
        return self.status == 200 and '"error"' not in self.text

    def was_running(self, at: float) -> bool:
        return self.started <= at <= self.finished


class Stage:
    """Pods, gateways and clients."""

    def __init__(self, pods: list[CrashingPod], gateways: list[GatewayProcess], key: str) -> None:
        self.pods, self.gateways, self.key = pods, gateways, key
        self.outcomes: list[Outcome] = []
        self._numbers = itertools.count()
        self._stop = threading.Event()
        self._clients: list[threading.Thread] = []

    def complete(self, prompt: str, gateway: int = 0, *, model: str = "team/pirate", stream: bool = False) -> Outcome:
        started = time.time()
        body = {"model": model, "prompt": prompt, "max_tokens": 8, "ignore_eos": True, "stream": stream}
        answer = call(f"{self.gateways[gateway].url}/v1/completions", "POST", body, self.key, timeout=3600)
        return Outcome(started, time.time(), answer.status, answer.text, stream)

    def start_load(self) -> None:
        self._clients = [threading.Thread(target=self._send, args=(number,)) for number in range(CLIENTS)]
        for client in self._clients:
            client.start()

    def _send(self, client: int) -> None:
        while not self._stop.is_set():
            number = next(self._numbers)
            model = f"team/{(*NAMES, 'smol')[number % 3]}"
            self.outcomes.append(
                self.complete(f"Request {number}:", (client + number) % 2, model=model, stream=number % 4 == 0)
            )

    def stop_load(self) -> None:
        self._stop.set()
        for client in self._clients:
            client.join()


@pytest.fixture
def stage(tmp_path: Path, base: Path, fingerprint: str, store: S3Server) -> Iterator[Stage]:
    entries = {
        name: make_adapter(tmp_path / name, base, fingerprint, seed=seed).publish(store, model=name)
        for seed, name in enumerate(NAMES, 1)
    }
    try:
        pods = [CrashingPod(name, tmp_path / name / "pod", base, store, [*entries.values()]) for name in ("one", "two")]
    except MissingPartError as error:
        pytest.fail(str(error), pytrace=False)
    gateways: list[GatewayProcess] = []
    key = new_key()
    try:
        for pod in pods:
            pod.start()
        for pod in pods:
            pod.wait_serving(0)
        adapters = [served_adapter(name, entry) for name, entry in entries.items()]
        gateways += [GatewayProcess(tmp_path / f"gateway-{number}", key, pods, adapters) for number in range(2)]
        running = Stage(pods, gateways, key)
        for number in range(2):
            wait_until(lambda n=number: running.complete("Hello", n).is_answered, "the gateway serves", 120)
        yield running
    finally:
        for part in (*gateways, *pods):
            part.stop()


def test_only_requests_in_a_killed_engine_fail(stage: Stage, record_property: Any) -> None:
    stage.start_load()
    kills: list[float] = []
    returns: list[tuple[float, float]] = []
    try:
        for number in range(KILLS):
            pod = stage.pods[number % 2]
            before = len(stage.outcomes)
            wait_until(lambda before=before: len(stage.outcomes) >= before + CLIENTS, "the clients are served", 900)
            crashes = pod.state.engine_crashes
            killed = time.time()
            kills.append(killed)
            pod.kill_engine()
            pod.wait_serving(crashes + 1)
            assert pod.state.engine_start_seconds is not None
            returns.append((time.time() - killed, pod.state.engine_start_seconds))
    finally:
        stage.stop_load()
    failed = [outcome for outcome in stage.outcomes if not outcome.is_answered]
    record_property("requests", len(stage.outcomes))
    record_property("failed", len(failed))
    rounded = [(round(until_served, 1), round(start, 1)) for until_served, start in returns]
    record_property("seconds until the engine serves, of which its start", rounded)
    for outcome in failed:
        assert any(outcome.was_running(kill) for kill in kills), outcome
        assert outcome.status in {200, 502}, outcome
        assert "engine" in outcome.text, outcome
    assert len(stage.outcomes) - len(failed) >= KILLS * CLIENTS
    assert [pod.state.engine_crashes for pod in stage.pods] == [KILLS // 2] * 2
    # The supervisor restarts an engine at once, the tenth time too: what passes besides the start is no back-off.
    for until_served, start in returns:
        assert until_served <= start + 5, returns


def test_a_request_that_kills_engines_is_refused_by_all_gateways(stage: Stage) -> None:
    prompt = f"{FATAL_WORD.decode()} {time.time()}"
    fatal = stage.complete(prompt, 0)
    # It was sent to the other pod once, and killed its engine too.
    assert (fatal.status, json.loads(fatal.text)["error"]["code"]) == (502, "engine_failed"), fatal.text
    for pod in stage.pods:
        wait_until(lambda pod=pod: pod.state.engine_crashes == 1, f"{pod.name} reports its crash", 120)
    for gateway in (0, 1):
        refused = stage.complete(prompt, gateway)
        assert refused.status == 400, refused.text
        assert json.loads(refused.text)["error"]["code"] == "request_crashes_engine"
    assert stage.complete("An innocent request", 1).is_answered
    for pod in stage.pods:
        pod.wait_serving(1)
    assert [pod.state.engine_crashes for pod in stage.pods] == [1, 1]
    ledger = CrashLedger()
    for pod in stage.pods:
        for crash in pod.state.crashes:
            ledger.record(crash, time.time())
    [suspect] = ledger.refused(time.time())
    assert suspect.crashes == 2
    assert suspect.model.startswith("team/pirate@")
