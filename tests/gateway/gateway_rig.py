"""Surroundings of a gateway: the cluster's watches, and pods that speak the agent's and the engine's protocol."""

from __future__ import annotations

import asyncio
import secrets
import socket
import time
from typing import TYPE_CHECKING, Any, Literal

import aiohttp
from aiohttp import web

from tunesmith.cluster.watch import WatchEvent
from tunesmith.contracts.agent import (
    PodState,
    PodUse,
    Residency,
    ResidencyState,
    accepts,
    control_keys,
    events_keys,
    keys_file,
    pod_tokens,
    serving_keys,
)
from tunesmith.contracts.apikey import key_record, new_key
from tunesmith.contracts.crash import CrashedRequest, EngineCrash
from tunesmith.contracts.location import engine_name
from tunesmith.contracts.podevents import EventWriter
from tunesmith.contracts.traffic import SHADOW_HEADER

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from multidict import CIMultiDictProxy

    from tunesmith.contracts.agent import Keys
    from tunesmith.gateway.server import Gateway

GATEWAY_KEYS = (b"a gateway key of the tests, thirty-two",)
OWN_NAMESPACE = "tunesmith-system"
DEADLINE = 120.0


def digest(character: str) -> str:
    return "sha256:" + character * 64


async def eventually(condition: Callable[[], object], what: str) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():  # noqa: ASYNC110 - any condition, including those without an event
            await asyncio.sleep(0.01)
    assert condition(), what


class Watches:
    """The cluster's watches: tests put objects in, the gateway sees events.

    Args:
        keep: False forgets objects that a watch has sent, so that the gateway's process holds none of them.
    """

    def __init__(self, *, keep: bool = True) -> None:
        self._keep = keep
        self._objects: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
        self._queues: dict[str, asyncio.Queue[WatchEvent]] = {}
        self.asked: dict[str, tuple[str | None, str]] = {}
        self.gateway_keys = GATEWAY_KEYS
        """Content of the gateway's key file."""
        self.sync = asyncio.Event()
        self.sync.set()

    def put(self, document: dict[str, Any]) -> None:
        self._send_event("MODIFIED", document)
        metadata = document["metadata"]
        if self._keep or document["kind"] not in self._queues:
            self._objects.setdefault(document["kind"], {})[metadata.get("namespace", ""), metadata["name"]] = document

    def delete(self, document: dict[str, Any]) -> None:
        metadata = document["metadata"]
        if self._objects.get(document["kind"], {}).pop((metadata.get("namespace", ""), metadata["name"]), None):
            self._send_event("DELETED", document)

    def _send_event(self, type_: Literal["MODIFIED", "DELETED"], document: dict[str, Any]) -> None:
        if document["kind"] in self._queues:
            self._queues[document["kind"]].put_nowait(WatchEvent(type_, document))

    async def watch(
        self,
        kind: str,
        namespace: str | None = None,
        *,
        labels: str = "",
        fields: str = "",
        alive: Callable[[], None],
        keep: Callable[[Any], Any],
    ) -> AsyncIterator[WatchEvent]:
        self.asked[kind] = (namespace, labels or fields)
        await self.sync.wait()
        alive()
        self._queues[kind] = asyncio.Queue()
        for document in list(self._objects.get(kind, {}).values()):
            yield WatchEvent("ADDED", keep(document))
        yield WatchEvent("SYNCED", {})
        while True:
            event = await self._queues[kind].get()
            yield event._replace(object=keep(event.object))


def pod_manifest(
    pool: dict[str, Any], name: str, uid: str, address: str = "127.0.0.1", *, ready: bool = True
) -> dict[str, Any]:
    """A pod of a pool, as the API server has it."""
    metadata = pool["metadata"]
    return {
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": metadata["namespace"],
            "uid": uid,
            "labels": {"tunesmith.dev/pool": metadata["name"], "tunesmith.dev/pool-uid": metadata["uid"]},
        },
        "status": {
            "phase": "Running",
            "podIP": address,
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        },
    }


