"""Parts of the benchmark: an API server with the operator and a gateway, and one pod of a pool with vLLM and its agent.

The kubelet is played: the benchmark writes the status of pods, and starts the processes of the pool's pod itself.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import aiohttp

from benchmarks.density import processes
from tests.controlplane.manifests import pool
from tests.server.server_rig import (
    BASE_NAME,
    REPOSITORY,
    STORE,
    Container,
    Pod,
    S3Server,
    agent_container,
    engine_container,
    free_port,
)
from tunesmith.contracts.agent import parse_keys, pod_tokens
from tunesmith.contracts.apikey import key_record, new_key

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from tests.controlplane.apiserver import ApiServer

Object = dict[str, Any]
SYSTEM, (NAMESPACE, MODEL) = "default", BASE_NAME.split("/")
PATIENCE_SECONDS = 900.0
API = "apis/tunesmith.dev/v1alpha1"
_OPERATOR = (
    "import tunesmith.controller.serving.agents as agents; agents.AGENT_PORT = {port}; "
    "from tunesmith.controller.main import main; main()"
)
"""The operator's program; pods of this machine share an address, so the agent has a port of its own."""


class Cluster:
    """Client of the API server, with an administrator's rights."""

    def __init__(self, server: ApiServer, http: aiohttp.ClientSession) -> None:
        config = json.loads(server.kubeconfig.read_text())
        self._url = config["clusters"][0]["cluster"]["server"]
        self._headers = {"Authorization": f"Bearer {config['users'][0]['user']['token']}"}
        self._http = http

    async def get(self, path: str) -> Object:
        """Return the object or list at a path."""
        return await self._call("GET", path)

    async def create(self, path: str, body: Object) -> Object:
        """Create an object."""
        return await self._call("POST", path, json=body)

    async def patch_status(self, pod: Object, status: Object) -> None:
        """Write the status of a pod as a kubelet does."""
        metadata = pod["metadata"]
        path = f"api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}/status"
        headers = {"Content-Type": "application/merge-patch+json"}
        await self._call("PATCH", path, data=json.dumps({"status": status}), headers=headers)

    async def watch(self, path: str) -> AsyncIterator[Object]:
        """Yield the objects of a list whenever one changes, until cancelled."""
        params, timeout = {"watch": "true"}, aiohttp.ClientTimeout(total=None)
        async with self._http.get(
            f"{self._url}/{path}", headers=self._headers, params=params, ssl=False, timeout=timeout
        ) as response:
            async for line in response.content:
                yield json.loads(line)["object"]

    async def pods(self, namespace: str, labels: str) -> list[Object]:
        """Return the pods with labels."""
        found = await self._call("GET", f"api/v1/namespaces/{namespace}/pods", params={"labelSelector": labels})
        return list(found["items"])

    async def _call(self, method: str, path: str, **options: Any) -> Object:
        headers = {**self._headers, **options.pop("headers", {})}
        async with self._http.request(method, f"{self._url}/{path}", headers=headers, ssl=False, **options) as response:
            text = await response.text()
            if response.status >= 400:  # noqa: PLR2004 - HTTP
                raise RuntimeError(f"{method} {path}: {response.status} {text[:500]}")
            found: Object = json.loads(text)
            return found


async def until(condition: Callable[[], Awaitable[Any]], what: str) -> Any:
    """Poll until the condition is true; return its value.

    Raises:
        TimeoutError: it did not hold within PATIENCE_SECONDS.
    """
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not (value := await condition()):  # noqa: ASYNC110 - other processes are observed
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise TimeoutError(f"not within {PATIENCE_SECONDS:.0f} s: {what}") from None
    return value


