"""Live progress: over HTTP for the operator and Prometheus, and as lines on standard output for people and programs."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, TextIO

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from tunesmith.api.finetunejob_status import ProgressStatus, Stage
from tunesmith.contracts.progress import step_line
from tunesmith_trainer.errors import InvalidSpecError
from tunesmith_trainer.process.metrics import exposition

Form = Literal["text", "json"]
_INDENT = "  "


class Progress:
    """Current state of the trainer. Safe to read from other threads.

    Args:
        form: format of the lines: text for people (one line that is rewritten on a terminal), or JSON.
        out: stream that each change is written to.
    """

    def __init__(self, form: Form = "text", out: TextIO | None = None) -> None:
        self._form = form
        self._out = out or sys.stdout
        self._lock = threading.Lock()
        self._status = ProgressStatus(stage=Stage.PREPARING, update_time=datetime.now(UTC))
        self._rewriting = False
        self._muted = False

    def mute(self) -> None:
        """Stop writing until the last line: another process of the run reports."""
        self._muted = True

    @property
    def status(self) -> ProgressStatus:
        """Latest progress."""
        with self._lock:
            return self._status

    @property
    def stage(self) -> Stage | None:
        """Current stage, read without the lock: for signal handlers."""
        return self._status.stage

    def update(self, **changes: Any) -> None:  # noqa: ANN401 - the fields of ProgressStatus
        """Change some fields of the progress and report it."""
        with self._lock:
            before = self._status
            self._status = before.model_copy(update={**changes, "update_time": datetime.now(UTC)})
            self._write_change(before, self._status)

    def write_line(self, text: str) -> None:
        """Write one line for people; it is not written in JSON format."""
        with self._lock:
            if self._form == "text" and not self._muted:
                self._write(text, rewrite=False)

    def finish(self, document: dict[str, Any], text: str) -> None:
        """Write the last line: the result, for programs or for people."""
        with self._lock:
            self._write(json.dumps(document) if self._form == "json" else text, rewrite=False)

    def _write_change(self, before: ProgressStatus, now: ProgressStatus) -> None:
        if self._muted:
            return
        if self._form == "json":
            self._write(now.model_dump_json(by_alias=True, exclude_none=True), rewrite=False)
        elif now.stage is not before.stage:
            self._write(f"{now.stage}", rewrite=False)
        elif now.step is not None and now.step != before.step and now.stage is Stage.TRAINING:
            rewrite = self._out.isatty()
            # A line that is rewritten must fit on one line.
            width = shutil.get_terminal_size().columns - len(_INDENT) if rewrite else None
            self._write(_INDENT + step_line(now, width=width), rewrite=rewrite)

    def _write(self, text: str, *, rewrite: bool) -> None:
        if rewrite:
            self._out.write(f"\r\x1b[2K{text}")
        else:
            self._out.write(f"\n{text}\n" if self._rewriting else f"{text}\n")
        self._rewriting = rewrite
        self._out.flush()


def serve(progress: Progress, port: int) -> ThreadingHTTPServer:
    """Serve `GET /progress` (JSON) and `GET /metrics` on all addresses, from a separate thread.

    Raises:
        InvalidSpecError: the port is in use.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = 5

        def do_GET(self) -> None:
            if self.path == "/progress":
                self._respond(
                    "application/json", progress.status.model_dump_json(by_alias=True, exclude_none=True).encode()
                )
            elif self.path == "/metrics":
                self._respond(CONTENT_TYPE_PLAIN_0_0_4, exposition(progress.status))
            else:
                self.send_error(404)

        def _respond(self, kind: str, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the standard library's name
            """Do not log requests: the operator sends one every few seconds."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - the standard library's signature
            """Ignore errors: a client that disconnects during a response is not a problem."""

    try:
        server = Server(("0.0.0.0", port), Handler)  # noqa: S104 - the operator connects from another pod
    except OSError as error:
        raise InvalidSpecError(
            f"cannot serve progress on port {port}: {error.strerror}; choose another port with --progress-port, or 0"
            " for none"
        ) from None
    threading.Thread(target=server.serve_forever, name="progress", daemon=True).start()
    return server
