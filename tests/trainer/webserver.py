"""A web server with its own certificate, for URIs that begin with https://."""

from __future__ import annotations

import datetime as dt
import ipaddress
import ssl
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import aiohttp.connector
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ROWS = b'{"text": "a"}\n' * 1000


class Files(BaseHTTPRequestHandler):
    """Serves files, with range requests, and paths with other responses."""

    rows = ROWS

    def do_GET(self) -> None:
        port = self.server.server_port  # type: ignore[attr-defined]
        redirects = {
            "/here": f"https://127.0.0.1:{port}/rows.jsonl",
            "/elsewhere": f"https://127.0.0.2:{port}/rows.jsonl",
            "/plain": f"http://127.0.0.1:{port}/rows.jsonl",
            "/round": f"https://127.0.0.1:{port}/round",
        }
        if self.path in redirects:
            self._answer(302, b"", Location=redirects[self.path])
        elif self.path == "/private.jsonl":
            self._answer(403, b"")
        elif self.path == "/broken.jsonl":
            self._answer(503, b"")
        elif self.path == "/whole.jsonl":
            self._answer(200, self.rows)
        elif self.path == "/longer.jsonl":
            self._answer(206, self.rows, **{"Content-Range": f"bytes 0-0/{len(self.rows)}"})
        elif self.path == "/rows.jsonl":
            first, last = (int(part) for part in self.headers["Range"].removeprefix("bytes=").split("-"))
            part = self.rows[first : last + 1]
            self._answer(206, part, **{"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(self.rows)}"})
        else:
            self._answer(404, b"")

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        """Do not log requests: pytest shows what matters."""


class Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore a client that closes its connection early."""


def certificate(folder: Path) -> Path:
    """Create a certificate of 127.0.0.1 and 127.0.0.2 and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = dt.datetime.now(dt.UTC)
    addresses = [x509.IPAddress(ipaddress.ip_address(f"127.0.0.{number}")) for number in (1, 2)]
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(addresses), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "server.pem"
    path.write_bytes(
        signed.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return path


@contextmanager
def web_server(folder: Path, rows: bytes = ROWS) -> Iterator[Server]:
    """Serve `rows` at /rows.jsonl; this process accepts the certificate, which is written into `folder`."""
    path = certificate(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    aiohttp.connector._SSL_CONTEXT_VERIFIED.load_verify_locations(path)
    server = Server(("", 0), type("Handler", (Files,), {"rows": rows}))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