class World:
    """The processes; `start` returns when the pod's engine is ready, and the gateway knows it."""

    def __init__(
        self, folder: Path, base: Path, store: S3Server, server: ApiServer, http: aiohttp.ClientSession
    ) -> None:
        self.cluster = Cluster(server, http)
        self.key = new_key()
        self.gateway_url = f"http://127.0.0.1:{free_port()}"
        self.agent: Container | None = None
        self.engine: Container | None = None
        self.events_token = ""
        self.pod = Pod(folder / "pod", base, store)
        self._folder, self._server, self._http = folder, server, http
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    async def start(self) -> None:
        """Start everything."""
        for namespace in (NAMESPACE,):
            body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}
            await self.cluster.create("api/v1/namespaces", body)
        self._run(
            "operator",
            *("-c", _OPERATOR.format(port=self.pod.agent_port), "--store", STORE, "--namespace", SYSTEM),
            *("--trainer-image", "localhost/trainer:1", "--agent-image", "localhost/agent:1"),
            *("--engine-image", "localhost/engine:1", "--no-require-metrics-token"),
            *("--probe-port", str(free_port()), "--metrics-port", str(free_port())),
        )
        engine = {"maxLoras": 3, "maxAdapters": 64, "maxLoraRank": 16}
        body = pool(NAMESPACE, "pool", modelName=MODEL, engine=engine)
        await self.cluster.create(f"{API}/namespaces/{NAMESPACE}/servingpools", body)
        await self._start_pod(await self._first_pod("app.kubernetes.io/component=pool"))
        await self._start_gateway()

    def stop(self) -> None:
        """Stop everything."""
        for container in (self.engine, self.agent):
            if container is not None:
                container.kill()
        for process in self._processes.values():
            process.kill()
            process.wait()

    def usage(self) -> processes.Usage:
        """Return the processor seconds so far, by process."""
        found = processes.Usage({name: processes.of_process(process.pid) for name, process in self._processes.items()})
        for name, container in (("agent", self.agent), ("engine", self.engine)):
            if container is not None:
                found[name] = sum(processes.of_group(container.group).values())
        return found

    async def create_job(self, name: str) -> Object:
        """Create a FineTuneJob."""
        spec = {
            "baseModel": {"uri": "s3://models/base"},
            "dataset": {"train": [{"uri": "s3://data/train.jsonl"}]},
            "method": {"lora": {"rank": 8}},
        }
        return await self._create("FineTuneJob", name, spec)

    async def create_adapter(self, name: str, parity: str) -> Object:
        """Create an AdapterDeployment of the FineTuneJob with the same name."""
        return await self._create(
            "AdapterDeployment", name, {"adapterFrom": {"fineTuneJob": {"name": name}}, "parity": parity}
        )

    async def status(self, kind: str, name: str) -> Object:
        """Return an object's status; empty if it has none."""
        found = await self.cluster.get(f"{API}/namespaces/{NAMESPACE}/{kind.lower()}s/{name}")
        return dict(found.get("status") or {})

    async def training_pod(self, job: str, component: str) -> Object:
        """Return the pod of a FineTuneJob's stage once it exists."""
        return await self._first_pod(f"tunesmith.dev/finetunejob={job},app.kubernetes.io/component={component}")

    async def finish(self, pod: Object, message: Object) -> None:
        """End a training pod with a result."""
        at = "2026-01-01T00:00:00Z"
        ended = {
            "exitCode": 0,
            "reason": "Completed",
            "message": json.dumps(message),
            "startedAt": at,
            "finishedAt": at,
        }
        container = {"name": "trainer", "image": "t", "imageID": "", "ready": False, "restartCount": 0}
        scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": at}
        status = {
            "phase": "Succeeded",
            "conditions": [scheduled],
            "containerStatuses": [{**container, "state": {"terminated": ended}}],
        }
        await self.cluster.patch_status(pod, status)

    async def _create(self, kind: str, name: str, spec: Object) -> Object:
        metadata = {"name": name, "namespace": NAMESPACE}
        body = {"apiVersion": "tunesmith.dev/v1alpha1", "kind": kind, "metadata": metadata, "spec": spec}
        return await self.cluster.create(f"{API}/namespaces/{NAMESPACE}/{kind.lower()}s", body)

    async def _first_pod(self, labels: str) -> Object:
        async def found() -> list[Object]:
            return await self.cluster.pods(NAMESPACE, labels)

        return dict((await until(found, f"a pod with {labels}"))[0])

    async def _start_pod(self, pod: Object) -> None:
        """Start the agent and the engine of the pool's pod, with the keys in its Secret."""
        uid, volumes = pod["metadata"]["uid"], pod["spec"]["volumes"]
        secret = next(entry["secret"]["secretName"] for entry in volumes if entry["name"] == "agent-keys")
        data = (await self.cluster.get(f"api/v1/namespaces/{NAMESPACE}/secrets/{secret}"))["data"]
        for name, value in data.items():
            (self.pod.keys / name).write_bytes(base64.b64decode(value))
        self.events_token = pod_tokens(parse_keys(base64.b64decode(data["events"])), uid)[0]
        self.agent = agent_container(self.pod, pod_uid=uid, max_adapters=64)
        self.agent.start()
        token = self.pod.state / "admin-token"

        async def has_token() -> bool:
            return token.exists()

        await until(has_token, "the agent starts")
        self.engine = engine_container(self.pod, TUNESMITH_POD_UID=uid)
        self.engine.start()

        async def healthy() -> bool:
            with suppress(aiohttp.ClientError, OSError):
                async with self._http.get(f"{self.pod.engine_url}/health") as response:
                    return response.status == 200  # noqa: PLR2004 - HTTP
            return False

        await until(healthy, f"the engine starts; see {self.engine.log}")
        at = "2026-01-01T00:00:00Z"
        ready = {"type": "Ready", "status": "True", "lastTransitionTime": at}
        gate = {"type": "tunesmith.dev/adapters", "status": "True", "lastTransitionTime": at}
        address = {"podIP": "127.0.0.1", "podIPs": [{"ip": "127.0.0.1"}]}
        await self.cluster.patch_status(pod, {"phase": "Running", "conditions": [ready, gate], **address})

    async def _start_gateway(self) -> None:
        async def key() -> str:
            with suppress(RuntimeError):
                found = await self.cluster.get(f"api/v1/namespaces/{SYSTEM}/secrets/tunesmith-gateway-key")
                return str(found["data"]["key"])
            return ""

        path = self._folder / "gateway-key"
        path.write_bytes(base64.b64decode(await until(key, "the gateways' key")))
        record = key_record("benchmark", SYSTEM, self.key, home=NAMESPACE, namespaces=[NAMESPACE], models=["*"])
        await self.cluster.create(f"api/v1/namespaces/{SYSTEM}/configmaps", record)
        self._run(
            "gateway",
            *("-c", "from tunesmith.gateway.main import main; main()", "--namespace", SYSTEM),
            *("--gateway-key-file", str(path), "--host", "127.0.0.1", "--port", self.gateway_url.rpartition(":")[2]),
            *("--internal-port", str(free_port()), "--agent-port", str(self.pod.agent_port)),
            *("--engine-port", str(self.pod.engine_port)),
        )

        async def serves() -> bool:
            with suppress(aiohttp.ClientError, OSError):
                body = {"model": BASE_NAME, "prompt": "Hello", "max_tokens": 1}
                headers = {"Authorization": f"Bearer {self.key}"}
                async with self._http.post(
                    f"{self.gateway_url}/v1/completions", json=body, headers=headers
                ) as response:
                    return response.status == 200  # noqa: PLR2004 - HTTP
            return False

        await until(serves, f"the gateway serves the base model; see {self._folder}")

    def _run(self, name: str, *arguments: str) -> None:
        environment = {**os.environ, "KUBECONFIG": str(self._server.kubeconfig)}
        with (self._folder / f"{name}.log").open("wb") as log:
            command = [str(REPOSITORY / ".venv/bin/python"), *arguments]
            self._processes[name] = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
