"""Plays the kubelet, the agents and a gateway for pods of ServingPools, which the real Deployment controller makes.

Each pod gets a loopback address of its own, on which an agent listens that keeps to the protocol.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import random
import socket
from typing import TYPE_CHECKING, Any

from aiohttp import web

from tests.controlplane.kubelet import now
from tests.controlplane.operatorprocess import until
from tunesmith.cluster.errors import ConflictError, NotFoundError
from tunesmith.contracts.agent import (
    AGENT_PORT,
    GATEWAY_INTERNAL_PORT,
    AdapterDemand,
    DesiredAdapters,
    GatewayDemand,
    PodState,
    Residency,
    ResidencyState,
    accepts,
    demand_tokens,
    list_digest,
    parse_keys,
    pod_tokens,
)
from tunesmith.contracts.network import component_labels
from tunesmith.contracts.podevents import EventWriter
from tunesmith.contracts.traffic import Traffic, TrafficCounts

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tunesmith.cluster.client import Cluster
    from tunesmith.contracts.agent import Keys

Object = dict[str, Any]
FINGERPRINT = "sha256:" + "f" * 64
GATE = "tunesmith.dev/adapters"


class Lines:
    """Serves streams of JSON lines: one on each change and at least every half second. Each reader has a writer."""

    def __init__(self, tokens: tuple[str, ...], path: str, writer: Callable[[], Callable[[], bytes]]) -> None:
        self.tokens = tokens
        self.control_tokens: tuple[str, ...] = ()
        self.refused = 0
        self.address = f"127.{random.randint(1, 254)}.{random.randint(1, 254)}.{random.randint(1, 254)}"  # noqa: S311
        self.application = web.Application(middlewares=[self._guard])
        self.application.add_routes([web.get(path, self._stream)])
        self._writer = writer
        self._changed = asyncio.Condition()
        self._runner: web.AppRunner | None = None
        self._socket: socket.socket | None = None
        self.silent = False

    async def listen(self, port: int) -> None:
        # A socket of its own: asyncio loses those of a server whose start is cancelled.
        self._socket = socket.create_server((self.address, port))
        self._runner = web.AppRunner(self.application, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.SockSite(self._runner, self._socket).start()

    async def close(self) -> None:
        try:
            if self._runner is not None:
                await self._runner.cleanup()
        finally:
            if self._socket is not None:
                self._socket.close()

    async def disconnect(self) -> None:
        """Break all connections; new ones are accepted."""
        assert self._runner is not None
        assert self._runner.server is not None
        for connection in self._runner.server.connections:
            connection.force_close()

    async def change(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        tokens = self.control_tokens if request.method == "PUT" else self.tokens
        if not accepts(request.headers.get("Authorization", ""), tokens):
            self.refused += 1
            return web.Response(status=401)
        response: web.StreamResponse = await handler(request)
        return response

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        line = self._writer()
        with contextlib.suppress(ConnectionResetError):
            while True:
                if not self.silent:
                    await response.write(line())
                async with self._changed:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._changed.wait(), 0.5)
        return response


class FakeAgent(Lines):
    """An agent whose engine loads at once; `damaged` names what it finds damaged."""

    def __init__(self, keys: dict[str, Keys], pod_uid: str, damaged: set[str]) -> None:
        super().__init__(pod_tokens(keys["events"], pod_uid), "/v1/events", self._events)
        self.pod_uid = pod_uid
        self.control_tokens = pod_tokens(keys["control"], pod_uid)
        self.state = PodState(base_model_fingerprint=FINGERPRINT, engine_ready=True)
        self.lists: list[DesiredAdapters] = []
        self.damaged = damaged
        self.application.add_routes([web.put("/v1/adapters", self._put)])

    def _events(self) -> Callable[[], bytes]:
        writer = EventWriter(traffic=True)
        return lambda: writer.line(self.state)

    @property
    def holds(self) -> list[str]:
        return sorted(entry.engine_name for entry in self.state.adapters if entry.state is ResidencyState.RESIDENT)

    async def set(self, **changes: Any) -> None:
        self.state = self.state.model_copy(update=changes)
        await self.change()

    async def serve(self, engine_name: str, requests: int, errors: int = 0) -> None:
        """Count requests that the engine has answered, or failed to, since its start."""
        counts = TrafficCounts(requests=requests, errors=errors)
        await self.set(traffic={**self.state.traffic, engine_name: Traffic(start="a0", served=counts)})

    async def _put(self, request: web.Request) -> web.Response:
        wanted = DesiredAdapters.model_validate_json(await request.read())
        if (wanted.epoch, wanted.sequence) < (self.state.epoch, self.state.sequence):
            return web.json_response({"error": "older than the list that is there"}, status=409)
        self.lists.append(wanted)
        await self.set(
            epoch=wanted.epoch,
            sequence=wanted.sequence,
            list_digest=list_digest(wanted.adapters),
            adapters=[
                Residency(
                    engine_name=adapter.engine_name,
                    digest=adapter.digest,
                    state=ResidencyState.FAILED if adapter.engine_name in self.damaged else ResidencyState.RESIDENT,
                    message="adapter_model.safetensors has another SHA-256"
                    if adapter.engine_name in self.damaged
                    else "",
                    permanent=adapter.engine_name in self.damaged,
                )
                for adapter in wanted.adapters
            ],
        )
        return web.json_response({"epoch": wanted.epoch, "sequence": wanted.sequence})


class FakeGateway(Lines):
    """A gateway with requests; it registers itself as a pod."""

    def __init__(self, keys: Keys) -> None:
        super().__init__(demand_tokens(keys), "/v1/demand", lambda: self._demand)
        self.demand = GatewayDemand()

    def _demand(self) -> bytes:
        return self.demand.model_dump_json(by_alias=True).encode() + b"\n"

    async def set(self, **models: int) -> None:
        self.demand = GatewayDemand(models={name: AdapterDemand(running=count) for name, count in models.items()})
        await self.change()


@contextlib.asynccontextmanager
async def gateway(cluster: Cluster, namespace: str) -> AsyncIterator[FakeGateway]:
    """A gateway pod in the operator's namespace."""

    async def written() -> bool:
        return await cluster.find("Secret", "tunesmith-gateway-key", namespace) is not None

    await until(written, "the gateways' key")
    secret = await cluster.get("Secret", "tunesmith-gateway-key", namespace)
    fake = FakeGateway(parse_keys(base64.b64decode(secret["data"]["key"])))
    await fake.listen(GATEWAY_INTERNAL_PORT)
    pod = await cluster.create(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "generateName": "gateway-",
                "namespace": namespace,
                "labels": component_labels("tunesmith", "gateway"),
            },
            "spec": {"containers": [{"name": "gateway", "image": "gateway:1"}]},
        }
    )
    status = {"phase": "Running", "podIP": fake.address, "podIPs": [{"ip": fake.address}]}
    await cluster.replace_status({**pod, "status": status})
    try:
        yield fake
    finally:
        await cluster.delete("Pod", pod["metadata"]["name"], namespace, grace_seconds=0)
        await fake.close()


