"""A real S3 server with one bucket, for tests that use a store."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest

if TYPE_CHECKING:
    from types import TracebackType

    from s3fs import S3FileSystem


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@dataclass
class S3Server:
    """versitygw over a folder, which stores objects as plain files; a context manager."""

    folder: Path
    port: int = field(default_factory=free_port)
    access_key: str = "writer"
    secret_key: str = "writer-secret"
    bucket: str = "tunesmith"
    _process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        (self.folder / self.bucket).mkdir(parents=True, exist_ok=True)
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the server with what was stored before, and wait until it answers."""
        command = [versitygw(), "--port", f"127.0.0.1:{self.port}", "--access", self.access_key]
        command += ["--secret", self.secret_key, "--quiet", "posix", str(self.folder)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.stop()
                    raise
                time.sleep(0.05)
            else:
                return

    def stop(self) -> None:
        """Kill the server with SIGKILL, to simulate an outage; do nothing if it does not run."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def filesystem(self) -> S3FileSystem:
        from s3fs import S3FileSystem  # noqa: PLC0415 - not every environment that starts a server has it

        return S3FileSystem(
            key=self.access_key,
            secret=self.secret_key,
            endpoint_url=self.endpoint,
            use_listings_cache=False,
            skip_instance_cache=True,
        )

    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
        }


def versitygw() -> str:
    """Return the path of the S3 server's program: $TUNESMITH_VERSITYGW, or the one built by the local cluster."""
    named = os.environ.get("TUNESMITH_VERSITYGW")
    if named:
        return named
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunesmith" / "bin"
    built = sorted(cache.glob("versitygw-*/versitygw"))
    found = str(built[-1]) if built else shutil.which("versitygw")
    if not found:
        pytest.fail("no versitygw found: set TUNESMITH_VERSITYGW to its program (the local cluster builds one)")
    return found
