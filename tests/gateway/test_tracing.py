"""Traces of requests: spans, attributes, the engine's header, and who decides what is recorded."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode, format_span_id, format_trace_id

from tests.gateway.gateway_rig import adapter_manifest, eventually
from tunesmith.gateway.tracing import BoundedSampler, Tracing

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiohttp import web
    from opentelemetry.sdk.trace import ReadableSpan

    from tests.gateway.gateway_rig import Rig

PIRATE = "team/pirate@aaaaaaaaaaaa"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, NOT_SAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"
SECRET = "the treasure is buried under the palm"


class Traced:
    """A gateway whose spans stay in memory, and the headers that its pod got."""

    def __init__(self, rig: Rig, exporter: InMemorySpanExporter, tracing: Tracing) -> None:
        self.rig, self._exporter, self._tracing = rig, exporter, tracing
        self.headers: list[dict[str, str]] = []

    async def post(self, traceparent: str = "", **fields: Any) -> int:
        headers = {"Authorization": f"Bearer {self.rig.key}"} | ({"traceparent": traceparent} if traceparent else {})
        body = {"model": "pirate", "messages": [{"role": "user", "content": SECRET}], **fields}
        async with self.rig.http.post(f"{self.rig.url}/v1/chat/completions", json=body, headers=headers) as response:
            await response.read()
            return response.status

    def spans(self) -> list[ReadableSpan]:
        self._tracing._provider.force_flush()
        return sorted(self._exporter.get_finished_spans(), key=lambda span: span.start_time or 0)


@pytest.fixture
async def traced(start: Callable[..., Awaitable[Rig]]) -> Callable[..., Awaitable[Traced]]:
    async def run(ratio: float = 1.0, *, follow_clients: bool = False) -> Traced:
        rig = await start(hold_seconds=0.5)
        exporter = InMemorySpanExporter()
        tracing = Tracing("", ratio, follow_clients=follow_clients, exporter=exporter)
        rig.gateway.proxy._tracing = rig.gateway._tracing = tracing
        rig.watches.put(adapter_manifest("pirate"))
        found = Traced(rig, exporter, tracing)
        pod = await rig.add_pod(PIRATE)

        async def answer(request: web.Request, _: dict[str, Any]) -> None:
            found.headers.append(dict(request.headers))

        pod.answer = answer
        await eventually(lambda: rig.gateway.catalog.exists("team/pirate"), "the adapter is known")
        return found

    return run


async def test_a_clients_trace_continues_to_the_engine(traced: Callable[..., Awaitable[Traced]]) -> None:
    found = await traced()
    assert await found.post(SAMPLED, stream=True, max_tokens=7) == 200
    server, hold, attempt = found.spans()
    assert [server.name, hold.name, attempt.name] == ["POST /v1/chat/completions", "hold", "chat team/pirate"]
    assert (server.kind, attempt.kind) == (SpanKind.SERVER, SpanKind.CLIENT)
    assert {format_trace_id(span.context.trace_id) for span in (server, hold, attempt)} == {TRACE}
    assert server.parent is not None
    assert format_span_id(server.parent.span_id) == PARENT
    assert {span.parent.span_id for span in (hold, attempt) if span.parent} == {server.context.span_id}
    assert found.headers[-1]["traceparent"] == f"00-{TRACE}-{format_span_id(attempt.context.span_id)}-01"
    attributes = dict(attempt.attributes or {})
    assert attributes.pop("gen_ai.response.time_to_first_chunk") > 0
    assert attributes.pop("server.port") == found.rig._ports[0]
    assert attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "team/pirate",
        "gen_ai.request.stream": True,
        "gen_ai.request.max_tokens": 7,
        "gen_ai.response.model": PIRATE,
        "gen_ai.usage.input_tokens": 1,
        "gen_ai.usage.output_tokens": 3,
        "server.address": "127.0.1.1",
        "k8s.namespace.name": "serving",
        "k8s.pod.name": "pod-1",
    }
    attributes = dict(server.attributes or {})
    assert attributes.pop("tunesmith.request.id")
    assert attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "url.scheme": "http",
        "tunesmith.key.name": "default",
    }


async def test_a_refused_attempt_and_an_error_are_recorded_without_their_texts(
    traced: Callable[..., Awaitable[Traced]],
) -> None:
    found = await traced()
    found.rig.pods[0].draining = True
    assert await found.post() == 503
    spans = found.spans()
    attempts = [span for span in spans if span.kind is SpanKind.CLIENT]
    assert {(span.attributes or {})["error.type"] for span in attempts} == {"draining"}
    server = spans[0]
    assert server.status.status_code is StatusCode.ERROR
    assert server.status.description is None
    assert (server.attributes or {})["error.type"] == "503"
    assert not any(span.events for span in spans)


async def test_no_span_has_a_key_or_content(traced: Callable[..., Awaitable[Traced]]) -> None:
    found = await traced()
    await found.post()
    await found.post(model=SECRET)
    await found.post(model=found.rig.key)
    async with found.rig.http.get(f"{found.rig.url}/{SECRET}") as response:
        assert response.status == 404
    text = "".join(span.to_json() for span in found.spans())
    assert "POST /v1/chat/completions" in text
    assert SECRET not in text
    assert found.rig.key not in text


@pytest.mark.parametrize(
    ("ratio", "follow_clients", "traceparent", "recorded"),
    [
        pytest.param(0.0, False, SAMPLED, False, id="a client cannot force a trace"),
        pytest.param(0.0, True, SAMPLED, True, id="unless it may"),
        pytest.param(1.0, False, SAMPLED, True, id="it gets one at the gateway's ratio"),
        pytest.param(1.0, True, NOT_SAMPLED, False, id="it can decline"),
        pytest.param(1.0, False, "00-zz", True, id="an invalid header counts as none"),
    ],
)
async def test_who_decides(
    traced: Callable[..., Awaitable[Traced]], ratio: float, *, follow_clients: bool, traceparent: str, recorded: bool
) -> None:
    found = await traced(ratio, follow_clients=follow_clients)
    assert await found.post(traceparent) == 200
    assert bool(found.spans()) is recorded
    assert int(found.headers[-1]["traceparent"][-2:], 16) % 2 == recorded


def test_the_share_of_recorded_requests_does_not_depend_on_the_trace() -> None:
    """A client that sends one trace id again and again gets the share, as others do."""
    sampler = BoundedSampler(0.25, follow_clients=False)
    counts = Counter(sampler.should_sample(None, 1, "x").decision.is_sampled() for _ in range(4000))
    assert 0.2 < counts[True] / 4000 < 0.3


async def test_health_checks_have_no_trace(traced: Callable[..., Awaitable[Traced]]) -> None:
    found = await traced()
    async with found.rig.http.get(f"{found.rig.url}/health") as response:
        assert response.status == 200
    assert found.spans() == []


async def test_without_an_endpoint_the_engine_gets_no_header(rig: Rig) -> None:
    rig.watches.put(adapter_manifest("pirate"))
    pod = await rig.add_pod(PIRATE)
    seen: list[bool] = []

    async def answer(request: web.Request, _: dict[str, Any]) -> None:
        seen.append("traceparent" in request.headers)

    pod.answer = answer
    status, _ = await rig.chat("pirate")
    assert (status, seen) == (200, [False])


def test_opentelemetry_is_loaded_only_if_traces_are_on() -> None:
    program = "import sys, tunesmith.gateway.main; print([n for n in sys.modules if n.startswith('opentelemetry')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
