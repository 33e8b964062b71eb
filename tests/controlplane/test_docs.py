"""The documentation's commands, run as written against a real API server.

The test plays what a kubelet would make possible: the operator's status of jobs and adapters, the gateway's answers.
Commands that need more are listed with the reason; what only a cluster can run, e2e/scenarios runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING

import pytest

from e2e.documentation import PAGES, REPOSITORY, blocks, commands, name_of
from tests.cli.artifact_folder import publish
from tests.controlplane.apiserver import ApiServer, program, until
from tests.controlplane.rights import kubeconfig_of
from tests.trainer.s3server import S3Server
from tunesmith.cluster.client import Cluster
from tunesmith.cluster.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tunesmith.cluster.resources import Object

pytestmark = pytest.mark.controlplane

SYSTEM, TEAM, BUCKET = "tunesmith-system", "team-a", "team-a-data"
SECONDS = 600
NOW = "2026-01-01T00:00:00Z"

PLATFORM, USER = "platform", "user"
WALK = {
    "docs/install.md": PLATFORM,
    "docs/first-15-minutes.md": USER,
    "docs/how-to/new-version.md": USER,
    "docs/how-to/canary.md": USER,
    "docs/how-to/compare.md": USER,
    "docs/how-to/cost.md": USER,
    "docs/how-to/export.md": USER,
    "docs/how-to/delete.md": USER,
    "docs/serve.md": PLATFORM,
    "docs/keys-and-clients.md": PLATFORM,
    "docs/how-to/upgrade.md": PLATFORM,
    "docs/how-to/uninstall.md": PLATFORM,
}
"""Pages in the order in which one person after the other would follow them, each with who that is."""
ELSEWHERE = {
    "README.md": "make demo: e2e/demo.py and e2e/scenarios",
    "docs/tenant-isolation.md": "make targets that attack a cluster: e2e/attacks",
    "docs/data.md": "asks a job of the reader's own",
    "docs/requests.md": "asks a pool whose engine crashed",
    "docs/how-to/base-models.md": "prepares nodes, and asks running pods",
    "docs/how-to/one-to-a-thousand-adapters.md": "asks running pods",
    "docs/how-to/bring-an-adapter.md": "asks an adapter of the reader's own; needs the trainer",
    "docs/how-to/split-traffic.md": "asks an adapter that is being rolled out",
    "docs/how-to/clients.md": "asks an adapter of the reader's own: tests/gateway/test_clients.py",
    "docs/how-to/parity.md": "asks an adapter of the reader's own",
    "docs/how-to/simulate.md": "needs the requests of the reader's own gateways: tests/cli/test_simulate.py",
    "docs/how-to/clean-the-store.md": "tests/controlplane/test_gc.py",
    "docs/how-to/gates.md": "asks a job of the reader's own",
    "docs/how-to/metrics.md": "asks running pods",
    "docs/how-to/gpu-memory.md": "needs the trainer: tests/cli/test_estimate.py",
    "docs/how-to/choose-a-method.md": "needs files of other tools: tests/cli/test_import.py",
    "docs/how-to/convert-data.md": "needs the trainer and files of other tools: tests/trainer/test_data_docs.py",
    "docs/how-to/import.md": "needs files of other tools: tests/cli/test_import.py",
    "docs/how-to/job-does-not-finish.md": "asks pods",
    "docs/how-to/evaluate.md": "asks a job of the reader's own",
    "docs/how-to/experiment-tracking.md": "needs trackers",
    "docs/how-to/resume.md": "asks a job of the reader's own",
    "docs/local-cluster.md": "make targets that start a cluster",
    "docs/train-locally.md": "needs the trainer",
    "docs/train.md": "asks a job of the reader's own",
    "docs/reference/settings.md": "the programs of pods: tests/settings",
    "docs/reference/stores.md": "the keys are the reader's own",
}
NOT_RUN = {
    "for image in operator:operator": "builds images, which needs Docker",
    "uv tool install": "downloads packages",
    "tunesmith --install-completion": "changes the profile of the reader's shell",
    "kubectl --namespace team-a": "the namespace is made later, and the user creates its Secret",
    "kubectl label secret NAME": "NAME is the reader's own",
    "NS=tunesmith-system": "the operator writes the key",
    "OLD=": "the same",
    "NEW=": "the same",
    "kubectl -n $NS": "the same",
    "helm install tunesmith charts/tunesmith --namespace tunesmith-system \\\n  --set 'watch": "an alternative",
    "helm install other": "an alternative",
    "tunesmith estimate": "needs the trainer",
    "aws": "the tool of another project",
    "cp -r base": "the folder is the reader's own",
    "kubectl get ftj NAME": "NAME is the reader's own",
    "kubectl wait spool": "waits for the operator",
    "curl": "asks a gateway with an engine: e2e/scenarios",
}


def wanted(command: str) -> bool:
    return not command.startswith(tuple(NOT_RUN))


def test_every_page_with_commands_is_run_or_says_where() -> None:
    shown = {name_of(page) for page in PAGES if blocks(page)}
    assert shown - set(WALK) - set(ELSEWHERE) == set(), "add new pages to WALK or ELSEWHERE"
    assert set(ELSEWHERE) - shown == set()
    assert set(WALK) - shown == set()


def test_no_excuse_is_left_over() -> None:
    every = [command for name in WALK for block in blocks(REPOSITORY / name) for command in commands(block)]
    assert [start for start in NOT_RUN if not any(command.startswith(start) for command in every)] == []


class GatewayPlayer(BaseHTTPRequestHandler):
    """Answers a chat as the gateway does."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        events = [
            {"model": f"{request['model']}@aaaaaaaaaaaa", "choices": [{"delta": {"content": "At nine."}}]},
            {"choices": [{"delta": {}, "finish_reason": "stop"}]},
        ]
        lines = [f"data: {json.dumps(event)}\n\n" for event in events]
        body = "".join([*lines, "data: [DONE]\n\n"]).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: pytest's output is for failures."""


