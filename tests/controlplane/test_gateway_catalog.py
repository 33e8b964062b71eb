"""The gateway fed by a real API server: what it learns, that it survives, how its process ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from tests.controlplane.apiserver import free_port, until
from tests.controlplane.manifests import adapter, pool
from tests.gateway.gateway_rig import GATEWAY_KEYS, FakePod, eventually, free_ports
from tunesmith.cluster.client import Cluster
from tunesmith.contracts.agent import keys_file
from tunesmith.contracts.apikey import key_record, new_key
from tunesmith.gateway.limits import MIB
from tunesmith.gateway.server import Gateway
from tunesmith.gateway.settings import GatewaySettings

if TYPE_CHECKING:
    from tests.controlplane.apiserver import ApiServer

pytestmark = pytest.mark.controlplane

SECONDS = 240
NOW = "2026-01-01T00:00:00Z"


def stored(apiserver: ApiServer, kind: str, namespace: str, name: str) -> dict[str, Any]:
    done = apiserver.kubectl("get", kind, name, "-n", namespace, "-o", "json")
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def set_status(apiserver: ApiServer, kind: str, namespace: str, name: str, status: dict[str, Any]) -> None:
    done = apiserver.kubectl(
        *("patch", kind, name, "-n", namespace, "--subresource=status", "--type=merge"),
        *("-p", json.dumps({"status": status})),
    )
    assert done.returncode == 0, done.stderr


def create_pod(apiserver: ApiServer, pod: FakePod) -> None:
    """The pod as the kubelet would report it."""
    document = pod.manifest
    namespace = document["metadata"]["namespace"]
    metadata = {key: document["metadata"][key] for key in ("name", "namespace", "labels")}
    spec = {"containers": [{"name": "engine", "image": "vllm"}]}
    apiserver.apply({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
    set_status(apiserver, "pod", namespace, pod.name, document["status"])
    pod.uid = stored(apiserver, "pod", namespace, pod.name)["metadata"]["uid"]


async def test_models_pods_and_keys_come_and_go(apiserver: ApiServer, namespace: str) -> None:
    ports = free_ports(2)
    apiserver.apply(pool(namespace, allowedNamespaces={"from": "Same"}))
    apiserver.apply(adapter(namespace, "pirate"))
    digest = "sha256:" + "a" * 64
    name = f"{namespace}/pirate@aaaaaaaaaaaa"
    set_status(
        apiserver,
        *("adapterdeployment", namespace, "pirate"),
        {
            "pool": {"name": "small", "namespace": namespace},
            "revisions": [{"digest": digest, "engineName": name, "state": "Resident"}],
        },
    )
    pod = FakePod("pod-1", "127.0.2.1", stored(apiserver, "servingpool", namespace, "small"), (ports[0], ports[1]))
    pod.resident.add(name)
    create_pod(apiserver, pod)
    settings = GatewaySettings(
        namespace=namespace,
        hold_seconds=SECONDS,
        host="127.0.0.1",
        port=0,
        internal_port=0,
        engine_port=ports[0],
        agent_port=ports[1],
    ).for_memory(512 * MIB)
    await pod.start_engine()
    await pod.start_agent()
    try:
        async with (
            await Cluster.connect(kubeconfig=apiserver.kubeconfig) as cluster,
            Gateway(settings, lambda: GATEWAY_KEYS, cluster) as gateway,
            aiohttp.ClientSession() as http,
        ):
            await eventually(gateway.feed.synced, "everything is read")
            key = new_key()
            url = f"http://127.0.0.1:{gateway.port}/v1/chat/completions"
            secret = key_record("test", namespace, key, home=namespace, namespaces=[namespace], models=["*"])

            async def ask(model: str) -> tuple[int, str]:
                headers = {"Authorization": f"Bearer {key}"}
                async with http.post(url, json={"model": model}, headers=headers) as response:
                    answer = await response.json()
                    return response.status, answer.get("model") or answer["error"]["code"]

            assert await ask("pirate") == (401, "invalid_api_key")
            await asyncio.to_thread(apiserver.apply, secret)
            await eventually(lambda: gateway.keys.find(key), "the key is known")
            assert await ask("pirate") == (200, name)
            assert await ask("base") == (200, f"{namespace}/base")
            await asyncio.to_thread(apiserver.kubectl, "delete", "adapterdeployment", "pirate", "-n", namespace)
            await eventually(lambda: f"{namespace}/pirate" not in gateway.catalog._models, "the adapter is gone")
            assert await ask("pirate") == (404, "model_not_found")
            await asyncio.to_thread(apiserver.kubectl, "delete", "configmap", "api-key-test", "-n", namespace)
            await eventually(lambda: gateway.keys.find(key) is None, "the key is gone")
            assert await ask("base") == (401, "invalid_api_key")
            await asyncio.to_thread(apiserver.kubectl, "delete", "pod", "pod-1", "-n", namespace, "--grace-period=0")
            await eventually(lambda: not gateway.backends._by_uid, "the pod is gone")
    finally:
        await pod.stop()


def status_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:  # noqa: S310 - an address of ours
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_bytes(keys_file(GATEWAY_KEYS))
    return path


def gateway_process(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    program = Path(sys.executable).with_name("tunesmith-gateway")
    return subprocess.Popen(
        [program, *arguments], env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_the_process_becomes_ready_and_exits_with_0(apiserver: ApiServer, namespace: str, key_file: Path) -> None:
    port, internal = free_port(), free_port()
    process = gateway_process(
        *("--namespace", namespace, "--gateway-key-file", str(key_file)),
        *("--port", str(port), "--internal-port", str(internal), "--linger-seconds", "0.2"),
        KUBECONFIG=str(apiserver.kubeconfig),
    )
    try:
        until(lambda: status_of(f"http://127.0.0.1:{internal}/readyz") == 200, seconds=SECONDS, what="readiness")
        assert status_of(f"http://127.0.0.1:{port}/v1/models") == 401
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert "Traceback" not in log
    assert GATEWAY_KEYS[0].decode() not in log


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "--namespace (chart value .Release.Namespace) is missing"),
        (("--namespace", "a", "--gateway-key-file", "/nowhere"), "the gateway's key file /nowhere cannot be read"),
        (
            ("--namespace", "a", "--hold-seconds", "-1"),
            "--hold-seconds (chart value gateway.holdSeconds): '-1' must be",
        ),
    ],
)
def test_invalid_settings_are_reported_in_a_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    process = gateway_process(*arguments)
    _, problems = process.communicate(timeout=SECONDS)
    assert process.returncode == 2
    assert sentence in problems
    assert problems.count("\n") == 1
