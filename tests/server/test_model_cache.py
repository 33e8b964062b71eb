"""A cache of base models that pods share: filled once, resumed, checked, bounded, safe against its other writers."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.server.server_rig import REPOSITORY, S3Server, wait_until, write_safetensors, write_secret
from tests.server.slow_network import SlowNetwork
from tunesmith.contracts.environment import ALLOWED_ADDRESSES
from tunesmith.storage.folder import CHUNK_BYTES
from tunesmith_server.main import run
from tunesmith_server.model_cache import FOLDER, KEPT_SECONDS, Limits, ModelCache, lock_in_use

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

AGENT = REPOSITORY / "server-image/.venv/bin/tunesmith-agent"
WEIGHTS = "model.safetensors"
KEY_LENGTH = 32
MODEL = "s3://tunesmith/models/cached"


@pytest.fixture(autouse=True)
def loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOWED_ADDRESSES, "127.0.0.0/8")


def write_model(store: S3Server, uri: str, *, megabytes: float, seed: int = 1) -> str:
    """Upload a model with one file of weights."""
    values = np.random.default_rng(seed).integers(0, 255, int(megabytes * 2**20), np.uint8)
    local = store.data / f"weights-{seed}"
    write_safetensors(local, {"a.weight": values}, "U8")
    store.files.put_file(str(local), f"{uri}/{WEIGHTS}")
    store.files.pipe_file(f"{uri}/config.json", json.dumps({"model_type": "llama", "seed": seed}).encode())
    store.files.pipe_file(f"{uri}/tokenizer.json", b"{}")
    local.unlink()
    return uri


@pytest.fixture
def small(store: S3Server) -> Iterator[str]:
    yield write_model(store, MODEL, megabytes=0.1)
    store.files.rm("s3://tunesmith/models", recursive=True)


class Node:
    """A node whose pods share a cache."""

    def __init__(self, folder: Path, store: S3Server, capture: pytest.CaptureFixture[str]) -> None:
        self.folder, self.store, self._capture = folder, store, capture
        self.volume = folder / "cache"
        self.volume.mkdir()
        self.written = ""

    def arguments(self, pod: str, uri: str, secret: dict[str, str] | None = None, *more: str) -> list[str]:
        given = write_secret(self.folder / pod / "secrets/mine", {**self.store.secret, **(secret or {})})
        target = self.folder / pod / "base"
        flags = ["--uri", uri, "--target", str(target), "--cache", str(self.volume), "--secret", str(given)]
        return ["fetch-base", *flags, *more]

    def fetch(self, pod: str, uri: str = MODEL, secret: dict[str, str] | None = None, *more: str) -> int:
        """Run fetch-base in a pod; its exit code. `written` is what it logged."""
        code = run(self.arguments(pod, uri, secret, *more))
        self.written = "".join(self._capture.readouterr())
        return code

    def start(self, pod: str, uri: str = MODEL, secret: dict[str, str] | None = None) -> subprocess.Popen[str]:
        command = [str(AGENT), *self.arguments(pod, uri, secret)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def content(self, pod: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.folder / pod / "base").iterdir()}

    def entry(self) -> Path:
        """The folder of the only model in the cache."""
        (found,) = [path for path in (self.volume / FOLDER).iterdir() if len(path.name) == KEY_LENGTH]
        return found


@pytest.fixture
def node(tmp_path: Path, store: S3Server, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Node:
    caplog.set_level("INFO")
    return Node(tmp_path, store, capfd)


def arrival(output: str) -> dict[str, Any]:
    """The report in a log of fetch-base."""
    (line,) = [line for line in output.splitlines() if '"origin"' in line]
    document: dict[str, Any] = json.loads(line[line.index("{") :])
    return document


def last_arrival(caplog: pytest.LogCaptureFixture) -> dict[str, Any]:
    found = arrival(caplog.text)
    caplog.clear()
    return found


def test_the_second_pod_takes_the_model_from_the_cache(
    node: Node, small: str, store: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    assert node.fetch("first") == 0
    first = last_arrival(caplog)
    with SlowNetwork(store.port) as network:
        assert node.fetch("second", small, {"AWS_ENDPOINT_URL": network.url}) == 0
        assert network.received < 20_000  # the listing only
    second = last_arrival(caplog)
    assert first["origin"] == "Download"
    assert first["downloadedBytes"] == first["sizeBytes"] == second["sizeBytes"] > 100_000
    assert (second["origin"], second["downloadedBytes"]) == ("Cache", 0)
    assert node.content("first") == node.content("second")
    assert (node.folder / "first/base.fingerprint").read_text() == (node.folder / "second/base.fingerprint").read_text()
    assert (node.folder / "second/base" / WEIGHTS).is_symlink()
    assert not (node.folder / "second/base/config.json").is_symlink()


def test_pods_that_start_at_once_download_once(node: Node, store: S3Server) -> None:
    uri = write_model(store, MODEL, megabytes=32)
    with SlowNetwork(store.port, rate=8 * 2**20) as network:
        pods = [node.start(name, uri, {"AWS_ENDPOINT_URL": network.url}) for name in ("one", "two", "three")]
        outputs = [pod.communicate(timeout=300)[0] for pod in pods]
        assert [pod.returncode for pod in pods] == [0, 0, 0], outputs
        assert network.received < 34 * 2**20
    found = [arrival(output) for output in outputs]
    assert sorted(report["origin"] for report in found) == ["Cache", "Cache", "Download"]
    assert any("another pod downloads it" in output for output in outputs)
    assert not list((node.entry() / "parts").iterdir())


def test_a_killed_download_continues_in_the_middle_of_a_file(node: Node, store: S3Server) -> None:
    """In another pod, which waited for it."""
    uri = write_model(store, MODEL, megabytes=160)
    total = 21
    with SlowNetwork(store.port, rate=4 * 2**20) as network:
        secret = {"AWS_ENDPOINT_URL": network.url}
        first = node.start("first", uri, secret)

        def chunks() -> int:
            found = list((node.volume / FOLDER).glob(f"*/parts/{WEIGHTS}.chunks"))
            return found[0].read_bytes().count(b"done") if found else 0

        wait_until(lambda: chunks() >= 2, "two chunks are complete")
        second = node.start("second", uri, secret)
        first.send_signal(signal.SIGKILL)
        first.communicate()
        before = chunks()
        assert 2 <= before < total
        output = second.communicate(timeout=300)[0]
    assert second.returncode == 0, output
    report = arrival(output)
    assert report["downloadedBytes"] <= report["sizeBytes"] - (before - 1) * CHUNK_BYTES  # the last chunk is short
    assert node.content("second")[WEIGHTS] == store.files.cat_file(f"{uri}/{WEIGHTS}")


def test_chunks_that_did_not_reach_the_disk_are_downloaded_again(
    node: Node, store: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a power failure."""
    uri = write_model(store, MODEL, megabytes=20)
    assert node.fetch("first", uri) == 0
    entry = node.entry()
    content = bytearray((entry / "files" / WEIGHTS).read_bytes())
    records = [b"done" + zlib_crc(content[i : i + CHUNK_BYTES]) for i in range(0, len(content), CHUNK_BYTES)]
    content[CHUNK_BYTES : 2 * CHUNK_BYTES] = bytes(CHUNK_BYTES)
    (entry / "files" / WEIGHTS).unlink()
    (entry / "files.json").unlink()
    (entry / "parts" / WEIGHTS).write_bytes(content)
    (entry / "parts" / f"{WEIGHTS}.chunks").write_bytes(b"".join(records))
    caplog.clear()
    assert node.fetch("second", uri) == 0
    assert last_arrival(caplog)["downloadedBytes"] == CHUNK_BYTES
    assert node.content("second")[WEIGHTS] == store.files.cat_file(f"{uri}/{WEIGHTS}")


