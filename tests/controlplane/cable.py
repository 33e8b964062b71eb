"""A cable to the API server that a test can cut."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from tests.controlplane.apiserver import ApiServer


class Cable:
    """Carries TCP connections to the API server, and can be cut."""

    def __init__(self, url: str) -> None:
        self._target = url.removeprefix("https://").split(":")
        self._writers: set[asyncio.StreamWriter] = set()
        self._cut = False

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._cut:
            writer.close()
            return
        there, back = await asyncio.open_connection(self._target[0], int(self._target[1]))
        self._writers |= {writer, back}
        await asyncio.gather(_copy(reader, back), _copy(there, writer))
        self._writers -= {writer, back}

    async def start(self) -> asyncio.Server:
        return await asyncio.start_server(self._connected, "127.0.0.1", 0)

    def kubeconfig(self, server: ApiServer, listener: asyncio.Server, folder: Path) -> Path:
        """A kubeconfig for the server through this cable."""
        port = listener.sockets[0].getsockname()[1]
        path = folder / "kubeconfig"
        path.write_text(server.kubeconfig.read_text().replace(server.url, f"https://127.0.0.1:{port}"))
        return path

    def cut(self) -> None:
        self._cut = True
        for writer in self._writers:
            writer.transport.abort()

    def mend(self) -> None:
        self._cut = False


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()
