"""`tunesmith-agent fetch-base`, as the init container runs it: from a real S3 server, from one with the Hub's API."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING
from urllib.parse import unquote

import numpy as np
import pytest
from gcsfs.core import GCSFileSystem

from tests.server.http_server import http_server
from tests.server.server_rig import REPOSITORY, S3Server, write_safetensors, write_secret
from tests.trainer.gcsserver import GcsServer
from tunesmith.api.credentials import STORE_SECRET
from tunesmith.contracts.environment import ALLOWED_ADDRESSES
from tunesmith.contracts.fingerprint import LocalModelFolder, base_fingerprint
from tunesmith.storage.credentials import Credentials, Origin
from tunesmith.storage.schemes import GOOGLE_KEY
from tunesmith_server.main import run
from tunesmith_server.store import StoreError, StoreFolder, read_credentials

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

AGENT = REPOSITORY / "server-image/.venv/bin/tunesmith-agent"


@pytest.mark.parametrize("uri", ["s3://models/tiny", "hf://org/base"])
def test_a_malformed_credential_is_reported_without_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], uri: str
) -> None:
    secret = tmp_path / "mine"
    secret.mkdir()
    for key in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        (secret / key).write_text("firstLineOfIt\nsecondLineOfIt")
    arguments = ["fetch-base", "--uri", uri, "--target", str(tmp_path / "base"), "--secret", str(secret)]
    assert run([*arguments, "--storage", "1000000"]) != 0
    written = "".join(capsys.readouterr())
    assert "has several lines" in written
    assert "LineOfIt" not in written


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a model, with files that must not be downloaded."""
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


def fetch(
    uri: str,
    target: Path,
    secret: Mapping[str, str],
    *more: str,
    environment: Mapping[str, str] | None = None,
    name: str = "my-secret",
) -> subprocess.CompletedProcess[str]:
    """Fetch with a Secret that is mounted as the pool's pods have it, in an environment without credentials."""
    folder = write_secret(target.with_name(f"{target.name}-secrets") / name, dict(secret))
    return subprocess.run(
        [AGENT, "fetch-base", "--uri", uri, "--target", target, "--secret", folder, "--storage", str(2**20), *more],
        env={**os.environ, ALLOWED_ADDRESSES: "127.0.0.0/8", **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_the_model_is_downloaded_without_code_and_with_its_fingerprint(
    uri: str, model: Path, store: S3Server, tmp_path: Path
) -> None:
    target = tmp_path / "base"
    done = fetch(uri, target, store.secret)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in target.iterdir() if not path.name.startswith(".")}
    assert names == {"config.json", "tokenizer.json", "model.safetensors"}
    assert (tmp_path / "base.fingerprint").read_text().strip() == base_fingerprint(LocalModelFolder(model))
    assert "(100 %)" in done.stdout


def test_a_model_on_gs_is_downloaded_with_the_key_of_the_secret(model: Path, tmp_path: Path) -> None:
    """The environment has no credentials."""
    with GcsServer() as server:
        account = server.service_account()
        place = GCSFileSystem(token=account, endpoint_url=server.endpoint, skip_instance_cache=True)
        for path in model.iterdir():
            place.pipe_file(f"tunesmith/models/tiny/{path.name}", path.read_bytes())
        location, environment = "gs://tunesmith/models/tiny", {"STORAGE_EMULATOR_HOST": server.endpoint}
        given = {
            "a key": (account, 0, "(100 %)"),
            "a key that was cut": (
                account | {"private_key": "-----BEGIN PRIVATE KEY-----"},
                3,
                "its private_key cannot be read",
            ),
            "another type": ({"type": "authorized_user"}, 3, "its type is not service_account"),
        }
        for name, (key, code, words) in given.items():
            secret = {GOOGLE_KEY: json.dumps(key)}
            done = fetch(location, tmp_path / name, secret, environment=environment)
            assert (done.returncode, words in done.stdout + done.stderr) == (code, True), done.stderr
            assert "PRIVATE" not in done.stderr
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


def test_a_model_on_az_is_downloaded_with_a_connection_string(model: Path, tmp_path: Path) -> None:
    accounts: set[str] = set()
    with http_server(type("Handler", (Blobs,), {"folder": model, "accounts": accounts})) as address:
        place = f"BlobEndpoint={address}/devaccount"
        given = f"DefaultEndpointsProtocol=http;AccountName=devaccount;AccountKey=a2V5;{place}"
        secret = {"AZURE_STORAGE_CONNECTION_STRING": f"{given}\n"}
        environment = {"AZURE_STORAGE_CONNECTION_STRING": "AccountName=the-stores;AccountKey=a2V5"}
        done = fetch("az://models/tiny", tmp_path / "base", secret, environment=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "base/model.safetensors").is_file()
    assert accounts == {"SharedKey devaccount"}


def test_an_invalid_connection_string_is_reported_without_it(tmp_path: Path) -> None:
    done = fetch("az://models/tiny", tmp_path / "base", {"AZURE_STORAGE_CONNECTION_STRING": "a-secret-value"})
    assert done.returncode == 3
    assert "AZURE_STORAGE_CONNECTION_STRING or AZURE_STORAGE_ACCOUNT_NAME and" in done.stderr
    assert "a-secret-value" not in done.stdout + done.stderr


def test_an_account_of_a_secret_is_not_replaced_by_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "AccountName=the-stores;AccountKey=a2V5")
    secret = {"AZURE_STORAGE_ACCOUNT_NAME": "mine", "AZURE_STORAGE_ACCOUNT_KEY": "a2V5"}
    folder = StoreFolder("az://models/tiny", Credentials(secret, "the Secret my-secret", Origin.SECRET))
    assert folder._folder._filesystem.service_client.account_name == "mine"


