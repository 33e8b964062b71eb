"""The answer to a client: a stream of events that is kept alive while the engine is silent, or a relayed body."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiohttp import web

from tunesmith.gateway.errors import ApiError
from tunesmith.gateway.events import COMMENT, EVENT_END

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tunesmith.gateway.budget import Share
    from tunesmith.gateway.limits import Limits


ANSWER_BYTES = 16 * 1024
"""Bytes of the budget that a running answer uses."""
SLOW_CLIENT_BYTES = 256 * 1024
"""Bytes of the budget that an answer uses while the client reads more slowly than the pod answers."""


LIMIT_HEADERS = web.RequestKey("limit_headers", dict[str, str])
"""Key of a request's headers that every answer carries: about its API key's limits, and for browsers."""


class ClientDisconnectedError(Exception):
    """The client closed its connection or stopped reading while the answer was written."""


async def prepare(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """Send the head of an answer.

    Raises:
        ClientDisconnectedError: the client closed its connection.
    """
    response.headers.update(request.get(LIMIT_HEADERS, {}))
    try:
        await response.prepare(request)
    except ConnectionError:
        raise ClientDisconnectedError from None


async def write(
    request: web.BaseRequest, response: web.StreamResponse, data: bytes, share: Share, limits: Limits
) -> None:
    """Write a piece of an answer.

    Raises:
        ClientDisconnectedError: the client closed its connection, read nothing for `limits.write_seconds`, or reads
            more slowly than the pod answers while the budget of bytes in flight is used up.
    """
    transport = request.transport
    if transport is None:
        raise ClientDisconnectedError
    # Unread data is buffered, in this connection and in the connection to the pod.
    try:
        pending = transport.get_write_buffer_size()
        share.set_to(SLOW_CLIENT_BYTES if pending else ANSWER_BYTES)
    except ApiError:
        transport.abort()
        raise ClientDisconnectedError from None
    if not pending and len(data) <= ANSWER_BYTES:
        try:
            await response.write(data)  # the transport's buffer has room for it, so it does not wait for the client
        except ConnectionError:
            raise ClientDisconnectedError from None
        return
    await _write_within(request, response.write(data), limits.write_seconds)


async def finish(request: web.BaseRequest, response: web.StreamResponse, limits: Limits) -> None:
    """Complete an answer.

    Raises:
        ClientDisconnectedError: see `write`.
    """
    await _write_within(request, response.write_eof(), limits.write_seconds)


async def write_large(request: web.BaseRequest, body: bytes, share: Share, limits: Limits) -> web.StreamResponse:
    """Send a JSON answer in pieces, so that a client that does not read it occupies little memory.

    Raises:
        ClientDisconnectedError: see `write`.
    """
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    response.content_length = len(body)
    await prepare(request, response)
    for start in range(0, len(body), ANSWER_BYTES):
        await write(request, response, body[start : start + ANSWER_BYTES], share, limits)
    await finish(request, response, limits)
    return response


async def _write_within(request: web.BaseRequest, writing: Awaitable[None], seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await writing
    except ConnectionError:
        raise ClientDisconnectedError from None
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
        raise ClientDisconnectedError from None


class EventReply:
    """A stream of server-sent events to one client.

    Its head is sent when a pod accepts the request, or after `limits.comment_seconds` of waiting, since proxies close
    silent connections. From then on the status is 200, and an error is sent as an event, for which OpenAI's clients
    raise an exception.

    Args:
        request: the client's request.
        request_id: the id in the head.
        share: bytes of the request in the budget.
        closing: returns True if the connection should not be reused.
    """

    def __init__(
        self,
        request: web.BaseRequest,
        request_id: str,
        share: Share,
        limits: Limits,
        *,
        clock: Callable[[], float],
        closing: Callable[[], bool],
    ) -> None:
        self._request = request
        self._request_id = request_id
        self._share = share
        self._limits = limits
        self._clock = clock
        self._closing = closing
        self._last = clock()
        self.between_events = True
        self.response: web.StreamResponse | None = None

    async def begin(self) -> web.StreamResponse:
        """Send the head, once.

        Raises:
            ClientDisconnectedError: the client closed its connection.
        """
        if self.response is None:
            response = web.StreamResponse(
                headers={
                    "Content-Type": "text/event-stream; charset=utf-8",
                    "Cache-Control": "no-cache",
                    "X-Accel-Buffering": "no",
                    "X-Request-Id": self._request_id,
                }
            )
            if self._closing():
                response.force_close()
            await prepare(self._request, response)
            self.response = response
        return self.response

    async def write(self, data: bytes) -> None:
        """Send bytes of events.

        Raises:
            ClientDisconnectedError: see the function `write`.
        """
        response = self.response or await self.begin()
        if data:
            self._last = self._clock()
            await write(self._request, response, data, self._share, self._limits)

    def until_comment(self) -> float:
        """Return the seconds until a comment is due."""
        return max(0.0, self._last + self._limits.comment_seconds - self._clock())

    async def comment_if_due(self) -> None:
        """Send a comment if one is due and no event is incomplete.

        Raises:
            ClientDisconnectedError: see the function `write`.
        """
        if self.until_comment():
            return
        if self.between_events:
            await self.write(COMMENT)
        self._last = self._clock()

    async def fail(self, event: bytes) -> web.StreamResponse:
        """Finish the stream with an event that reports an error, given without its end.

        Raises:
            ClientDisconnectedError: see the function `write`.
        """
        start = b"" if self.between_events else EVENT_END
        await self.write(start + event + EVENT_END)
        return await self.finish()

    async def finish(self) -> web.StreamResponse:
        """Complete the stream.

        Raises:
            ClientDisconnectedError: see the function `write`.
        """
        response = await self.begin()
        await finish(self._request, response, self._limits)
        return response
