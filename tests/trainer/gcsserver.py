"""A Google Cloud Storage server with one bucket: an emulator behind a proxy that requires a service account's token."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import parse_qs

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.auth import jwt

from tests.trainer.s3server import free_port

if TYPE_CHECKING:
    from types import TracebackType

BUCKET = "tunesmith"
TOKEN = "an-access-token"
READER_TOKEN = "an-access-token-that-may-only-read"
_NOT_FORWARDED = {"connection", "transfer-encoding", "date", "server", "content-length"}


@dataclass
class GcsServer:
    """The emulator, and a proxy in front of it with Google's token endpoint; a context manager."""

    emulator_port: int = field(default_factory=free_port)
    key: rsa.RSAPrivateKey = field(default_factory=lambda: rsa.generate_private_key(65537, 2048))
    tokens: int = 0
    """Number of tokens granted."""
    scope: str = ""
    """Scope of the last token."""
    _process: subprocess.Popen[bytes] | None = None
    _door: ThreadingHTTPServer | None = None

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "gcp_storage_emulator", "start", "--host", "127.0.0.1"]
        command += ["--port", str(self.emulator_port), "--default-bucket", BUCKET, "--in-memory"]
        # The emulator logs an error for every connection that a client closes.
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not self._answers():
            assert self._process.poll() is None, "the emulator exited"
            assert time.monotonic() < deadline, "the emulator does not answer"
            time.sleep(0.1)
        self._door = ThreadingHTTPServer(("127.0.0.1", 0), lambda *arguments: _Door(self, *arguments))
        threading.Thread(target=self._door.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._door is not None:
            self._door.shutdown()
            self._door.server_close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @property
    def endpoint(self) -> str:
        assert self._door is not None
        return f"http://127.0.0.1:{self._door.server_address[1]}"

    def service_account(self, name: str = "writer", **changes: Any) -> dict[str, Any]:
        """Return the content of an account's JSON key file; the account `reader` has read access only."""
        private = self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        account = {
            "type": "service_account",
            "project_id": "project",
            "private_key_id": "1",
            "private_key": private.decode(),
            "client_email": f"{name}@project.iam.gserviceaccount.com",
            "token_uri": f"{self.endpoint}/token",
        }
        return account | changes

    def grant(self, assertion: str) -> str:
        """Return the token for a signed assertion."""
        public = self.key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        claims = jwt.decode(assertion, certs=public, audience="https://oauth2.googleapis.com/token")
        self.scope = claims["scope"].removeprefix("https://www.googleapis.com/auth/devstorage.")
        self.tokens += 1
        return READER_TOKEN if claims["iss"].startswith("reader@") else TOKEN

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.emulator_port, timeout=5)
        try:
            connection.request("GET", f"/storage/v1/b/{BUCKET}")
            return connection.getresponse().status == http.client.OK
        except OSError:
            return False
        finally:
            connection.close()


class _Door(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, server: GcsServer, *arguments: Any) -> None:
        self._gcs = server
        super().__init__(*arguments)

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/token":
            try:
                token = self._gcs.grant(parse_qs(body.decode())["assertion"][0])
            except ValueError:
                self._reply(400, {}, json.dumps({"error": "invalid_grant"}).encode())
                return
            grant = {"access_token": token, "expires_in": 3600, "token_type": "Bearer"}
            self._reply(200, {"Content-Type": "application/json"}, json.dumps(grant).encode())
            return
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if given not in {TOKEN, READER_TOKEN}:
            self._refuse(401, "Anonymous caller does not have storage access")
        elif given == READER_TOKEN and self.command != "GET":
            self._refuse(403, "reader does not have storage.objects.create access")
        else:
            self._forward(body)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _answer  # noqa: N815 - http.server's names

    def _refuse(self, code: int, message: str) -> None:
        self._reply(code, {}, json.dumps({"error": {"code": code, "message": message}}).encode())

    def _forward(self, body: bytes) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._gcs.emulator_port, timeout=60)
        try:
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in _NOT_FORWARDED}
        self._reply(answer.status, headers, content)

    def _reply(self, code: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Do not log requests."""
