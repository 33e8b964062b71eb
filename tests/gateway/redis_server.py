"""A real Redis server with a password."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from typing import TYPE_CHECKING, Self

from redis.asyncio import Redis
from redis.exceptions import RedisError

from tests.gateway.gateway_rig import DEADLINE, free_ports

if TYPE_CHECKING:
    from pathlib import Path

PASSWORD = "a-password-of-the-tests"


class RedisServer:
    """A server on a free port of this machine, with TLS if asked; it keeps its data in memory unless `keep` is set."""

    def __init__(self, folder: Path, *, tls: bool = False, keep: bool = False) -> None:
        self._folder = folder
        self._tls = tls
        self._keep = keep
        self._program = shutil.which("redis-server")
        assert self._program is not None, "redis-server is missing: run .ci/test-programs"
        (self.port,) = free_ports(1)
        self.url = f"{'rediss' if tls else 'redis'}://:{PASSWORD}@127.0.0.1:{self.port}/0"
        self.url_file = folder / "url"
        self.url_file.write_text(self.url + "\n")
        self.ca_file = folder / "server.crt"
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        if self._tls:
            command = (
                "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=redis -addext subjectAltName=IP:127.0.0.1"
            )
            files = ["-keyout", str(self._folder / "server.key"), "-out", str(self.ca_file)]
            subprocess.run([*command.split(), *files], check=True, capture_output=True)  # noqa: ASYNC221
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def start(self) -> None:
        port = ["--port", "0", "--tls-port", str(self.port), "--tls-auth-clients", "no"] if self._tls else []
        if self._tls:
            port += ["--tls-cert-file", str(self.ca_file), "--tls-key-file", str(self._folder / "server.key")]
        assert self._program is not None
        self._process = await asyncio.create_subprocess_exec(
            self._program,
            *(port or ["--port", str(self.port)]),
            *("--bind", "127.0.0.1", "--requirepass", PASSWORD, "--dir", str(self._folder), "--save", ""),
            *("--appendonly", "yes" if self._keep else "no", "--appendfsync", "always"),
            stdout=asyncio.subprocess.DEVNULL,
        )
        async with asyncio.timeout(DEADLINE), self.client() as client:
            while True:
                try:
                    await client.ping()
                except RedisError:
                    await asyncio.sleep(0.05)
                else:
                    return

    async def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def client(self) -> Redis:
        tls = {"ssl_ca_certs": str(self.ca_file)} if self._tls else {}
        return Redis.from_url(self.url, decode_responses=True, **tls)
