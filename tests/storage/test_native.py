"""Folders of stores as the CLI reads them, on a real S3 server and on the listings of the other two."""

from __future__ import annotations

import json
import os
import re
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import unquote

import obstore
import pytest
from obstore.store import S3Store

from tests.trainer.s3server import S3Server, free_port
from tunesmith.storage.credentials import environment_credentials
from tunesmith.storage.errors import AccessDeniedError, NotFoundError, StorageError, UnavailableError
from tunesmith.storage.folder import ONE_TRY, Access, Folder, open_folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NATIVE = Access(ONE_TRY, native=True)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        store = S3Store(
            server.bucket,
            endpoint=server.endpoint,
            access_key_id=server.access_key,
            secret_access_key=server.secret_key,
            region="us-east-1",
            client_options={"allow_http": True},
        )
        for path in ("store/team/a/tmp/x", "store/team/b", "other/c"):
            obstore.put(store, path, b"12")
        yield server


def opened(s3: S3Server, uri: str, **changes: str) -> Folder:
    return open_folder(uri, environment_credentials({**s3.environment(), **changes}), NATIVE, what="the store")


def test_files_of_an_s3_store_are_listed_read_and_removed(s3: S3Server) -> None:
    folder = opened(s3, "s3://tunesmith/store")
    assert (folder.names(), folder.folders()) == ([], ["team"])
    assert (folder.child("team").names(), folder.child("team").folders()) == (["b"], ["a"])
    files = folder.tree()
    assert [(file.name, file.size) for file in files] == [("team/a/tmp/x", 2), ("team/b", 2)]
    for file in files:
        assert file.modified is not None
        assert abs(file.modified - datetime.now(UTC)) < timedelta(hours=1)
    assert folder.child("team").read("b") == b"12"
    folder.remove_file("team/b")
    assert folder.below() == ["team/a/tmp/x"]


def test_files_are_uploaded_created_once_and_downloaded(s3: S3Server, tmp_path: Path) -> None:
    folder = opened(s3, "s3://tunesmith/new")
    content = os.urandom(9_000_000)
    (tmp_path / "big.bin").write_bytes(content)
    folder.upload("big.bin", tmp_path / "big.bin")
    folder.download("big.bin", tmp_path / "copy.bin")
    assert (tmp_path / "copy.bin").read_bytes() == content
    assert [folder.read("big.bin", *part) for part in ((0, 3), (3,), (3, 4))] == [
        content[:3],
        content[3:],
        content[3:7],
    ]
    assert folder.create("first", b"1")
    assert not folder.create("first", b"2")
    with pytest.raises(FileExistsError):  # of two writers that saw nothing there, one wins
        folder._filesystem.pipe_file("tunesmith/new/first", b"3", mode="create")
    assert folder.read("first") == b"1"
    folder.check_writable()
    assert folder.names() == ["big.bin", "first"]
    folder.remove()
    assert folder.below() == []


@pytest.mark.parametrize(
    ("uri", "changes", "kind", "sentence"),
    [
        ("s3://tunesmith/stroe", {}, NotFoundError, "the store s3://tunesmith/stroe does not exist: check the uri"),
        ("s3://tunesmiht/store", {}, NotFoundError, "the store s3://tunesmiht/store does not exist: check the uri"),
        (
            "s3://tunesmith/store",
            {"AWS_SECRET_ACCESS_KEY": "wrong"},
            AccessDeniedError,
            "was denied with the credentials",
        ),
        ("s3://tunesmith/store", {"AWS_SECRET_ACCESS_KEY": ""}, AccessDeniedError, "no AWS_SECRET_ACCESS_KEY: add the"),
        ("s3://tunesmith/store", {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"}, UnavailableError, "reached"),
        (
            "s3://tunesmith/store",
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"},
            UnavailableError,
            "could not be reached: cannot connect to http://127.0.0.1:1 (Connection refused)",
        ),
        (
            "s3://tunesmith/store",
            {"AWS_ENDPOINT_URL": "127.0.0.1:1"},
            AccessDeniedError,
            "AWS_ENDPOINT_URL of the environment is not an address: write http:// or https://",
        ),
    ],
)
def test_errors_name_the_problem_and_the_fix(
    s3: S3Server, uri: str, changes: dict[str, str], kind: type[StorageError], sentence: str
) -> None:
    with pytest.raises(kind) as failure:
        opened(s3, uri, **changes).files()
    assert sentence in str(failure.value)


class Listings(BaseHTTPRequestHandler):
    """The listings of Google Cloud Storage and of Azure's Blob service, for one file."""

    def do_GET(self) -> None:
        if self.path.startswith("/devaccount/container"):
            body = (
                b'<?xml version="1.0"?><EnumerationResults><Blobs><Blob><Name>store/team/a</Name><Properties>'
                b"<Creation-Time>Tue, 24 Nov 2026 12:00:00 GMT</Creation-Time>"
                b"<Last-Modified>Tue, 24 Nov 2026 12:00:00 GMT</Last-Modified><Etag>1</Etag>"
                b"<Content-Length>2</Content-Length><Content-Type>x</Content-Type></Properties></Blob></Blobs>"
                b"<NextMarker/></EnumerationResults>"
            )
        else:
            body = (
                b'<?xml version="1.0"?><ListBucketResult><Contents><Key>store/team/a</Key>'
                b"<LastModified>2026-11-24T12:00:00.000Z</LastModified><ETag>1</ETag><Size>2</Size></Contents>"
                b"<IsTruncated>false</IsTruncated></ListBucketResult>"
            )
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_DELETE(self) -> None:
        self.server.deleted.append(self.path)  # type: ignore[attr-defined]
        self.send_response(202)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        """Azure's batch of deletions."""
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.deleted += re.findall(r"DELETE (\S+)", asked)  # type: ignore[attr-defined]
        part = "Content-Type: application/http\r\nContent-ID: 0\r\n\r\nHTTP/1.1 202 Accepted\r\nx-ms-version: 1\r\n"
        body = f"--batchresponse_1\r\n{part}\r\n--batchresponse_1--\r\n".encode()
        self.send_response(202)
        self.send_header("Content-Type", "multipart/mixed; boundary=batchresponse_1")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        """Do not log requests: pytest's output is for failures."""


class Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Listings)
        self.deleted: list[str] = []


@contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_files_of_other_stores_are_listed_and_removed_with_the_keys_of_their_secrets(scheme: str) -> None:
    with serving() as server:
        address = f"http://127.0.0.1:{server.server_port}"
        account = {
            "type": "service_account",
            "client_email": "a@b",
            "private_key": "unused",
            "private_key_id": "1",
            "token_uri": address,
            "gcs_base_url": address,
            "disable_oauth": True,
        }
        values = {
            "gs": {"GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(account), "STORAGE_EMULATOR_HOST": address},
            "az": {
                "AZURE_STORAGE_CONNECTION_STRING": "DefaultEndpointsProtocol=http;AccountName=devaccount;"
                f"AccountKey=a2V5;BlobEndpoint={address}/devaccount"
            },
        }[scheme]
        folder = open_folder(f"{scheme}://container/store", environment_credentials(values), NATIVE)
        [file] = folder.tree()
        folder.remove_file("team/a")
        [deleted] = server.deleted
    assert unquote(deleted).endswith("/container/store/team/a")
    assert (file.name, file.size, file.modified) == ("team/a", 2, datetime(2026, 11, 24, 12, tzinfo=UTC))
