"""`tunesmith-agent fetch-base`, as the init container runs it: from a real S3 server, from one with the Hub's API."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import unquote

import numpy as np
import pytest
from gcsfs.core import GCSFileSystem
from gcsserver import GcsServer
from server_rig import REPOSITORY, S3Server, write_safetensors

from tunesmith.contracts.fingerprint import LocalModelFolder, base_fingerprint
from tunesmith.contracts.google_key import GOOGLE_KEY
from tunesmith_server.main import run
from tunesmith_server.store import StoreError, StoreFolder

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

AGENT = REPOSITORY / "server-image/.venv/bin/tunesmith-agent"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a model, with files that must not travel."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    write_safetensors(folder / "model.safetensors", {"a.weight": np.ones((64, 64), np.float32)})
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "modeling.py").write_text("raise SystemExit")
    return folder


@pytest.fixture
def uri(model: Path, store: S3Server) -> Iterator[str]:
    location = "s3://tunesmith/models/tiny"
    for path in model.iterdir():
        store.files.pipe_file(f"{location}/{path.name}", path.read_bytes())
    store.files.pipe_file(f"{location}/onnx/config.json", b"{}")
    yield location
    store.files.rm(location, recursive=True)


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def fetch(uri: str, target: Path, environment: Mapping[str, str], *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [AGENT, "fetch-base", "--uri", uri, "--target", target, *more],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_the_model_and_its_fingerprint_arrive_and_nothing_that_is_code(
    uri: str, model: Path, store: S3Server, tmp_path: Path
) -> None:
    target = tmp_path / "base"
    ended = fetch(uri, target, store.secret)
    assert ended.returncode == 0, ended.stderr
    names = {path.name for path in target.iterdir() if not path.name.startswith(".")}
    assert names == {"config.json", "tokenizer.json", "model.safetensors"}
    assert (tmp_path / "base.fingerprint").read_text().strip() == base_fingerprint(LocalModelFolder(model))
    assert "(100 %)" in ended.stdout


def test_a_model_on_gs_arrives_with_the_key_of_the_secret(model: Path, tmp_path: Path) -> None:
    """Of the Secret alone: the environment has no credentials."""
    with GcsServer() as server:
        account = server.service_account()
        place = GCSFileSystem(token=account, endpoint_url=server.endpoint, skip_instance_cache=True)
        for path in model.iterdir():
            place.pipe_file(f"tunesmith/models/tiny/{path.name}", path.read_bytes())
        secret = tmp_path / "secret"
        secret.mkdir()
        location, environment = "gs://tunesmith/models/tiny", {"STORAGE_EMULATOR_HOST": server.endpoint}
        given = {
            "a key": (account, 0, "(100 %)"),
            "a key that was cut": (
                account | {"private_key": "-----BEGIN PRIVATE KEY-----"},
                2,
                "is no key that can be",
            ),
            "another type": ({"type": "authorized_user"}, 2, "is no key of a service account"),
        }
        for name, (key, code, words) in given.items():
            (secret / GOOGLE_KEY).write_text(json.dumps(key))
            ended = fetch(location, tmp_path / name, environment, "--secret", str(secret))
            assert (ended.returncode, words in ended.stdout + ended.stderr) == (code, True), ended.stderr
            assert "PRIVATE" not in ended.stderr
        assert (tmp_path / "a key/model.safetensors").is_file()
        assert server.scope == "read_only"


class Blobs(BaseHTTPRequestHandler):
    """The requests of Azure's Blob service that a download needs, over one folder, at the container `models`."""

    folder: Path
    accounts: set[str]

    def do_GET(self) -> None:
        place, _, query = self.path.partition("?")
        self.accounts.add(self.headers.get("Authorization", "").partition(":")[0])
        _, account, container, *names = place.split("/")
        path = self.folder / (names[-1] if names else "")
        if (account, container) != ("devaccount", "models") or (names and not path.is_file()):
            self._answer(404, b"", {"x-ms-error-code": "BlobNotFound"})
        elif "comp=list" in query:
            self._answer(200, self._listing(query).encode(), {"Content-Type": "application/xml"})
        elif names:
            data = path.read_bytes()
            given = self.headers.get("x-ms-range", "bytes=0-").removeprefix("bytes=").partition("-")
            begin, end = int(given[0]), min(int(given[2] or len(data) - 1), len(data) - 1)
            fixed = {"x-ms-blob-type": "BlockBlob", "Content-Range": f"bytes {begin}-{end}/{len(data)}"}
            whole = self.command == "HEAD"
            self._answer(200 if whole else 206, data if whole else data[begin : end + 1], fixed)
        else:
            self._answer(200, b"", {})

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def _listing(self, query: str) -> str:
        blobs = "<BlobPrefix><Name>tiny/</Name></BlobPrefix>"
        if "prefix=tiny/" in unquote(query):
            blobs = "".join(
                f"<Blob><Name>tiny/{path.name}</Name><Properties><Content-Length>{path.stat().st_size}</Content-Length>"
                "<BlobType>BlockBlob</BlobType></Properties></Blob>"
                for path in self.folder.iterdir()
            )
        return (
            '<?xml version="1.0"?><EnumerationResults ServiceEndpoint="http://127.0.0.1" ContainerName="models">'
            f"<Delimiter>/</Delimiter><Blobs>{blobs}</Blobs><NextMarker/></EnumerationResults>"
        )

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        fixed = {"Content-Length": str(len(body)), "ETag": '"1"', "Last-Modified": "Tue, 24 Nov 2026 12:00:00 GMT"}
        for name, value in (fixed | dict(headers)).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        """Nothing: pytest shows what matters."""