class OperatorPlayer:
    """Completes every job with an artifact in the store, and serves every adapter whose job is complete."""

    def __init__(self, kubeconfig: Path, store: Path) -> None:
        self._kubeconfig = kubeconfig
        self._store = store
        self._stop = Event()
        self._thread = Thread(target=lambda: asyncio.run(self._play()), daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=30)

    async def _play(self) -> None:
        async with await Cluster.connect(kubeconfig=self._kubeconfig) as cluster:
            while not self._stop.is_set():
                for kind, status in (("FineTuneJob", self._job), ("AdapterDeployment", self._adapter)):
                    # Kinds are removed by the last page; an object may change between reading and writing it.
                    with contextlib.suppress(ClusterError):
                        await self._observe(cluster, kind, status)
                await asyncio.sleep(0.2)

    async def _observe(self, cluster: Cluster, kind: str, status: Callable[[Object], Object]) -> None:
        for item in await cluster.list(kind, TEAM):
            if not _is_observed(item):
                await cluster.replace_status({**item, "status": status(item)})

    def _job(self, job: Object) -> Object:
        metadata = job["metadata"]
        folder = f"store/{TEAM}/{metadata['name']}-{metadata['uid']}/artifact"
        weights = metadata["uid"].encode()
        base = job["spec"]["baseModel"]["uri"]
        digest = publish(self._store / folder, {"adapter_model.safetensors": weights}, base=base)
        return {
            "observedGeneration": metadata["generation"],
            "phase": "Complete",
            "startTime": NOW,
            "completionTime": "2026-01-01T00:05:00Z",
            "gpuSeconds": 300,
            "conditions": [_condition("Complete", "Completed")],
            "evaluation": {"baseLoss": 3.0, "loss": 1.5, "lossReductionPercent": 50.0},
            "resolved": {"datasetDigest": "sha256:d", "totalSteps": 40},
            "artifact": {
                "uri": f"s3://{BUCKET}/{folder}",
                "digest": digest,
                "sizeBytes": len(weights),
                "servable": {"vllm": True},
            },
        }

    def _adapter(self, adapter: Object) -> Object:
        model = f"{TEAM}/{adapter['metadata']['name']}"
        revision = {
            "digest": "sha256:" + "a" * 64,
            "engineName": f"{model}@aaaaaaaaaaaa",
            "state": "Resident",
            "readyReplicas": 1,
        }
        return {
            "observedGeneration": adapter["metadata"]["generation"],
            "phase": "Ready",
            "conditions": [_condition("Resolved", "Resolved"), _condition("Ready", "Resident")],
            "pool": adapter["spec"].get("pool") or {"name": "small", "namespace": SYSTEM},
            "model": model,
            "revisions": [revision],
            "readyReplicas": 1,
            "desiredReplicas": 1,
            **({"rolloutCommand": {"value": _command_of(adapter), "message": "ok"}} if _command_of(adapter) else {}),
        }


def _command_of(item: Object) -> str | None:
    found: str | None = item["metadata"].get("annotations", {}).get("tunesmith.dev/rollout")
    return found


def _is_observed(item: Object) -> bool:
    status = item.get("status") or {}
    handled = status.get("rolloutCommand", {}).get("value")
    return status.get("observedGeneration") == item["metadata"]["generation"] and handled == _command_of(item)


def _condition(type_: str, reason: str) -> Object:
    return {"type": type_, "status": "True", "reason": reason, "message": "", "lastTransitionTime": NOW}


