"""OpenTelemetry traces: a client's trace continues through the gateway to the engine. Imported only if they are on.

A request has a server span, with a span for each wait for a pod and a client span for each attempt at one. Names and
attributes follow OpenTelemetry's semantic conventions for HTTP and generative AI. No attribute holds a key, or a part
of a request or an answer.
"""

from __future__ import annotations

import random
import socket
from contextlib import contextmanager
from http import HTTPStatus
from importlib.metadata import version
from typing import TYPE_CHECKING

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.trace import SpanKind, StatusCode, get_current_span, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Link, Span, Tracer, TraceState
    from opentelemetry.util.types import Attributes

    from tunesmith.gateway.backends import Backend
    from tunesmith.gateway.request import Call

SERVICE_NAME = "tunesmith-gateway"
_TRACES_PATH = "/v1/traces"
_MAX_TRACE_STATE = 512
"""Characters of a client's header `tracestate` that are passed on, as W3C Trace Context asks for at least."""
_MAX_ATTRIBUTE = 256
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/embeddings": "embeddings",
    "/v1/messages/count_tokens": "tokenize",
}
"""Other APIs have the last part of their path as the operation."""
_PROPAGATOR = TraceContextTextMapPropagator()


class BoundedSampler(Sampler):
    """A share of the requests, whatever their clients decide.

    Args:
        ratio: share of the requests that is recorded, from 0 to 1.
        follow_clients: also record each request whose client records it; otherwise such requests are recorded at
            `ratio` as well. A request whose client decided not to record it is never recorded.
    """

    def __init__(self, ratio: float, *, follow_clients: bool) -> None:
        self._ratio = ratio
        self._follow_clients = follow_clients

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,  # noqa: ARG002 - a client chooses it, so it must not decide
        name: str,  # noqa: ARG002 - the interface
        kind: SpanKind | None = None,  # noqa: ARG002 - the interface
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,  # noqa: ARG002 - the interface
        trace_state: TraceState | None = None,  # noqa: ARG002 - the parent's is kept
    ) -> SamplingResult:
        """Return the decision for a span. Spans within a request follow its server span."""
        parent = get_current_span(parent_context).get_span_context()
        if parent.is_valid and not (parent.is_remote and parent.trace_flags.sampled and not self._follow_clients):
            sampled = bool(parent.trace_flags.sampled)
        else:
            sampled = random.random() < self._ratio  # noqa: S311 - not a secret
        decision = Decision.RECORD_AND_SAMPLE if sampled else Decision.DROP
        return SamplingResult(decision, attributes, parent.trace_state if parent.is_valid else None)

    def get_description(self) -> str:
        """Return the sampler's name for people."""
        return f"BoundedSampler({self._ratio}, follow_clients={self._follow_clients})"


class Tracing:
    """The traces of a gateway, which a thread sends to a collector. Spans are dropped while it cannot be reached.

    Args:
        endpoint: URL of a collector's OTLP receiver over HTTP, without /v1/traces.
        ratio: see `BoundedSampler`.
        follow_clients: see `BoundedSampler`.
        exporter: replaces the one for `endpoint`.
    """

    def __init__(
        self, endpoint: str, ratio: float, *, follow_clients: bool, exporter: SpanExporter | None = None
    ) -> None:
        resource = Resource.create(
            {
                "service.name": SERVICE_NAME,
                "service.version": version("tunesmith"),
                "service.instance.id": socket.gethostname(),
            }
        )
        self._provider = TracerProvider(
            sampler=BoundedSampler(ratio, follow_clients=follow_clients),
            resource=resource,
            shutdown_on_exit=False,
            span_limits=SpanLimits(max_attribute_length=_MAX_ATTRIBUTE),
        )
        exporter = exporter or OTLPSpanExporter(endpoint=endpoint.rstrip("/") + _TRACES_PATH)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("tunesmith.gateway", version("tunesmith"))

    def begin(self, method: str, path: str, headers: Mapping[str, str], request_id: str) -> RequestTrace:
        """Return the trace of a request that has arrived. `path` is one of the gateway's; empty: another one."""
        carrier = {"traceparent": headers.get("traceparent", "")}
        if len(state := headers.get("tracestate", "")) <= _MAX_TRACE_STATE:
            carrier["tracestate"] = state
        method = method if method in _METHODS else "_OTHER"
        attributes = {
            "http.request.method": method,
            "url.scheme": "http",
            "tunesmith.request.id": request_id,
            **({"http.route": path} if path else {}),
        }
        span = self._tracer.start_span(
            f"{method} {path}".strip(),
            _PROPAGATOR.extract(carrier),
            SpanKind.SERVER,
            attributes,
        )
        return RequestTrace(self._tracer, span, path)

    def close(self) -> None:
        """Send what remains. Blocks for at most a few seconds."""
        self._provider.shutdown()


class RequestTrace:
    """The spans of one request."""

    def __init__(self, tracer: Tracer, span: Span, path: str) -> None:
        self._tracer = tracer
        self._span = span
        self._path = path
        self._context = set_span_in_context(span)
        self._attempt: Span | None = None

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Record the wait for a pod."""
        span = self._tracer.start_span("hold", self._context)
        with _ending(span):
            yield

    @contextmanager
    def attempt(self, call: Call, backend: Backend, engine_name: str) -> Iterator[None]:
        """Record an attempt to answer a call, at one pod."""
        operation = _OPERATIONS.get(self._path, self._path.rpartition("/")[2])
        url, (namespace, _, name) = backend.url("/"), backend.pod.name.partition("/")
        attributes: dict[str, str | int | float] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "vllm",
            "gen_ai.request.model": call.model.id,
            "gen_ai.request.stream": call.body.stream,
            "server.address": url.host or "",
            "server.port": url.port or 0,
            "k8s.namespace.name": namespace,
            "k8s.pod.name": name,
        }
        if call.body.max_tokens is not None:
            attributes["gen_ai.request.max_tokens"] = call.body.max_tokens
        span = self._tracer.start_span(f"{operation} {call.model.id}", self._context, SpanKind.CLIENT, attributes)
        self._attempt = span
        started = call.first_byte_seconds
        with _ending(span):
            try:
                yield
                if call.api.computes:
                    span.set_attribute("gen_ai.usage.input_tokens", call.usage.counts.prompt)
                    span.set_attribute("gen_ai.usage.output_tokens", call.usage.counts.completion)
            finally:
                if call.answered:
                    span.set_attribute("gen_ai.response.model", engine_name)
                if call.first_byte_seconds is not None and started is None:
                    span.set_attribute("gen_ai.response.time_to_first_chunk", call.first_byte_seconds)

    def headers(self) -> dict[str, str]:
        """Return the headers that continue the trace at the engine."""
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, set_span_in_context(self._attempt or self._span))
        return carrier

    def finish(self, status: int, key: str) -> None:
        """Record the end of the answer.

        Args:
            status: HTTP status, or 499 if the client closed its connection.
            key: name of the API key; empty: none or an invalid one.
        """
        self._span.set_attribute("http.response.status_code", status)
        if key:
            self._span.set_attribute("tunesmith.key.name", key)
        if status >= HTTPStatus.BAD_REQUEST:
            self._span.set_attribute("error.type", str(status))
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()


@contextmanager
def _ending(span: Span) -> Iterator[None]:
    """End a span, with the type of an exception; its text may contain a client's data."""
    try:
        yield
    except BaseException as error:
        reason = getattr(error, "reason", None)
        span.set_attribute("error.type", reason if isinstance(reason, str) else type(error).__name__)
        span.set_status(StatusCode.ERROR)
        raise
    finally:
        span.end()
