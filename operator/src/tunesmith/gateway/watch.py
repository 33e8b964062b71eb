"""Supervision of a stream that is relayed: comments to the client while the engine is silent, and an end to silence.

A chunk costs no timer: one timer per stream checks occasionally for how long the stream has waited.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self

from tunesmith.gateway.reply import ClientDisconnectedError

if TYPE_CHECKING:
    from collections.abc import Callable

    import aiohttp

    from tunesmith.gateway.errors import ApiError
    from tunesmith.gateway.reply import EventReply

_SHORTEST_PAUSE = 0.001


class StreamWatch:
    """A context manager around the relay of a stream.

    Args:
        content: the engine's answer; its readers get the exceptions.
        reply: the stream to the client.
        comment_seconds: time between comments.
        silence_seconds: longest wait for a chunk.
        silent: returns the exception for a longer wait.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        content: aiohttp.StreamReader,
        reply: EventReply,
        *,
        comment_seconds: float,
        silence_seconds: float,
        silent: Callable[[], ApiError],
        clock: Callable[[], float],
    ) -> None:
        self._content = content
        self._reply = reply
        self._comment_seconds = comment_seconds
        self._silence_seconds = silence_seconds
        self._silent = silent
        self._clock = clock
        self._waiting_since: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._comment: asyncio.Task[None] | None = None

    async def next_chunk(self) -> bytes:
        """Return the next bytes, empty at the end of the stream.

        Raises:
            ApiError: the engine sent nothing for too long.
            ClientDisconnectedError: the client closed its connection meanwhile.
        """
        self._waiting_since = self._clock()
        try:
            return await self._content.readany()
        finally:
            self._waiting_since = None

    def __enter__(self) -> Self:
        self._arm(min(self._comment_seconds, self._silence_seconds))
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._comment is not None:
            self._comment.cancel()

    def _arm(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(max(seconds, _SHORTEST_PAUSE), self._check)

    def _check(self) -> None:
        since = self._waiting_since
        if since is None:  # the client has not read the last chunk yet
            self._arm(min(self._comment_seconds, self._silence_seconds))
            return
        remaining = since + self._silence_seconds - self._clock()
        if remaining <= 0:
            self._content.set_exception(self._silent())
            return
        until_comment = self._reply.until_comment()
        if not until_comment:
            self._comment = asyncio.get_running_loop().create_task(self._send_comment())
            until_comment = self._comment_seconds
        self._arm(min(remaining, until_comment))

    async def _send_comment(self) -> None:
        try:
            await self._reply.comment_if_due()
        except ClientDisconnectedError as error:
            self._content.set_exception(error)
