"""Streams of JSON lines that pods serve, as the operator and the gateways read them.

Pods are untrusted: no redirects, bounded lines, a bounded rate, and nothing that a pod sends stops the reader.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from contextlib import aclosing
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING

import aiohttp
from pydantic import ValidationError

from tunesmith.contracts.agent import STALE_AFTER_SECONDS
from tunesmith.contracts.podevents import StreamOutOfSyncError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from tunesmith.contracts.agent import Keys

MAX_LINE_BYTES = 4 * 1024 * 1024
_BYTES_PER_SECOND = 256 * 1024
_BURST_BYTES = 8 * 1024 * 1024
"""Bytes that are read without delay. A faster stream is throttled to the rate by TCP flow control."""
_CONNECT_SECONDS = 2.0
_MIN_RETRY_SECONDS, _MAX_RETRY_SECONDS = 0.1, 2.0
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=STALE_AFTER_SECONDS)
_log = logging.getLogger(__name__)


class StreamError(Exception):
    """The stream violates the protocol. `str()` is a sentence without anything that the pod sent."""


class Tokens:
    """Tokens of one pod for one purpose, with the newest that the pod accepts.

    Reader and pod reread a rotated key at different times, so the pod may accept only one of two tokens.

    Args:
        keys: returns the current keys.
        derive: derives the tokens from the keys, newest first.
    """

    def __init__(self, keys: Callable[[], Keys], derive: Callable[[Keys], tuple[str, ...]]) -> None:
        self._keys = keys
        self._derive = derive
        self._derived: tuple[Keys, tuple[str, ...]] = ((), ())
        self._index = 0

    @property
    def current(self) -> str:
        """Return the token to present."""
        keys = self._keys()
        if keys != self._derived[0]:
            self._derived, self._index = (keys, self._derive(keys)), 0
        return self._derived[1][self._index]

    def refused(self, token: str) -> bool:
        """Record that the pod refused a token; return True if another one has not been tried yet."""
        if token != self.current:
            return True
        self._index = (self._index + 1) % len(self._derived[1])
        return self._index != 0


@dataclass(frozen=True)
class Stream:
    """Stream of a pod. `name`: its name in the log."""

    name: str
    url: str
    tokens: Tokens = field(compare=False)


async def follow(
    session: aiohttp.ClientSession,
    stream: Stream,
    opened: Callable[[], Callable[[bytes], None]],
    failed: Callable[[str], None] = lambda _: None,
) -> None:
    """Read a stream until cancelled, reconnecting as needed.

    Args:
        session: session for the requests.
        stream: the stream to read.
        opened: called for each connection; returns the function that processes its lines and raises for invalid ones.
        failed: called with a short cause after each connection that failed or was interrupted.
    """
    pause, reported = _MIN_RETRY_SECONDS, ""
    while True:
        received = False
        try:
            process = opened()
            async with aclosing(_lines(session, stream)) as lines:
                async for line in lines:
                    process(line)
                    received = True
            cause = "the pod closed the stream"
        except Exception as error:  # noqa: BLE001 - no line of a pod may stop the reader
            cause = _cause(error)
        failed(cause)
        # Logged once: a pod that is starting or gone fails the same way for a long time.
        if received or cause != reported:
            _log.info("the stream of %s was interrupted: %s", stream.name, cause)
        reported = cause
        pause = _MIN_RETRY_SECONDS if received else min(_MAX_RETRY_SECONDS, pause * 2)
        await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - spreads load


async def _lines(session: aiohttp.ClientSession, stream: Stream) -> AsyncGenerator[bytes, None]:
    token = stream.tokens.current
    headers = {"Authorization": f"Bearer {token}"}
    async with session.get(stream.url, headers=headers, timeout=_TIMEOUT, allow_redirects=False) as response:
        if response.status == HTTPStatus.UNAUTHORIZED:
            stream.tokens.refused(token)
        if response.status != HTTPStatus.OK:
            raise StreamError(f"the response has status {response.status}")
        rest, allowance = b"", _Allowance()
        async for chunk in response.content.iter_any():
            await allowance.spend(len(chunk))
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > MAX_LINE_BYTES:
                raise StreamError(f"a line has more than {MAX_LINE_BYTES} bytes")
            for line in lines:
                yield line


class _Allowance:
    """Allowance of bytes that may be read now."""

    def __init__(self) -> None:
        self._remaining = float(_BURST_BYTES)
        self._updated_at = time.monotonic()

    async def spend(self, count: int) -> None:
        """Wait until `count` bytes may be read."""
        now = time.monotonic()
        self._remaining = min(_BURST_BYTES, self._remaining + (now - self._updated_at) * _BYTES_PER_SECOND) - count
        self._updated_at = now
        if self._remaining < 0:
            await asyncio.sleep(-self._remaining / _BYTES_PER_SECOND)


def _cause(error: Exception) -> str:
    """Return a short cause, without anything that the pod sent."""
    if isinstance(error, StreamError | StreamOutOfSyncError):
        return str(error)
    if isinstance(error, ValidationError):
        return "a line is not valid"
    if isinstance(error, aiohttp.ServerTimeoutError | TimeoutError):
        return "connection timed out"
    if isinstance(error, aiohttp.ClientConnectorError):
        number = error.os_error.errno
        return os.strerror(number).lower() if number else type(error.os_error).__name__
    if isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientPayloadError | OSError):
        return "the connection was closed"
    if isinstance(error, aiohttp.ClientError):
        return "the response is not valid HTTP"
    _log.error("unexpected error while reading a stream", exc_info=error)
    return type(error).__name__
