"""Media that clients name by URL: vLLM's own downloads, with the modules that the agent installs."""

from __future__ import annotations

import os
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from tests.server.server_rig import vllm_program
from tunesmith_server.main import prepare_engine

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PROGRAM = """
import asyncio, socket, sys
import tunesmith_addresses, tunesmith_media
from vllm.connections import global_http_connection

async def main():
    # The server can be reached.
    print((await global_http_connection.async_get_bytes(sys.argv[1])).decode())
    tunesmith_media.guard()
    for url in sys.argv[1:]:
        try:
            print((await global_http_connection.async_get_bytes(url)).decode())
        except Exception as error:
            print(type(error).__name__, error)
    make = tunesmith_media.public_socket(tunesmith_addresses.refused_kind)
    make((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("8.8.8.8", 80))).close()

asyncio.run(main())
"""


class Picture(BaseHTTPRequestHandler):
    """Answers any request."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "6")
        self.end_headers()
        self.wfile.write(b"secret")

    def log_message(self, *_: object) -> None:
        """Nothing: pytest's output is for failures."""


@pytest.fixture
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Picture)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_media_come_from_public_addresses_only(tmp_path: Path, port: int) -> None:
    prepare_engine(tmp_path)
    urls = [f"http://{host}:{port}/x" for host in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]")]
    folder = str(tmp_path / "middleware")
    done = subprocess.run(
        [vllm_program().with_name("python"), "-c", PROGRAM, *urls],
        env={**os.environ, "PYTHONPATH": folder, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    first, *others = [line for line in done.stdout.splitlines() if "secret" in line or "Error" in line]
    assert first == "secret"
    assert len(others) == len(urls)
    assert all("the URL leads to an address of the pod itself" in line for line in others), others
