"""One attempt to forward a request to a pod."""

from __future__ import annotations

import asyncio
import logging
from http import HTTPStatus
from typing import TYPE_CHECKING

import aiohttp
from aiohttp import web

from tunesmith.contracts.crash import DIGEST_HEADER, ENGINE_LOST_HEADER
from tunesmith.gateway import errors, events
from tunesmith.gateway.body import socket_pieces
from tunesmith.gateway.reply import EventReply, finish, prepare, write
from tunesmith.gateway.watch import StreamWatch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from tunesmith.gateway.backends import Backend, BackendTable
    from tunesmith.gateway.demand import Demand
    from tunesmith.gateway.limits import Limits
    from tunesmith.gateway.metrics import Metrics
    from tunesmith.gateway.request import Call

LOG = logging.getLogger(__name__)

NOT_STARTED_HEADER = "x-tunesmith-not-started"
NO_ROUTE_HEADER = "x-tunesmith-no-route"
"""Header of a 404 of the engine that has no such API, whatever the model."""
OTHER_TOKEN = "other_token"  # noqa: S105 - a label in metrics
"""Reason during a rotation of the installation's key: the pod refused this token, so the gateway's other one is tried
immediately."""
_JSON = "application/json"
_EVENT_STREAM = "text/event-stream"
_MAX_RETRY_AFTER_DIGITS = 6


