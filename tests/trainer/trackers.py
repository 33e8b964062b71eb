"""A real MLflow server, and readers for the runs in trackers."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from tests.trainer.s3server import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_SECONDS = 120.0
_BLOCK = 32768
_HEADER = struct.Struct("<IHB")
"""Checksum, length, and type: a whole record or a part of one."""
_WHOLE, _LAST = 1, 4


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """Start the server and yield its address once it answers."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.sqlite"]
    command += ["--port", str(port), "--workers", "1", "--artifacts-destination", str(folder / "files")]
    log = folder / "mlflow.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=out,
            cwd=folder,
            start_new_session=True,
            env=os.environ
            | {
                "MLFLOW_DISABLE_TELEMETRY": "true",
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                "OMP_NUM_THREADS": "1",
            },
        )
        try:
            _await(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _await(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _SECONDS
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).close()  # noqa: S310 - our own server
        except OSError:
            assert time.monotonic() < deadline, log.read_text()
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        else:
            return


def events(folder: Path) -> EventAccumulator:
    """Load the folder as TensorBoard does."""
    shown = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    return shown.Reload()


def wandb_records(folder: Path) -> list[Record]:
    """Return the records in the files of offline runs, in the order of the runs."""
    return [
        Record.FromString(data)
        for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"))
        for data in _logged(file.read_bytes())
    ]


def _logged(data: bytes) -> Iterator[bytes]:
    """Yield the records of a file in LevelDB's log format, after W&B's header of 7 bytes."""
    position, parts = 7, b""
    while position < len(data):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER.size:
            position += left
            continue
        _, length, kind = _HEADER.unpack_from(data, position)
        position += _HEADER.size
        parts += data[position : position + length]
        position += length
        if kind in {_WHOLE, _LAST}:
            yield parts
            parts = b""
