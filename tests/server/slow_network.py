"""TCP proxy with a limited bandwidth per connection, in front of a server of the tests."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

_PIECE = 64 * 1024


class SlowNetwork:
    """Proxy on a port of its own; a context manager.

    Args:
        port: port of the server on this machine.
        rate: highest number of bytes per second that each connection gets from the server; None: unlimited.
    """

    def __init__(self, port: int, rate: float | None = None) -> None:
        self._server_port, self._rate = port, rate
        self.received = 0
        """Number of bytes that all connections got from the server."""
        self.connections = 0
        """Number of connections so far."""
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.connections += 1
                server = socket.create_connection(("127.0.0.1", self._server_port))
                threading.Thread(target=self._copy, args=(client, server, None), daemon=True).start()
                threading.Thread(target=self._copy, args=(server, client, self._rate), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket, rate: float | None) -> None:
        due = time.monotonic()
        with contextlib.suppress(OSError):
            while piece := source.recv(_PIECE):
                target.sendall(piece)
                if source.getpeername()[1] == self._server_port:
                    with self._lock:
                        self.received += len(piece)
                if rate is not None:
                    due = max(due, time.monotonic() - 0.1) + len(piece) / rate
                    time.sleep(max(0.0, due - time.monotonic()))
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
