"""Base models of the Hub: ranges are read from where the Hub redirects to, and files have the hash that it reports."""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pytest

from tests.server.http_server import http_server
from tests.server.server_rig import write_safetensors
from tunesmith.storage.credentials import Credentials, Origin
from tunesmith.storage.folder import CHUNK_BYTES
from tunesmith_server.base_download import Download, Progress
from tunesmith_server.base_source import HubSource
from tunesmith_server.safe_folder import SafeFolder
from tunesmith_server.store import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COMMIT = "c" * 40
TOKEN = "hf_of-the-tests"
WEIGHTS = "model.safetensors"


class Server(BaseHTTPRequestHandler):
    """Base of the two servers; `requests` are the paths with their Authorization headers."""

    files: ClassVar[dict[str, bytes]]
    requests: ClassVar[list[tuple[str, str]]]

    def do_GET(self) -> None:
        self.requests.append((self.path, self.headers.get("Authorization", "")))
        self.handle_path()

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def handle_path(self) -> None:
        raise NotImplementedError

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        """Nothing: pytest shows what matters."""


class Hub(Server):
    """The Hub's API, which redirects files to another server, with an address that expires."""

    elsewhere: ClassVar[str]
    wrong: ClassVar[bool] = False
    resolved: ClassVar[int] = 0

    def handle_path(self) -> None:
        if self.path.startswith("/api/models/org/tiny"):
            siblings = []
            for name, content in self.files.items():
                sha256 = hashlib.sha256(b"other" if self.wrong else content).hexdigest()
                lfs = {"sha256": sha256, "size": len(content), "pointerSize": 134}
                siblings.append({"rfilename": name, "size": len(content), "blobId": "b" * 40, "lfs": lfs})
            document = {"id": "org/tiny", "sha": COMMIT, "siblings": siblings}
            self.answer(200, json.dumps(document).encode(), {"Content-Type": "application/json"})
        else:
            type(self).resolved += 1
            name = self.path.rpartition("/")[2]
            headers = {
                "Location": f"{self.elsewhere}/{name}?signature={self.resolved}",
                "X-Linked-Size": str(len(self.files[name])),
                "X-Linked-ETag": '"e"',
                "X-Repo-Commit": COMMIT,
            }
            self.answer(302, b"", headers)


class Storage(Server):
    """A server of files; each address is valid for a number of requests."""

    valid: ClassVar[dict[str, int]] = {}
    requests_per_address: ClassVar[int]
    ignores_ranges: ClassVar[bool] = False
    _lock = threading.Lock()

    def handle_path(self) -> None:
        with self._lock:
            used = self.valid[self.path] = self.valid.get(self.path, 0) + 1
        content = self.files[self.path.partition("?")[0].rpartition("/")[2]]
        begin, end = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        if used > self.requests_per_address:
            self.answer(403, b"expired", {})
        elif self.ignores_ranges:
            self.answer(200, content, {})
        else:
            self.answer(206, content[begin : end + 1], {"Content-Range": f"bytes {begin}-{end}/{len(content)}"})


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    values = np.random.default_rng(1).integers(0, 255, int(3.5 * CHUNK_BYTES), np.uint8)
    write_safetensors(tmp_path / WEIGHTS, {"a.weight": values}, "U8")
    return {WEIGHTS: (tmp_path / WEIGHTS).read_bytes(), "config.json": b"{}"}


@contextmanager
def hub(
    files: dict[str, bytes], *, wrong: bool = False, **storage: object
) -> Iterator[tuple[HubSource, type[Hub], type[Storage]]]:
    fields = {"files": files, "requests": [], "valid": {}, "requests_per_address": 1000, **storage}
    stored = type("Stored", (Storage,), fields)
    with http_server(stored, "localhost") as elsewhere:
        fields = {"files": files, "requests": [], "elsewhere": elsewhere, "wrong": wrong}
        named = type("Named", (Hub,), fields)
        with http_server(named) as address:
            given = Credentials({"HF_ENDPOINT": address, "HF_TOKEN": TOKEN}, "the Secret hub", Origin.SECRET)
            yield HubSource("hf://org/tiny", None, given), named, stored


def download(source: HubSource, folder: Path) -> dict[str, bytes]:
    (folder / "parts").mkdir(parents=True)
    (folder / "files").mkdir()
    with SafeFolder.open(folder / "parts") as parts, SafeFolder.open(folder / "files") as complete:
        Download(source, parts, complete, Progress("download", 1)).fetch(source.files())
    return {path.name: path.read_bytes() for path in (folder / "files").iterdir()}


def test_the_hub_is_asked_once_per_file_and_its_token_stays_there(files: dict[str, bytes], tmp_path: Path) -> None:
    with hub(files) as (source, named, stored):
        assert download(source, tmp_path / "model") == files
        assert {authorization for _, authorization in named.requests} == {f"Bearer {TOKEN}"}
        assert {authorization for _, authorization in stored.requests} == {""}
        assert len(stored.requests) == 4 + 1
        # Parallel reads may resolve an address at the same time.
        assert named.resolved <= 4 + 1
    with hub(files) as (source, named, _):
        for offset in range(0, 4000, 1000):
            assert source.read(source.files()[0], offset, 1000) == files[WEIGHTS][offset : offset + 1000]
        assert named.resolved == 1


def test_an_expired_address_is_resolved_again(files: dict[str, bytes], tmp_path: Path) -> None:
    with hub(files, requests_per_address=1) as (source, named, _):
        assert download(source, tmp_path / "model") == files
        assert named.resolved >= 5


def test_a_file_with_another_hash_than_the_hub_reports_is_refused(files: dict[str, bytes], tmp_path: Path) -> None:
    with (
        hub(files, wrong=True) as (source, _, _),
        pytest.raises(StoreError, match=r"has the checksum sha256:[0-9a-f]{64}"),
    ):
        download(source, tmp_path / "model")
    assert not list((tmp_path / "model/files").iterdir())


def test_a_server_without_ranges_is_named(files: dict[str, bytes], tmp_path: Path) -> None:
    with (
        hub(files, ignores_ranges=True) as (source, _, _),
        pytest.raises(StoreError, match="does not support range requests"),
    ):
        download(source, tmp_path / "model")