def test_keys_of_a_secret_do_not_go_to_the_endpoint_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts: set[str] = set()

    def resolve(host: str, *_: object, **__: object) -> None:
        hosts.add(host)
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.setenv(name, "http://store.example:9")
    monkeypatch.setattr("socket.getaddrinfo", resolve)
    secret = {"AWS_ACCESS_KEY_ID": "mine", "AWS_SECRET_ACCESS_KEY": "mine"}
    with pytest.raises(StoreError, match="could not be reached"):
        StoreFolder("s3://models/tiny", Credentials(secret, "the Secret my-secret", Origin.SECRET)).list()
    assert hosts == {"models.s3.amazonaws.com"}


def test_a_complete_download_is_not_repeated_and_a_broken_one_is_finished(
    uri: str, store: S3Server, tmp_path: Path
) -> None:
    target = tmp_path / "base"
    assert fetch(uri, target, store.secret).returncode == 0
    again = fetch(uri, target, store.secret)
    assert (again.returncode, '"origin":"Cache"' in again.stdout) == (0, True), again.stdout + again.stderr
    (target / "model.safetensors").resolve().unlink()
    assert '"origin":"Download"' in fetch(uri, target, store.secret).stdout
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


def test_mistakes_and_outages_have_messages_and_different_exit_codes(
    uri: str, store: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ALLOWED_ADDRESSES, "127.0.0.1/32")
    wrong = store.secret | {"AWS_SECRET_ACCESS_KEY": "wrong"}
    elsewhere = store.secret | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    cases = [
        (f"{uri}-not", store.secret, 3, "check the uri"),
        ("s3://no-such-bucket/model", store.secret, 3, "s3://no-such-bucket/model"),
        ("s3://tunesmith/models", store.secret, 3, "check the uri"),
        ("ftp://host/model", {}, 2, "must begin with hf://, s3://, gs://, az://"),
        (uri, wrong, 3, "access to"),
        (uri, wrong, 3, "with the credentials of the Secret my-secret as written to the pod at 20"),
        (uri, elsewhere, 3, "could not be reached"),
        (uri, store.secret | {"AWS_ENDPOINT_URL": "http://127.0.0.2:9"}, 3, "which jobs and pools may not reach"),
    ]
    for number, (location, secret, code, sentence) in enumerate(cases):
        folder = write_secret(tmp_path / f"{number}/my-secret", secret)
        arguments = ["--target", str(tmp_path / "base"), "--secret", str(folder), "--storage", str(2**20)]
        exit_code = run(["fetch-base", "--uri", location, *arguments])
        printed = capsys.readouterr().err
        assert (exit_code, sentence in printed) == (code, True), (location, printed)
        assert store.secret["AWS_SECRET_ACCESS_KEY"] not in printed


def test_a_secret_that_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert read_credentials(tmp_path / "empty").source == "the Secret empty, which does not exist or is empty"
    with pytest.raises(StoreError, match="none cannot be read: No such file or directory"):
        read_credentials(tmp_path / "none")


def test_a_changed_secret_is_read_whole_and_has_a_later_version(tmp_path: Path) -> None:
    folder = write_secret(tmp_path / "store", {"AWS_ACCESS_KEY_ID": "old", "AWS_REGION": "north"})
    (folder / "..data").unlink()
    (folder / "..2026_11_29_12_55_30.1").mkdir()
    (folder / "..2026_11_29_12_55_30.1/AWS_ACCESS_KEY_ID").write_text("new\n")
    (folder / "..data").symlink_to("..2026_11_29_12_55_30.1")
    credentials = read_credentials(folder)
    assert credentials.values == {"AWS_ACCESS_KEY_ID": "new"}
    assert credentials.source == "the Secret store as written to the pod at 2026-11-29 12:55:30 UTC"


def test_a_base_model_that_exceeds_its_volume_is_refused_before_its_download(
    uri: str, store: S3Server, tmp_path: Path
) -> None:
    done = fetch(uri, tmp_path / "base", store.secret, "--storage", "1000")
    assert done.returncode == 2
    assert "does not fit: it has 16494 bytes, and the limit is 1000 bytes: ask the platform's" in done.stderr
    assert not (tmp_path / "base").exists()