def zlib_crc(data: bytes | bytearray) -> bytes:
    return zlib.crc32(data).to_bytes(4, "big")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def _replace_by_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


def _replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _replace_by_folder(path: Path) -> None:
    path.unlink()
    (path / "a/b").mkdir(parents=True)
    (path / "a/b/file").write_text("x")


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 3)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "one bit": _flip,
    "truncated": _truncate,
    "missing": Path.unlink,
    "a link": _replace_by_link,
    "a pipe": _replace_by_pipe,
    "a folder": _replace_by_folder,
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [f"files/{WEIGHTS}", "files/config.json", "files.json"])
def test_damaged_files_of_the_cache_are_replaced(
    node: Node, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert node.fetch("first") == 0
    expected = node.content("first")
    DAMAGES[damage](node.entry() / name)
    caplog.clear()
    assert node.fetch("second") == 0, node.written
    report = last_arrival(caplog)
    assert node.content("second") == expected
    if damage != "one bit":  # with a damaged manifest the files are hashed again, and none is downloaded
        assert (report["origin"] == "Cache") == (name == "files.json")
    assert node.fetch("third") == 0
    assert last_arrival(caplog)["origin"] == "Cache"


@pytest.mark.usefixtures("small")
def test_links_in_the_volume_are_not_followed(node: Node, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    assert node.fetch("first") == 0
    entry = node.entry()
    shutil.rmtree(entry)
    entry.symlink_to(outside)
    assert node.fetch("second") == 2
    assert "is not a folder" in node.written
    assert [path.name for path in outside.iterdir()] == ["kept"]


def test_a_manifest_with_the_hashes_of_other_files_is_found_by_the_checksums_of_the_source(
    node: Node, store: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    uri = write_model(store, MODEL, megabytes=0.1)
    content = store.files.cat_file(f"{uri}/{WEIGHTS}")
    store.files.call_s3(
        "put_object",
        Bucket="tunesmith",
        Key=f"{uri.removeprefix('s3://tunesmith/')}/{WEIGHTS}",
        Body=content,
        ChecksumAlgorithm="SHA256",
    )
    assert node.fetch("first", uri) == 0
    entry = node.entry()
    _flip(entry / "files" / WEIGHTS)
    document = json.loads((entry / "files.json").read_text())
    document["files"][WEIGHTS]["sha256"] = hashlib.sha256((entry / "files" / WEIGHTS).read_bytes()).hexdigest()
    (entry / "files.json").write_text(json.dumps(document))
    caplog.clear()
    assert node.fetch("second", uri) == 0
    assert node.content("second")[WEIGHTS] == content
    assert last_arrival(caplog)["origin"] == "Download"


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "document",
    [
        "[]",
        "{",
        '{"files": {}}',
        '{"uri": 1, "files": {"../../x": {"size": 1, "sha256": "' + "0" * 64 + '"}}}',
        "x" * 5 * 2**20,
        "[" * 10**5,
    ],
    ids=["list", "cut", "without uri", "other folder", "large", "deep"],
)
def test_a_hostile_manifest_is_ignored(node: Node, document: str) -> None:
    assert node.fetch("first") == 0
    (node.entry() / "files.json").write_text(document)
    assert node.fetch("second") == 0
    assert node.content("second") == node.content("first")


def test_a_changed_source_is_another_version(node: Node, store: S3Server, caplog: pytest.LogCaptureFixture) -> None:
    uri = write_model(store, MODEL, megabytes=0.1)
    assert node.fetch("first", uri) == 0
    write_model(store, MODEL, megabytes=0.1, seed=2)
    caplog.clear()
    assert node.fetch("second", uri) == 0
    assert last_arrival(caplog)["origin"] == "Download"
    assert node.content("first")[WEIGHTS] != node.content("second")[WEIGHTS] == store.files.cat_file(f"{uri}/{WEIGHTS}")


@pytest.mark.usefixtures("small")
def test_in_an_outage_the_cache_serves_those_who_could_read_the_source(
    node: Node, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = S3Server(tmp_path / "server")
    try:
        write_model(server, MODEL, megabytes=0.1)
        assert node.fetch("first", MODEL, server.secret) == 0
        expected = node.content("first")
        wrong = {**server.secret, "AWS_SECRET_ACCESS_KEY": "another"}
        assert node.fetch("denied", MODEL, wrong) == 3
        assert "access to" in node.written
    finally:
        server.stop()
    caplog.clear()
    assert node.fetch("second", MODEL, server.secret) == 0
    assert "the version in the cache is used, because its source does not answer" in caplog.text
    assert node.content("second") == expected
    assert node.fetch("other", MODEL, wrong) == 3
    assert "could not be reached" in node.written
    _flip(node.entry() / "files" / WEIGHTS)
    assert node.fetch("third", MODEL, server.secret) == 3
    assert "its copy in the cache is damaged" in node.written
    assert not (node.folder / "third/base.fingerprint").exists()


def _age(folder: Path, seconds: float) -> None:
    used = folder / "use"
    os.utime(used, (used.stat().st_atime, used.stat().st_mtime - seconds))


def test_models_that_no_pod_uses_make_room(node: Node, store: S3Server, tmp_path: Path) -> None:
    """The least recently used first, and never one that a pod uses or that was started within the last hour."""
    uris = [write_model(store, f"{MODEL}-{seed}", megabytes=1, seed=seed) for seed in range(4)]
    limit = ("--storage", str(int(3.5 * 2**20)))
    for number, uri in enumerate(uris[:3]):
        assert node.fetch(f"pod-{number}", uri, None, *limit) == 0
    assert node.fetch("last", uris[3], None, *limit) == 2
    sentence = node.written
    assert "does not fit" in sentence
    assert f"; other models use {3 * (2**20 + 4096)} bytes" in sentence or "other models use 3" in sentence
    assert all(uri in sentence for uri in uris[:3])
    assert "raise baseModelCache.maxSize" in sentence

    def folder(number: int) -> Path:
        return (tmp_path / f"pod-{number}" / "base" / WEIGHTS).resolve().parents[1]

    for number, age in ((0, 3), (1, 2), (2, 0)):
        _age(folder(number), age * KEPT_SECONDS)
    with (folder(0) / "use").open() as lock:  # as the agent of a running pod
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert node.fetch("last", uris[3], None, *limit) == 0
    assert [folder(number).exists() for number in range(3)] == [True, False, True]


@pytest.mark.usefixtures("small")
def test_the_agent_keeps_its_model_in_the_cache(node: Node) -> None:
    assert node.fetch("first") == 0
    entry = node.entry()
    _age(entry, 2 * KEPT_SECONDS)
    child = os.fork()
    if child == 0:
        lock_in_use(node.folder / "first/base.lock")
        signal.pause()
    try:
        cache = ModelCache(node.volume, Limits(2**20, "remedy"))

        def is_locked() -> bool:
            with (entry / "use").open() as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return True
            return False

        wait_until(is_locked, "the agent holds its lock", 30)
        assert not cache._remove(entry.name)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert cache._remove(entry.name)
    assert not entry.exists()


@pytest.mark.usefixtures("small")
def test_a_volume_that_cannot_be_written_is_named(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tunesmith_server.main.ModelCache", refuse)
    assert node.fetch("first") == 2
    assert "cannot be written by user" in node.written
    assert "change the owner of its folder to" in node.written