def test_a_model_on_az_arrives_with_a_connection_string(model: Path, tmp_path: Path) -> None:
    accounts: set[str] = set()
    with serving(type("Handler", (Blobs,), {"folder": model, "accounts": accounts})) as address:
        secret = tmp_path / "secret"
        secret.mkdir()
        place = f"BlobEndpoint={address}/devaccount"
        given = f"DefaultEndpointsProtocol=http;AccountName=devaccount;AccountKey=a2V5;{place}"
        (secret / "AZURE_STORAGE_CONNECTION_STRING").write_text(f"{given}\n")
        environment = {"AZURE_STORAGE_CONNECTION_STRING": "AccountName=the-stores;AccountKey=a2V5"}
        ended = fetch("az://models/tiny", tmp_path / "base", environment, "--secret", str(secret))
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "base/model.safetensors").is_file()
    assert accounts == {"SharedKey devaccount"}


def test_a_connection_string_that_is_none_is_told_without_it(tmp_path: Path) -> None:
    ended = fetch("az://models/tiny", tmp_path / "base", {"AZURE_STORAGE_CONNECTION_STRING": "a-secret-value"})
    assert ended.returncode == 2
    assert "check AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and" in ended.stderr
    assert "a-secret-value" not in ended.stdout + ended.stderr


def test_an_account_of_a_secret_is_not_replaced_by_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "AccountName=the-stores;AccountKey=a2V5")
    secret = {"AZURE_STORAGE_ACCOUNT_NAME": "mine", "AZURE_STORAGE_ACCOUNT_KEY": "a2V5"}
    assert StoreFolder("az://models/tiny", secret)._files.service_client.account_name == "mine"


def test_keys_of_a_secret_do_not_go_to_the_endpoint_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[str] = set()

    def resolve(host: str, *_: object, **__: object) -> None:
        asked.add(host)
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.setenv(name, "http://store.example:9")
    monkeypatch.setattr("socket.getaddrinfo", resolve)
    secret = {"AWS_ACCESS_KEY_ID": "mine", "AWS_SECRET_ACCESS_KEY": "mine"}
    with pytest.raises(StoreError, match="could not be read"):
        StoreFolder("s3://models/tiny", secret).list()
    assert asked == {"models.s3.amazonaws.com"}