def write_pool_keys(folder: Path, pool: dict[str, Any]) -> None:
    """Write the keys of a pool, with which the rig's gateways reach the pods, as its Secret has them."""
    place = (pool["metadata"]["namespace"], pool["metadata"]["uid"])
    for name, derive in (("serving", serving_keys), ("events", events_keys), ("control", control_keys)):
        (folder / name).write_bytes(keys_file(derive(GATEWAY_KEYS, *place)))


class FakePod:
    """A pool's pod: an agent and an engine behind the middleware, as contracts.agent and vLLM have them."""

    def __init__(self, name: str, address: str, pool: dict[str, Any], ports: tuple[int, int]) -> None:
        self.name, self.address, self.pool = name, address, pool
        self.uid = f"uid-{name}"
        self._ports = ports
        self.base = f"{pool['metadata']['namespace']}/{pool['spec']['modelName']}"
        self.resident: set[str] = set()
        self.announced: set[str] | None = None
        self.engine_ready = True
        self.draining = False
        self.stalled = ""
        self.use = PodUse()
        self.ready = True
        self.seen: list[dict[str, Any]] = []
        self.mirrored: list[dict[str, Any]] = []
        self.digests: list[str] = []
        self.crashes: list[EngineCrash] = []
        self.running = 0
        self.max_running = 0
        self.disconnected = 0
        self.answer: Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse | None]] | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.silent = False
        self.max_body_bytes = 8 * 1024 * 1024
        self.keys: Keys = GATEWAY_KEYS
        self._changed = asyncio.Condition()
        self._runners: dict[str, web.AppRunner] = {}

    @property
    def manifest(self) -> dict[str, Any]:
        return pod_manifest(self.pool, self.name, self.uid, self.address, ready=self.ready)

    def tokens(self, derive: Callable[[Keys, str, str], Keys]) -> tuple[str, ...]:
        metadata = self.pool["metadata"]
        return pod_tokens(derive(self.keys, metadata["namespace"], metadata["uid"]), self.uid)

    async def start_engine(self) -> None:
        engine = web.Application(client_max_size=self.max_body_bytes)
        engine.router.add_post("/{path:.+}", self._generate)
        await self._serve("engine", engine, self._ports[0])

    async def start_agent(self) -> None:
        agent = web.Application()
        agent.router.add_get("/v1/events", self._events)
        await self._serve("agent", agent, self._ports[1])

    async def _serve(self, which: str, app: web.Application, port: int) -> None:
        runner = self._runners[which] = web.AppRunner(
            app, handler_cancellation=True, shutdown_timeout=0.05, access_log=None
        )
        await runner.setup()
        await web.TCPSite(runner, self.address, port, reuse_address=True).start()

    async def stop(self, *which: str) -> None:
        for part in which or tuple(self._runners):
            runner = self._runners.pop(part, None)
            if runner is not None:
                for connection in runner.server.connections if runner.server else []:
                    connection.close()
                await runner.cleanup()

    async def notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def hold(self, *names: str) -> None:
        self.resident |= set(names)
        await self.notify()

    async def report_crash(self, *digests: str, model: str = "team/pirate@aaaaaaaaaaaa") -> None:
        """Report a crash during which the requests were in flight, as the agent does."""
        requests = [CrashedRequest(digest=entry, model=model) for entry in digests]
        id_ = secrets.token_hex(8)
        self.crashes.append(EngineCrash(id=id_, at=time.time(), reason="killed", was_ready=True, requests=requests))
        await self.notify()

    async def _events(self, request: web.Request) -> web.StreamResponse:
        if not accepts(request.headers.get("Authorization", ""), self.tokens(events_keys)):
            raise web.HTTPUnauthorized
        response = web.StreamResponse()
        await response.prepare(request)
        writer = EventWriter()
        while not self.silent:
            names = self.resident if self.announced is None else self.announced
            state = PodState(
                engine_ready=self.engine_ready,
                draining=self.draining,
                stalled=self.stalled,
                crashes=list(self.crashes),
                use=self.use,
                adapters=[
                    Residency(engine_name=name, digest=digest("a"), state=ResidencyState.RESIDENT)
                    for name in sorted(names)
                ],
            )
            await response.write(writer.line(state))
            async with self._changed:
                try:
                    async with asyncio.timeout(0.5):
                        await self._changed.wait()
                except TimeoutError:
                    continue
        await asyncio.Event().wait()
        return response

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        if not accepts(request.headers.get("Authorization", ""), self.tokens(serving_keys)):
            raise web.HTTPUnauthorized
        body = await request.json()
        if self.draining:
            return web.json_response(
                {"error": {"message": "draining", "code": "not_started"}},
                status=503,
                headers={"x-tunesmith-not-started": "true"},
            )
        (self.mirrored if request.headers.get(SHADOW_HEADER) == "true" else self.seen).append(body)
        self.digests.append(request.headers["x-tunesmith-digest"])
        if self.answer is not None:
            answer = await self.answer(request, body)
            if answer is not None:
                return answer
        model = body["model"]
        if model != self.base and model not in self.resident:
            return web.json_response({"error": {"message": f"no {model}", "type": "NotFoundError"}}, status=404)
        self.running += 1
        self.max_running = max(self.max_running, self.running)
        try:
            if body.get("stream"):
                return await self._stream(request, model, usage=(body.get("stream_options") or {}).get("include_usage"))
            await self.gate.wait()
            return web.Response(body=_completion(model, self.name), content_type="application/json")
        except (asyncio.CancelledError, ConnectionResetError):
            self.disconnected += 1
            raise
        finally:
            self.running -= 1

    async def _stream(self, request: web.Request, model: str, *, usage: bool | None) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        for word in ("Ahoy", " there", f" from {self.name}"):
            await response.write(_chunk(model, word))
            await self.gate.wait()
        if usage:
            await response.write(
                b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"%s","choices":[],'
                b'"usage":{"prompt_tokens":1,"total_tokens":4,"completion_tokens":3}}\n\n' % model.encode()
            )
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response


