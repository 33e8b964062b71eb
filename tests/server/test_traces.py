"""A trace from a client over the gateway to vLLM, as OpenTelemetry's collector receives it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import threading
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

import aiohttp

from benchmarks.density.rig import Gateway, ServingPod
from e2e.cluster import binaries
from tests.server.http_server import http_server
from tests.server.server_rig import free_port, listens, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.server.server_rig import Artifact, S3Server

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "the treasure is buried under the palm"
DEADLINE = 600.0


class Received:
    """Spans that a collector has sent on, with the name of their service."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._lock = threading.Lock()

    def add(self, text: str) -> None:
        with self._lock:
            self.texts.append(text)

    def spans(self) -> list[dict[str, Any]]:
        with self._lock:
            documents = [json.loads(text) for text in self.texts]
        return [
            {**span, "attributes": values(span), "service": values(group["resource"]).get("service.name")}
            for document in documents
            for group in document["resourceSpans"]
            for scope in group["scopeSpans"]
            for span in scope["spans"]
            if span["traceId"] == TRACE
        ]


def values(holder: dict[str, Any]) -> dict[str, Any]:
    return {entry["key"]: next(iter(entry["value"].values())) for entry in holder.get("attributes", [])}


@contextlib.contextmanager
def collector(folder: Path, received: Received) -> Iterator[str]:
    """OpenTelemetry's collector; the value is the URL of its OTLP receiver."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.add(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http_server(Handler) as sink:
        port = free_port()
        (folder / "collector.yaml").write_text(
            json.dumps(
                {
                    "receivers": {"otlp": {"protocols": {"http": {"endpoint": f"127.0.0.1:{port}"}}}},
                    "exporters": {"otlp_http": {"endpoint": sink, "encoding": "json", "compression": "none"}},
                    "service": {
                        "telemetry": {"metrics": {"level": "none"}},
                        "pipelines": {"traces": {"receivers": ["otlp"], "exporters": ["otlp_http"]}},
                    },
                }
            )
        )
        program = binaries.build("otelcol") / "otelcol"
        with (folder / "collector.log").open("wb") as log:
            process = subprocess.Popen([program, f"--config={folder / 'collector.yaml'}"], stdout=log, stderr=log)
        try:
            wait_until(lambda: process.poll() is not None or listens(port), "the collector listens")
            assert process.poll() is None, (folder / "collector.log").read_text()
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


async def test_a_trace_reaches_the_collector_from_the_gateway_and_the_engine(
    tmp_path: Path, base: Path, store: S3Server, adapter: Callable[..., Artifact]
) -> None:
    received = Received()
    with collector(tmp_path, received) as endpoint:
        pod = ServingPod(
            "pod-1",
            tmp_path / "pod-1",
            base,
            store,
            8,
            2**30,
            options=("--otlp-traces-endpoint", f"{endpoint}/v1/traces"),
            variables={"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_SERVICE_NAME": "vllm"},
        )
        gateway = Gateway(tmp_path / "gateway", [pod])
        entries = [adapter().publish(store, "team", "a0000")]
        pod.agent.start()
        await until((pod.pod.state / "admin-token").exists, "the agent starts")
        pod.engine.start()
        await gateway.start(entries, f"--tracing-endpoint={endpoint}", "--tracing-sampling-ratio=1")
        async with aiohttp.ClientSession() as http:
            follow = asyncio.create_task(pod.follow(http))
            try:
                await until(lambda: pod.state.engine_ready or pod.check(), "the engine is ready")
                await pod.want(http, entries)
                await until(lambda: pod.resident or pod.check(), "the adapter is loaded")
                await answered(http, gateway)
                await until(
                    lambda: {"tunesmith-gateway", "vllm"} <= {span["service"] for span in received.spans()},
                    "spans of both arrive",
                )
            finally:
                follow.cancel()
                await gateway.stop()
                pod.engine.kill()
                pod.agent.kill()
        # The gateway has sent its last spans before it stopped.
        spans = received.spans()
    by_id = {span["spanId"]: span for span in spans}
    (engine,) = [span for span in spans if span["service"] == "vllm" and span["name"] == "llm_request"]
    attempt = by_id[engine["parentSpanId"]]
    server = by_id[attempt["parentSpanId"]]
    assert (server["name"], server["parentSpanId"]) == ("POST /v1/chat/completions", PARENT)
    assert attempt["name"] == "chat team/a0000"
    assert attempt["attributes"]["gen_ai.response.model"] == entries[0]["engineName"]
    assert int(engine["attributes"]["gen_ai.usage.completion_tokens"]) == 4
    text = "".join(received.texts)
    assert SECRET not in text
    assert gateway.key not in text


async def answered(http: aiohttp.ClientSession, gateway: Gateway) -> None:
    """A chat completion is answered; the gateway's port may not be open yet."""
    headers = {"Authorization": f"Bearer {gateway.key}", "traceparent": f"00-{TRACE}-{PARENT}-01"}
    body = {"model": "a0000", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 4, "ignore_eos": True}
    async with asyncio.timeout(DEADLINE):
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with http.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers) as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.2)


async def until(condition: Callable[[], object], what: str) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():  # noqa: ASYNC110 - conditions of other processes
            await asyncio.sleep(0.2)
    assert condition(), what