def test_a_base_model_that_the_gpus_cannot_divide_is_refused_before_its_download(
    uri: str, store: S3Server, tmp_path: Path
) -> None:
    config = {"model_type": "llama", "num_attention_heads": 9, "num_key_value_heads": 3}
    store.files.pipe_file(f"{uri}/config.json", json.dumps(config).encode())
    done = fetch(uri, tmp_path / "base", store.secret, "--gpus", "2")
    assert done.returncode == 2
    assert (
        "has 9 attention heads, 3 KV heads, which cannot be divided among 2 GPUs: set resources.gpus to one of 1, 3, 9."
        in (done.stderr)
    )
    assert not list(tmp_path.glob("tunesmith-models/*/*/*"))
    assert fetch(uri, tmp_path / "base", store.secret, "--gpus", "3").returncode == 0


@pytest.mark.parametrize(
    ("removed", "sentence"),
    [
        ("config.json", "contains no config.json"),
        ("model.safetensors", "contains no .safetensors"),
        ("tokenizer.json", "no tokenizer.json"),
    ],
)
def test_a_folder_without_a_model_is_refused(
    uri: str, store: S3Server, tmp_path: Path, removed: str, sentence: str
) -> None:
    store.files.rm(f"{uri}/{removed}")
    done = fetch(uri, tmp_path / "base", store.secret)
    assert (done.returncode, sentence in done.stderr) == (2, True), done.stderr


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub's API that a download needs, over one folder."""

    folder: Path
    commit = "c" * 40

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/org/tiny/revision/v1") or self.path.startswith("/api/models/org/tiny?"):
            siblings = [self._sibling(path) for path in self.folder.iterdir()]
            self._answer(200, json.dumps({"id": "org/tiny", "sha": self.commit, "siblings": siblings}).encode())
        elif self.path.startswith(f"/org/tiny/resolve/{self.commit}/"):
            content = (self.folder / self.path.rpartition("/")[2]).read_bytes()
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if wanted is None:
                self._answer(200, content)
            else:
                begin, end = int(wanted[1]), int(wanted[2]) + 1
                self._answer(206, content[begin:end], {"Content-Range": f"bytes {begin}-{end - 1}/{len(content)}"})
        else:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    @staticmethod
    def _sibling(path: Path) -> dict[str, object]:
        content = path.read_bytes()
        blob = {
            "rfilename": path.name,
            "size": len(content),
            "blobId": hashlib.sha1(content, usedforsecurity=False).hexdigest(),
        }
        if path.suffix != ".safetensors":
            return blob
        return blob | {"lfs": {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}}

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
    with http_server(type("Handler", (Hub,), {"folder": model})) as address:
        yield {"HF_ENDPOINT": address}


def test_models_of_the_hub_are_downloaded_at_the_requested_revision(
    hub: dict[str, str], model: Path, tmp_path: Path
) -> None:
    done = fetch("hf://org/tiny", tmp_path / "base", hub, "--revision", "v1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "base.fingerprint").read_text().strip() == base_fingerprint(LocalModelFolder(model))
    assert not (tmp_path / "base/modeling.py").exists()


def test_a_model_that_is_missing_on_the_hub_is_named(hub: dict[str, str], tmp_path: Path) -> None:
    done = fetch("hf://org/none", tmp_path / "base", hub)
    assert done.returncode == 3
    assert (
        "hf://org/none, revision main does not exist on the Hub, or this token has no access to it (the Secret my-"
        in done.stderr
    )


class Redirecting(BaseHTTPRequestHandler):
    """A Hub or store that redirects to another address of this machine, in place of one in the cluster."""

    def do_GET(self) -> None:
        self.send_response(307)
        self.send_header("Location", f"http://127.0.0.2:9{self.path}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        """Nothing: pytest shows what matters."""


@pytest.mark.parametrize("listed", ["", "127.0.0.1/32"])
@pytest.mark.parametrize(
    "location",
    [
        "hf://org/tiny",
        "s3://models/tiny",
        pytest.param("gs://models/tiny", marks=pytest.mark.long),  # its library tries for 40 s
        pytest.param("az://models/tiny", marks=pytest.mark.long),  # 90 s
    ],
)
def test_endpoints_and_redirects_to_unlisted_addresses_are_refused(location: str, listed: str, tmp_path: Path) -> None:
    with http_server(Redirecting) as address:
        blobs = (
            f"DefaultEndpointsProtocol=http;AccountName=devaccount;AccountKey=a2V5;BlobEndpoint={address}/devaccount"
        )
        secret = {
            "HF_ENDPOINT": address,
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "mine",
            "AWS_SECRET_ACCESS_KEY": "mine",
            "AZURE_STORAGE_CONNECTION_STRING": blobs,
        }
        environment = {ALLOWED_ADDRESSES: listed, "STORAGE_EMULATOR_HOST": address}
        # Of the store's Secret: without a key, gs:// is read with the identity of the pod.
        done = fetch(location, tmp_path / "base", secret, environment=environment, name=STORE_SECRET)
    refused = "127.0.0.2" if listed else "127.0.0.1"
    assert done.returncode == 3
    assert f"resolves to {refused}, an address of the pod itself, which jobs and pools may not reach" in done.stderr
