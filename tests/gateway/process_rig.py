"""A gateway process, its cluster and its pods, and what the process costs."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import aiohttp

from tests.gateway.gateway_rig import (
    GATEWAY_KEYS,
    OWN_NAMESPACE,
    FakePod,
    adapter_manifest,
    free_ports,
    pool_manifest,
)
from tunesmith.contracts.agent import keys_file
from tunesmith.contracts.apikey import key_record, new_key

if TYPE_CHECKING:
    from asyncio.subprocess import Process

MIB = 1024 * 1024
MEMORY_LIMIT = 512 * MIB
"""Of the gateway's container in the chart."""
PIRATE = "team/pirate@aaaaaaaaaaaa"
DEADLINE = 300.0
"""Seconds; on a machine whose cores other tests use, a step takes ten times as long as on an idle one."""


class ProcessRig:
    """A gateway in its own process, with one pod that holds an adapter."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._folder = folder
        self._options = options
        self.log = folder / "gateway.log"
        self.port, self.internal_port, self._engine_port, self._agent_port = free_ports(4)
        self.url = f"http://127.0.0.1:{self.port}"
        self.key = new_key()
        self.keys = [self.key]
        self.pod = FakePod("pod-1", "127.0.1.1", pool_manifest(), (self._engine_port, self._agent_port))
        self.pod.resident = {PIRATE}
        self.http: aiohttp.ClientSession
        self._process: Process

    async def __aenter__(self) -> Self:
        key_file = self._folder / "key"
        key_file.write_bytes(keys_file(GATEWAY_KEYS))
        await self.pod.start_engine()
        await self.pod.start_agent()
        arguments = [
            f"--namespace={OWN_NAMESPACE}",
            f"--gateway-key-file={key_file}",
            f"--port={self.port}",
            f"--internal-port={self.internal_port}",
            f"--max-in-flight-bytes={int(0.4 * MEMORY_LIMIT)}",
            f"--max-connections={MEMORY_LIMIT // (256 * 1024)}",
            "--linger-seconds=0",
            "--drain-seconds=1",
            *self._options,
        ]
        with self.log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tests.gateway.gateway_process",
                str(self._engine_port),
                str(self._agent_port),
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=os.environ
                | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])},
            )
        self.http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        self.put(self.pod.pool)
        self.put(self.pod.manifest)
        self.put(adapter_manifest("pirate"))
        self.add_key("default", self.key)
        await self.answering()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.close()
        await self.end()
        await self.pod.stop()

    async def end(self) -> int:
        """End the process as Kubernetes does, and return its exit code."""
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(DEADLINE):
            return await self._process.wait()

    def kill(self) -> None:
        """Kill the process as a lost machine does."""
        self._process.kill()

    def put(self, document: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(document).encode() + b"\n")

    def add_key(self, name: str, key: str) -> None:
        self.put(key_record(name, OWN_NAMESPACE, key, home="team", namespaces=["team"], models=["*"]))

    async def another_key(self, name: str) -> str:
        key = new_key()
        self.keys.append(key)
        self.add_key(name, key)
        await self.answering(key)
        return key

    async def answering(self, key: str | None = None) -> None:
        """The gateway answers a clean request."""
        async with asyncio.timeout(DEADLINE):
            while True:
                try:
                    if (await self.chat(key=key))[0] == 200:
                        return
                except aiohttp.ClientError:
                    assert self._process.returncode is None, self.log.read_text()
                await asyncio.sleep(0.05)

    async def chat(self, body: bytes | dict[str, Any] | None = None, *, key: str | None = None) -> tuple[int, bytes]:
        data = body if isinstance(body, bytes) else json.dumps(body or {"model": "pirate", "messages": []}).encode()
        headers = {"Authorization": f"Bearer {key or self.key}", "Content-Type": "application/json"}
        async with self.http.post(
            self.url + "/v1/chat/completions", data=io.BytesIO(data), headers=headers
        ) as response:
            return response.status, await response.read()

    async def open(self, data: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection and send bytes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        return reader, writer

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    def memory(self, field: str = "VmRSS") -> int:
        """Bytes of memory: `VmRSS` now, `VmHWM` at most."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
        assert found is not None
        return int(found[1]) * 1024

    def check_log(self) -> None:
        """Neither a traceback nor a key is in the log."""
        text = self.log.read_text(errors="replace")
        assert "Traceback" not in text, text[text.index("Traceback") - 500 :][:3000]
        for key in self.keys:
            assert key not in text
            assert key.split("-", 3)[3] not in text