def _completion(model: str, text: str) -> bytes:
    return (
        b'{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"%s","choices":[{"index":0,"message":'
        b'{"role":"assistant","content":"%s"},"finish_reason":"stop"}],'
        b'"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}' % (model.encode(), text.encode())
    )


def _chunk(model: str, text: str) -> bytes:
    return (
        b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"%s","choices":'
        b'[{"index":0,"delta":{"content":"%s"},"finish_reason":null}]}\n\n' % (model.encode(), text.encode())
    )


def condition(type_: str, status: str, reason: str, message: str = "") -> dict[str, Any]:
    return {
        "type": type_,
        "status": status,
        "reason": reason,
        "message": message,
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }


def pool_manifest(
    name: str = "pool",
    namespace: str = "serving",
    *,
    model: str = "base",
    open_to: str = "All",
    status: dict[str, Any] | None = None,
    **spec: Any,
) -> dict[str, Any]:
    return {
        "kind": "ServingPool",
        "apiVersion": "tunesmith.dev/v1alpha1",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": f"uid-{namespace}-{name}",
            "creationTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": {
            "modelName": model,
            "baseModel": {"uri": "s3://models/base"},
            "allowedNamespaces": {"from": open_to},
            **spec,
        },
        "status": status or {},
    }


def adapter_manifest(
    name: str,
    namespace: str = "team",
    *,
    model: str | None = None,
    pool: tuple[str, str] | None = ("serving", "pool"),
    digests: tuple[str, ...] = ("a",),
    state: str = "Resident",
    created: str = "2026-01-02T00:00:00Z",
    conditions: list[dict[str, Any]] | None = None,
    whole: bool = False,
    weights: tuple[int, ...] = (),
    shadow: int | None = None,
) -> dict[str, Any]:
    status: dict[str, Any] = {"conditions": conditions or [condition("Resolved", "True", "Resolved")]}
    if pool is not None:
        status["pool"] = {"namespace": pool[0], "name": pool[1]}
    status["revisions"] = [
        {
            "digest": digest(character),
            "engineName": engine_name(namespace, model or name, digest(character)),
            "state": state,
            **({"baseModel": True} if whole else {}),
        }
        for character in digests
    ]
    for revision, weight in zip(status["revisions"], weights, strict=False):
        revision["weight"] = weight
    if shadow is not None:
        status["revisions"][0]["shadowPercent"] = shadow
    return {
        "kind": "AdapterDeployment",
        "apiVersion": "tunesmith.dev/v1alpha1",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": f"uid-{namespace}-{name}",
            "creationTimestamp": created,
        },
        "spec": {"adapterFrom": {"fineTuneJob": {"name": "job"}}, "modelName": model or name},
        "status": status,
    }


