"""A real nginx with its defaults in front of a gateway."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from typing import TYPE_CHECKING

import pytest

from tests.gateway.gateway_rig import adapter_manifest, eventually, free_ports

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.gateway.gateway_rig import Rig

PIRATE = "team/pirate@aaaaaaaaaaaa"
CONFIGURATION = """
daemon off;
pid {folder}/pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
        location / {{ proxy_pass {gateway}; }}
    }}
}}
"""


@pytest.fixture
async def nginx(rig: Rig, tmp_path: Path) -> AsyncIterator[str]:
    """The URL of nginx; only its files and ports differ from its defaults."""
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.fail("nginx is missing: run .ci/test-programs", pytrace=False)
    (port,) = free_ports(1)
    file = tmp_path / "nginx.conf"
    file.write_text(CONFIGURATION.format(folder=tmp_path, port=port, gateway=rig.url))

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    process = await asyncio.create_subprocess_exec(program, "-c", file, "-p", tmp_path)
    try:
        await eventually(listens, "nginx listens")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        await process.wait()


async def test_the_events_of_a_stream_arrive_as_they_are_made(rig: Rig, nginx: str) -> None:
    rig.watches.put(adapter_manifest("pirate"))
    pod = await rig.add_pod(PIRATE)
    pod.gate.clear()
    body = {"model": "pirate", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    headers = {"Authorization": f"Bearer {rig.key}"}
    async with rig.http.post(f"{nginx}/v1/chat/completions", json=body, headers=headers) as response:
        assert (response.status, response.headers["Server"].partition("/")[0]) == (200, "nginx")
        # The pod sends the others once this one has arrived.
        assert b"Ahoy" in await response.content.readuntil(b"\n\n")
        pod.gate.set()
        assert (await response.content.read()).endswith(b"data: [DONE]\n\n")


async def test_errors_and_their_headers_pass(rig: Rig, nginx: str) -> None:
    async with rig.http.post(f"{nginx}/v1/messages", json={}, headers={"x-api-key": "wrong"}) as response:
        document = await response.json()
        assert (response.status, document["error"]["type"]) == (401, "authentication_error")
        assert document["request_id"] == response.headers["X-Request-Id"]
