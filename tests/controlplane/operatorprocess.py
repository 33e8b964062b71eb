"""The operator as a process of its own, as a pod would run it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Self

from tests.controlplane.apiserver import free_port

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

STORE = "s3://tunesmith/store"


class Operator:
    """One replica; a context manager that kills what still runs."""

    def __init__(
        self,
        kubeconfig: Path,
        folder: Path,
        *,
        namespace: str = "default",
        identity: str = "",
        options: tuple[str, ...] = (),
    ) -> None:
        self._kubeconfig = kubeconfig
        self._folder = folder
        self._namespace = namespace
        self._identity = identity
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self.probe_port = 0
        self.metrics_port = 0
        self.engine_image = "localhost/engine:1"
        self.log = folder / "operator.log"
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        self.probe_port, self.metrics_port = free_port(), free_port()
        command = [
            *(sys.executable, "-c", "from tunesmith.controller.main import main; main()"),
            *("--store", STORE, "--namespace", self._namespace, "--trainer-image", "localhost/trainer:1"),
            *("--allowed-node-selectors", "namespace"),
            *("--agent-image", "localhost/agent:1", "--engine-image", self.engine_image),
            *("--probe-port", str(self.probe_port), "--metrics-port", str(self.metrics_port), "--lease-seconds", "3"),
            "--no-require-metrics-token",
            *self._options,
        ]
        environment = {**os.environ, "KUBECONFIG": str(self._kubeconfig)}
        if self._identity:
            environment["TUNESMITH_IDENTITY"] = self._identity
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        self.process.terminate()
        return self.process.wait(timeout=120)

    def answers(self, path: str, host: str = "127.0.0.1") -> bool:
        """True if a probe succeeds."""
        try:
            with urllib.request.urlopen(f"http://{host}:{self.probe_port}{path}", timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def metric(self, name: str) -> float:
        """A metric without labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=5) as response:
            lines = response.read().decode().splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


async def until(condition: Callable[[], Awaitable[bool]], what: str, *, seconds: float = 180.0) -> None:
    """Poll until the condition holds.

    Raises:
        TimeoutError: it did not hold in time.
    """
    try:
        async with asyncio.timeout(seconds):
            while not await condition():  # noqa: ASYNC110 - the cluster tells nobody
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise TimeoutError(f"{what} did not happen within {seconds:.0f} s") from None