class NotStartedError(Exception):
    """The pod did not accept the request, so it may be sent to another pod; `reason` is a label in metrics."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class EngineLostError(Exception):
    """The engine died while it processed the request, and no part of its answer was sent to the client."""


class Forwarder:
    """Forwarding of requests to pods and of their answers to clients.

    Args:
        session: makes the requests to engines.
        closing: True once the process shuts down: answers ask clients to close the connection.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        backends: BackendTable,
        demand: Demand,
        metrics: Metrics,
        limits: Limits,
        *,
        clock: Callable[[], float],
        closing: Callable[[], bool],
    ) -> None:
        self._session = session
        self._backends = backends
        self._demand = demand
        self._metrics = metrics
        self._limits = limits
        self._clock = clock
        self._closing = closing

    async def forward(self, call: Call, backend: Backend, engine_name: str, digest: str) -> web.StreamResponse:
        """Send the request with its digest to a pod, and the pod's answer to the client.

        Raises:
            NotStartedError: the pod did not accept it.
            EngineLostError: the connection was lost before any part of the answer was sent to the client.
            ApiError: the pod accepted it and failed.
            ClientDisconnectedError: the client closed its connection.
        """
        call.started = True
        call.engine_name, call.pod = engine_name, backend.pod.name
        backend.add_running(engine_name, call.body.sequences)
        self._demand.add_running(call.model.id, engine_name, call.body.sequences)
        upstream: aiohttp.ClientResponse | None = None
        began, accepted = self._clock(), False
        try:
            token = backend.serving_tokens.current
            upstream = await self._wait_for_head(call, self._post(call, backend, engine_name, token, digest))
            if upstream.status == HTTPStatus.UNAUTHORIZED and backend.serving_tokens.refused(token):
                raise NotStartedError(OTHER_TOKEN)
            if upstream.headers.get(NO_ROUTE_HEADER) == "true":
                raise errors.api_not_served(call.api.path, call.model.id, call.model.pool)
            await _raise_not_started(upstream)
            accepted = True
            return await self._relay(call, upstream, engine_name)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            self._backends.suspect(backend)
            raise NotStartedError("connect") from error
        except (aiohttp.ClientError, OSError) as error:
            # Only the type: the text could repeat data from the engine.
            LOG.warning("request %s: pod %s: %s", call.request_id, backend.pod.name, type(error).__name__)
            self._backends.suspect(backend)
            if not call.answered:
                raise EngineLostError from error
            raise errors.engine_failed(call.model.id) from error
        except events.WrongModelError:
            LOG.error("request %s: pod %s answered as another model", call.request_id, backend.pod.name)  # noqa: TRY400
            raise errors.wrong_model(call.model.id) from None
        finally:
            backend.add_running(engine_name, -call.body.sequences)
            self._demand.add_running(call.model.id, engine_name, -call.body.sequences)
            if accepted:
                self._demand.finish(call.model.id, call.body.sequences, self._clock() - began)
            if upstream is not None:
                # Closing the connection before the end of the answer stops the engine's generation.
                upstream.close()

    def _post(
        self, call: Call, backend: Backend, engine_name: str, token: str, digest: str
    ) -> Coroutine[None, None, aiohttp.ClientResponse]:
        pieces = list(socket_pieces(call.body.pieces(engine_name, call.cache_salt)))
        size = sum(len(piece) for piece in pieces)
        headers = {
            "Authorization": f"Bearer {token}",
            "Content-Type": _JSON,
            "Content-Length": str(size),
            "X-Request-Id": call.request_id,
            DIGEST_HEADER: digest,
        }
        if call.trace is not None:
            headers |= call.trace.headers()
        return self._session.post(
            backend.url(call.api.path),
            data=bytes(pieces[0]) if len(pieces) == 1 else _iterate(pieces),
            headers=headers,
            allow_redirects=False,
        )

    async def _wait_for_head(
        self, call: Call, post: Coroutine[None, None, aiohttp.ClientResponse]
    ) -> aiohttp.ClientResponse:
        """Wait for the head of the pod's answer and send comments to a client that waits for a stream."""
        seconds = self._limits.silence_seconds if call.body.stream else self._limits.answer_seconds
        if call.events is None:
            timeout = asyncio.timeout(seconds)
            try:
                async with timeout:
                    return await post
            except TimeoutError:
                if not timeout.expired():  # the connection's own
                    raise
                raise errors.engine_silent(call.model.id, seconds) from None
        deadline = self._clock() + seconds
        task = asyncio.ensure_future(post)
        try:
            while not task.done():
                remaining = deadline - self._clock()
                if remaining <= 0:
                    raise errors.engine_silent(call.model.id, seconds)  # noqa: TRY301 - the handler closes a late response
                await call.events.comment_if_due()
                await asyncio.wait({task}, timeout=min(remaining, call.events.until_comment()))
            return task.result()
        except BaseException:
            if not task.cancel() and not task.cancelled() and task.exception() is None:
                task.result().close()
            raise

    async def _relay(self, call: Call, upstream: aiohttp.ClientResponse, engine_name: str) -> web.StreamResponse:
        if upstream.status != HTTPStatus.OK:
            if upstream.headers.get(ENGINE_LOST_HEADER) == "true":
                raise EngineLostError
            raise await self._engine_error(call, upstream)
        if upstream.content_type == _EVENT_STREAM:
            return await self._relay_stream(call, upstream, engine_name)
        if call.events is not None and call.events.response is not None:
            raise errors.engine_error(call.model.id, upstream.status)
        return await self._relay_body(call, upstream, engine_name)

    def _record_first_byte(self, call: Call) -> None:
        call.first_byte_seconds = self._clock() - call.arrived

    async def _engine_error(self, call: Call, upstream: aiohttp.ClientResponse) -> errors.ApiError:
        """Return the engine's error for the client."""
        data = await self._read_start(call, upstream)
        if upstream.status < HTTPStatus.BAD_REQUEST or len(data) > events.MAX_HELD_BYTES or not events.is_error(data):
            return errors.engine_error(call.model.id, upstream.status)
        headers = {}
        retry_after = upstream.headers.get("Retry-After", "")
        if retry_after.isdecimal() and retry_after.isascii() and len(retry_after) <= _MAX_RETRY_AFTER_DIGITS:
            headers["Retry-After"] = retry_after
        should_retry = upstream.headers.get("x-should-retry", "")
        if should_retry in {"true", "false"}:
            headers["x-should-retry"] = should_retry
        elif upstream.status >= HTTPStatus.INTERNAL_SERVER_ERROR and upstream.status != HTTPStatus.SERVICE_UNAVAILABLE:
            headers["x-should-retry"] = "false"
        self._record_first_byte(call)
        return errors.RelayedError(upstream.status, data, headers)

    async def _read_start(self, call: Call, upstream: aiohttp.ClientResponse) -> bytes:
        """Return the whole body if it is small, otherwise its first `MAX_HELD_BYTES` bytes or more."""
        start = bytearray()
        content = upstream.content
        while len(start) <= events.MAX_HELD_BYTES and not content.at_eof():
            start += await self._read(call, upstream)
        return bytes(start)

    async def _read(self, call: Call, upstream: aiohttp.ClientResponse) -> bytes:
        """Return the next bytes of the pod's answer, empty at its end."""
        try:
            async with asyncio.timeout(self._limits.silence_seconds):
                return await upstream.content.readany()
        except TimeoutError:
            raise errors.engine_silent(call.model.id, self._limits.silence_seconds) from None

    async def _relay_body(self, call: Call, upstream: aiohttp.ClientResponse, engine_name: str) -> web.StreamResponse:
        """Relay an answer that is not a stream, a large one in pieces, once its start shows the right model."""
        start = await self._read_start(call, upstream)
        small = len(start) <= events.MAX_HELD_BYTES
        if call.api.names_model and not events.names_model(start, engine_name, complete=small):
            raise events.WrongModelError
        call.begin_answer()
        call.read_body(start)
        self._record_first_byte(call)
        headers = {"Content-Type": _JSON, "X-Request-Id": call.request_id}
        if small:
            return web.Response(body=start, headers=headers)
        response = web.StreamResponse(headers=headers)
        if self._closing():
            response.force_close()
        length = upstream.headers.get("Content-Length", "")
        if length.isdecimal() and "Content-Encoding" not in upstream.headers:
            response.content_length = int(length)
        try:
            await prepare(call.request, response)
            piece = start
            while piece:
                await write(call.request, response, piece, call.share, self._limits)
                piece = await self._read(call, upstream)
                call.read_body(piece)
            await finish(call.request, response, self._limits)
        except BaseException:
            # The status is sent and JSON cannot carry an error: an aborted connection shows an incomplete answer.
            if call.request.transport is not None:
                call.request.transport.abort()
            raise
        return response

    async def _relay_stream(self, call: Call, upstream: aiohttp.ClientResponse, engine_name: str) -> web.StreamResponse:
        """Relay server-sent events as they arrive, once the first one shows the right model."""
        reply = call.events = call.events or EventReply(
            call.request, call.request_id, call.share, self._limits, clock=self._clock, closing=self._closing
        )
        await reply.begin()
        stream = events.EventStream(engine_name, call.api.envelope)
        first = True
        with StreamWatch(
            upstream.content,
            reply,
            comment_seconds=self._limits.comment_seconds,
            silence_seconds=self._limits.silence_seconds,
            silent=lambda: errors.engine_silent(call.model.id, self._limits.silence_seconds),
            clock=self._clock,
        ) as watch:
            while chunk := await watch.next_chunk():
                ready = stream.feed(chunk)
                if first and stream.named:
                    call.begin_answer()
                await reply.write(self._pass_events(call, ready))
                reply.between_events = stream.between_events
                if first and stream.named:
                    first = False
                    self._record_first_byte(call)
        await reply.write(self._pass_events(call, stream.end()))
        response = await reply.finish()
        self._record_stream(call, engine_name)
        return response

    def _pass_events(self, call: Call, ready: bytes) -> bytes:
        """Read events of a stream, and return those for the client."""
        if call.mirror is not None:
            call.mirror.read(ready)
        # The first events of some APIs do not wait for a token.
        if call.first_token_seconds is None and ready and (not call.api.envelope or b"delta" in ready):
            call.first_token_seconds = self._clock() - call.arrived
        return call.usage.pass_events(ready)

    def _record_stream(self, call: Call, engine_name: str) -> None:
        """Record the latencies of a complete stream."""
        if call.first_token_seconds is None:
            return
        per_token, tokens = None, call.usage.counts.completion
        if tokens > call.body.sequences:
            seconds = self._clock() - call.arrived - call.first_token_seconds
            # All sequences are generated at once.
            per_token = seconds / (tokens / call.body.sequences - 1)
        self._metrics.streamed(engine_name, call.first_token_seconds, per_token)


async def _iterate(pieces: list[bytes | memoryview]) -> AsyncIterator[bytes | memoryview]:
    for piece in pieces:
        yield piece


async def _raise_not_started(upstream: aiohttp.ClientResponse) -> None:
    """Raise for answers that show that the engine did not start the request.

    The engine returns 404 for a model that it does not hold (unloaded, or lost in a restart), never another model's
    answer. With 401 and 403 the pod refuses the gateway, not the client.

    Raises:
        NotStartedError: with the reason.
    """
    status = upstream.status
    if status == HTTPStatus.SERVICE_UNAVAILABLE and upstream.headers.get(NOT_STARTED_HEADER) == "true":
        raise NotStartedError("draining")
    if status == HTTPStatus.NOT_FOUND:
        raise NotStartedError("not_resident")
    if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
        raise NotStartedError("token_refused")
