"""HTTP of an attacker: raw bytes, many connections, endless bodies."""

from __future__ import annotations

import asyncio
import io
import json
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp

if TYPE_CHECKING:
    from collections.abc import Mapping

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


@dataclass(frozen=True)
class Reply:
    """Reply; `status` 0: the connection closed or broke without one."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float

    @property
    def error(self) -> str:
        """Return the message in OpenAI's error format; without one, the beginning of the body."""
        try:
            return str(json.loads(self.body)["error"]["message"])
        except (ValueError, KeyError, TypeError):
            return self.body[:200].decode(errors="replace")

    @property
    def text(self) -> str:
        """Return the generated text."""
        choice = json.loads(self.body)["choices"][0]
        return str(choice.get("text") if "text" in choice else choice["message"]["content"])


class Client:
    """Attacker with an API key."""

    def __init__(self, gateway: str, key: str) -> None:
        self.gateway, self.key = gateway, key
        address = urlsplit(gateway)
        self._host, self._port = str(address.hostname), int(address.port or 80)

    def post(self, path: str, body: Any, timeout: float = 90, count: int = 1) -> list[Reply]:  # noqa: ANN401 - JSON
        """Send the same body `count` times concurrently; return the replies."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return asyncio.run(self._post_all(path, [data] * count, timeout))

    def post_once(self, path: str, body: Any, timeout: float = 90) -> Reply:  # noqa: ANN401 - JSON
        """Send a body once."""
        return self.post(path, body, timeout)[0]

    async def _post_all(self, path: str, bodies: list[bytes], seconds: float) -> list[Reply]:
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        limit = aiohttp.ClientTimeout(total=seconds)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(self.gateway, headers=headers, timeout=limit, connector=connector) as session:
            return await asyncio.gather(*(self._post(session, path, body) for body in bodies))

    @staticmethod
    async def _post(session: aiohttp.ClientSession, path: str, body: bytes) -> Reply:
        begin = time.monotonic()
        try:
            async with session.post(path, data=io.BytesIO(body)) as answer:
                content = await answer.read()
                return Reply(answer.status, dict(answer.headers), content, time.monotonic() - begin)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            return Reply(0, {}, f"{type(error).__name__}: {error}".encode(), time.monotonic() - begin)

    def head(self, length: int, path: str = CHAT) -> bytes:
        """Return the headers of a request with a body of that length."""
        return (
            f"POST {path} HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer {self.key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        ).encode()

    async def raw(self, data: bytes, seconds: float = 5) -> bytes:
        """Send bytes on a new connection; return what arrives until it closes or the time is over."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        received = b""
        try:
            writer.write(data)
            with suppress(TimeoutError, OSError):
                async with asyncio.timeout(seconds):
                    await writer.drain()
                    while piece := await reader.read(65536):
                        received += piece
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
        return received

    async def leave(self, body: Any, after: float) -> bytes:  # noqa: ANN401 - JSON
        """Send a request and close the connection after that many seconds."""
        data = json.dumps(body).encode()
        return await self.raw(self.head(len(data)) + data, after)


def status_of(answer: bytes) -> int:
    """Return the status of the first reply in the bytes; 0 if there is none."""
    parts = answer.split(b" ", 2)
    return int(parts[1]) if answer.startswith(b"HTTP/") and len(parts) > 1 else 0
