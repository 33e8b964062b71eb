"""`tunesmith-agent fetch-base`, as the init container runs it: from a real S3 server, from one with the Hub's API."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import numpy as np
import pytest
from gcsfs.core import GCSFileSystem
from gcsserver import GcsServer
from server_rig import REPOSITORY, S3Server, write_safetensors

from tunesmith.contracts.fingerprint import LocalModelFolder, base_fingerprint
from tunesmith.contracts.google_key import GOOGLE_KEY
from tunesmith_server.main import run

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
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Hub,), {"folder": model}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1"}
    server.shutdown()
    thread.join()
    server.server_close()


def test_models_of_the_hub_arrive_at_the_asked_revision(hub: dict[str, str], model: Path, tmp_path: Path) -> None:
    ended = fetch("hf://org/tiny", tmp_path / "base", hub, "--revision", "v1")
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "base.fingerprint").read_text().strip() == base_fingerprint(LocalModelFolder(model))
    assert not (tmp_path / "base/modeling.py").exists()


def test_a_model_that_the_hub_has_not_is_named(hub: dict[str, str], tmp_path: Path) -> None:
    ended = fetch("hf://org/none", tmp_path / "base", hub)
    assert ended.returncode == 2
    assert "hf://org/none, revision main is not on the Hub" in ended.stderr