@dataclass
class Reader:
    """A person with a machine: an environment, and a folder with a checkout."""

    folder: Path
    environment: dict[str, str]

    def run(self, script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["/bin/bash", "-euo", "pipefail", "-c", script],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )


@dataclass
class World:
    """A cluster without nodes, a store, and two readers."""

    server: ApiServer
    store: S3Server
    gateway: str
    readers: dict[str, Reader]

    def script(self, command: str) -> str:
        """The command with the values that the page leaves to its reader."""
        own = {
            "AWS_ACCESS_KEY_ID=…": f"AWS_ACCESS_KEY_ID={self.store.access_key}",
            "AWS_SECRET_ACCESS_KEY=…": f"AWS_SECRET_ACCESS_KEY={self.store.secret_key}",
            "https://s3.example": self.store.endpoint,
            "eu-central-1": "us-east-1",
            "TUNESMITH_API_KEY=…": "TUNESMITH_API_KEY=sk-ts-test",
            "store=s3://bucket/tunesmith": f"store=s3://{BUCKET}/store --set gateway.externalUrl={self.gateway}",
        }
        for written, used in own.items():
            command = command.replace(written, used)
        return command


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("docs")
    programs = f"{Path(sys.executable).parent}:{program('kubectl').parent}:{os.environ['PATH']}"
    common = {"PATH": programs, "LANG": "C.UTF-8", "TUNESMITH_TRACEBACK": "1"}
    http = ThreadingHTTPServer(("127.0.0.1", 0), GatewayPlayer)
    Thread(target=http.serve_forever, daemon=True).start()
    with (
        ApiServer(folder / "apiserver") as server,
        S3Server(folder / "s3", bucket=BUCKET) as store,
    ):
        server.start_controller_manager()
        readers = {}
        for who in (PLATFORM, USER):
            home = folder / who
            home.mkdir()
            for name in ("charts", "crds", "examples", "operator"):
                (home / name).symlink_to(REPOSITORY / name)
            readers[who] = Reader(home, {**common, "HOME": str(home), "KUBECONFIG": str(home / "kubeconfig")})
        (folder / PLATFORM / "kubeconfig").write_text(server.kubeconfig.read_text())
        yield World(server, store, f"http://127.0.0.1:{http.server_port}", readers)
    http.shutdown()
    http.server_close()


@pytest.fixture(scope="module")
def team(world: World) -> Iterator[None]:
    """What a platform engineer gives a user, as the first page lists it: a namespace, the role `edit`, a pool."""
    make = world.server.apply
    kubectl = world.server.kubectl
    assert kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=60s").returncode == 0
    make({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": TEAM, "labels": {"tier": "paid"}}})
    make({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "alice", "namespace": TEAM}})
    bound = ("rolebinding", "alice", "--clusterrole=edit", f"--serviceaccount={TEAM}:alice", "--namespace", TEAM)
    assert kubectl("create", *bound).returncode == 0
    alice = (f"--as=system:serviceaccount:{TEAM}:alice", "--namespace", TEAM)
    until(
        lambda: kubectl("auth", "can-i", "create", "finetunejobs.tunesmith.dev", *alice).returncode == 0,
        seconds=180,
        what="the share of the built-in role `edit`",
    )
    make(
        {
            "apiVersion": "tunesmith.dev/v1alpha1",
            "kind": "ServingPool",
            "metadata": {"name": "small", "namespace": SYSTEM},
            "spec": {
                "modelName": "small",
                "baseModel": {"uri": "hf://HuggingFaceTB/SmolLM2-135M-Instruct"},
                "allowedNamespaces": {"from": "Selector", "selector": {"matchLabels": {"tier": "paid"}}},
            },
        }
    )
    user = world.readers[USER]
    user.folder.joinpath("kubeconfig").write_text(kubeconfig_of(world.server, TEAM, "alice").read_text())
    with OperatorPlayer(world.server.kubeconfig, world.store.folder / BUCKET):
        yield


@pytest.mark.parametrize("page", WALK)
def test_the_commands_of_a_page_run_as_written(world: World, page: str, request: pytest.FixtureRequest) -> None:
    if page != next(iter(WALK)):
        request.getfixturevalue("team")
    reader = world.readers[WALK[page]]
    for block in blocks(REPOSITORY / page):
        script = "\n".join(world.script(command) for command in commands(block) if wanted(command))
        if script:
            done = reader.run(script)
            assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
            assert "Traceback" not in done.stderr
            # Variables that a block exports are still set in the reader's next one.
            exported = [word for line in script.splitlines() if line.startswith("export ") for word in line.split()[1:]]
            reader.environment |= dict(word.split("=", 1) for word in exported if "=" in word and "$" not in word)