def test_a_complete_download_is_not_repeated_and_a_broken_one_is_finished(
    uri: str, store: S3Server, tmp_path: Path
) -> None:
    target = tmp_path / "base"
    assert fetch(uri, target, store.secret).returncode == 0
    again = fetch(uri, target, {**store.secret, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"})
    assert (again.returncode, "is here already" in again.stdout) == (0, True)
    (target / "model.safetensors").unlink()
    (target / ".model.safetensors.part").write_bytes(b"half")
    assert fetch(uri, target, store.secret).returncode == 0
    assert (target / "model.safetensors").stat().st_size > 64 * 64 * 4


def test_another_model_replaces_the_files_of_the_last_one(uri: str, store: S3Server, tmp_path: Path) -> None:
    target = tmp_path / "base"
    assert fetch(uri, target, store.secret).returncode == 0
    other = "s3://tunesmith/models/other"
    store.files.pipe_file(f"{other}/config.json", b'{"model_type": "other"}')
    store.files.pipe_file(f"{other}/tokenizer.json", b"{}")
    store.files.pipe_file(f"{other}/part.safetensors", store.files.cat_file(f"{uri}/model.safetensors"))
    assert fetch(other, target, store.secret).returncode == 0
    names = {path.name for path in target.iterdir() if not path.name.startswith(".")}
    assert names == {"config.json", "tokenizer.json", "part.safetensors"}


def test_mistakes_end_with_a_sentence_and_outages_with_another_code(
    uri: str, store: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    for name, value in (store.secret | {"AWS_SECRET_ACCESS_KEY": "wrong"}).items():
        (secret / name).write_text(value + "\n")
    cases = [
        (f"{uri}-not", store.secret, (), 2, "Check the location"),
        ("s3://no-such-bucket/model", store.secret, (), 2, "s3://no-such-bucket/model"),
        ("s3://tunesmith/models", store.secret, (), 2, "Check the location"),
        ("ftp://host/model", {}, (), 2, "use s3://, gs:// or az://"),
        (uri, {}, ("--secret", str(secret)), 2, "Access to"),
        (uri, {}, ("--secret", str(tmp_path / "none")), 2, "cannot be read: No such file or directory"),
        (uri, store.secret | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, (), 3, "could not be read"),
    ]
    for location, environment, more, code, sentence in cases:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            ended = run(["fetch-base", "--uri", location, "--target", str(tmp_path / "base"), *more])
        printed = capsys.readouterr().err
        assert (ended, sentence in printed) == (code, True), (location, printed)
        assert store.secret["AWS_SECRET_ACCESS_KEY"] not in printed


@pytest.mark.parametrize(
    ("removed", "sentence"),
    [
        ("config.json", "holds no config.json"),
        ("model.safetensors", "holds no .safetensors"),
        ("tokenizer.json", "no tokenizer.json"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(
    uri: str, store: S3Server, tmp_path: Path, removed: str, sentence: str
) -> None:
    store.files.rm(f"{uri}/{removed}")
    ended = fetch(uri, tmp_path / "base", store.secret)
    assert (ended.returncode, sentence in ended.stderr) == (2, True), ended.stderr


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's API as a download needs, over one folder."""

    folder: Path
    commit = "c" * 40

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/org/tiny/revision/v1") or self.path.startswith("/api/models/org/tiny?"):
            siblings = [{"rfilename": path.name, "size": path.stat().st_size} for path in self.folder.iterdir()]
            self._answer(200, json.dumps({"id": "org/tiny", "sha": self.commit, "siblings": siblings}).encode())
        elif self.path.startswith(f"/org/tiny/resolve/{self.commit}/"):
            self._answer(200, (self.folder / self.path.rpartition("/")[2]).read_bytes())
        else:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        etag = hashlib.sha256(body).hexdigest()
        fixed = {"Content-Length": str(len(body)), "ETag": f'"{etag}"', "X-Repo-Commit": self.commit}
        for name, value in (fixed | dict(headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        """Nothing: pytest shows what matters."""


@pytest.fixture
def hub(model: Path) -> Iterator[dict[str, str]]:
    with serving(type("Handler", (Hub,), {"folder": model})) as address:
        yield {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1"}


def test_models_of_the_hub_arrive_at_the_asked_revision(hub: dict[str, str], model: Path, tmp_path: Path) -> None:
    ended = fetch("hf://org/tiny", tmp_path / "base", hub, "--revision", "v1")
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "base.fingerprint").read_text().strip() == base_fingerprint(LocalModelFolder(model))
    assert not (tmp_path / "base/modeling.py").exists()


def test_a_model_that_the_hub_has_not_is_named(hub: dict[str, str], tmp_path: Path) -> None:
    ended = fetch("hf://org/none", tmp_path / "base", hub)
    assert ended.returncode == 2
    assert "hf://org/none, revision main is not on the Hub" in ended.stderr