class PoolKubelet:
    """Runs the pool pods of a namespace."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster = cluster
        self.namespace = namespace
        self.agents: dict[str, FakeAgent] = {}
        """By pod name."""
        self.damaged: set[str] = set()
        self.engines_start = True
        """Whether the engines of pods that come from now on are ready at once."""

    async def run(self) -> None:
        """Play until cancelled."""
        labels = "app.kubernetes.io/component=pool"
        try:
            async for event in self.cluster.watch("Pod", self.namespace, labels=labels):
                if event.type == "SYNCED":
                    continue
                name = event.object["metadata"]["name"]
                if event.type == "DELETED":
                    if name in self.agents:
                        await self.agents[name].close()
                        del self.agents[name]
                else:
                    await self._play(event.object)
        finally:
            async with contextlib.AsyncExitStack() as stack:  # each is closed, also after one that could not be
                for agent in self.agents.values():
                    stack.push_async_callback(agent.close)

    def holders(self, engine_name: str) -> list[str]:
        """Names of the pods on which a revision is resident."""
        return sorted(name for name, agent in self.agents.items() if engine_name in agent.holds)

    async def _play(self, pod: Object) -> None:
        metadata = pod["metadata"]
        if metadata["name"] not in self.agents:
            secret_name = next(
                entry["secret"]["secretName"] for entry in pod["spec"]["volumes"] if entry["name"] == "agent-keys"
            )
            secret = await self.cluster.get("Secret", secret_name, metadata["namespace"])
            keys = {name: parse_keys(base64.b64decode(value)) for name, value in secret["data"].items()}
            agent = FakeAgent(keys, metadata["uid"], self.damaged)
            await agent.set(engine_ready=self.engines_start)
            self.agents[metadata["name"]] = agent
            await agent.listen(AGENT_PORT)
        address = self.agents[metadata["name"]].address
        conditions = {condition["type"]: condition for condition in (pod.get("status") or {}).get("conditions") or ()}
        is_open = conditions.get(GATE, {}).get("status") == "True"
        ready = "True" if is_open else "False"
        if pod["status"].get("podIP") == address and conditions.get("Ready", {}).get("status") == ready:
            return
        conditions["Ready"] = {"type": "Ready", "status": ready, "lastTransitionTime": now()}
        status = {
            **pod["status"],
            "phase": "Running",
            "podIP": address,
            "podIPs": [{"ip": address}],
            "conditions": list(conditions.values()),
        }
        # A conflict or a deletion comes as the next event.
        with contextlib.suppress(ConflictError, NotFoundError):
            await self.cluster.replace_status({**pod, "status": status})