class Rig:
    """A gateway, its cluster and its clients."""

    def __init__(self, gateway: Gateway, watches: Watches, http: aiohttp.ClientSession, ports: tuple[int, int]) -> None:
        self.gateway, self.watches, self.http = gateway, watches, http
        self.pods: list[FakePod] = []
        self._ports = ports
        self.pool = pool_manifest()
        self.url = f"http://127.0.0.1:{gateway.port}"
        self.internal_url = f"http://127.0.0.1:{gateway.internal_port}"
        self.key = self.add_key("default", home="team")

    def add_key(
        self,
        name: str,
        *,
        home: str,
        namespaces: list[str] | None = None,
        models: list[str] | None = None,
        **limits: Any,
    ) -> str:
        key = new_key()
        record = key_record(
            name, OWN_NAMESPACE, key, home=home, namespaces=namespaces or [home], models=models or ["*"], **limits
        )
        self.watches.put(record)
        return key

    async def add_pod(self, *resident: str, pool: dict[str, Any] | None = None, announce: bool = True) -> FakePod:
        number = len(self.pods) + 1
        pod = FakePod(f"pod-{number}", f"127.0.1.{number}", pool or self.pool, self._ports)
        pod.resident = set(resident)
        self.pods.append(pod)
        await pod.start_engine()
        await pod.start_agent()
        if announce:
            self.watches.put(pod.pool)
            self.watches.put(pod.manifest)
            await self.settled(pod)
        return pod

    async def settled(self, pod: FakePod) -> None:
        """Wait until the gateway knows which models the pod holds."""
        backends = self.gateway.backends._by_uid

        def known() -> bool:
            backend = backends.get(f"uid-{pod.name}")
            announced = pod.resident if pod.announced is None else pod.announced
            return backend is not None and backend.resident == announced and backend.last_report_at > 0

        await eventually(known, f"the state of {pod.name} is known")

    async def post(
        self,
        body: object = None,
        *,
        path: str = "/v1/chat/completions",
        key: str | None = None,
        session: str | None = None,
    ) -> tuple[int, dict[str, Any], CIMultiDictProxy[str]]:
        headers = {"Authorization": f"Bearer {key or self.key}"}
        headers |= {} if session is None else {"X-Session-ID": session}
        async with self.http.post(f"{self.url}{path}", json=body, headers=headers) as response:
            return response.status, await response.json(), response.headers

    async def chat(
        self, model: str, *, key: str | None = None, session: str | None = None, **fields: object
    ) -> tuple[int, dict[str, Any]]:
        body = {"model": model, "messages": [{"role": "user", "content": "Hello"}]} | fields
        status, answer, _ = await self.post(body, key=key, session=session)
        return status, answer


def free_ports(count: int) -> tuple[int, ...]:
    sockets = [socket.socket() for _ in range(count)]
    for listener in sockets:
        listener.bind(("0.0.0.0", 0))  # noqa: S104 - free on every loopback address
    ports = tuple(listener.getsockname()[1] for listener in sockets)
    for listener in sockets:
        listener.close()
    return ports
