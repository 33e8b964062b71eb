"""Sources of rows: folders, globs, weighted sources, the Hub; packed rows; tokens kept for another attempt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import parse_qs

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.trainer.trainer_rig import Workbench, chat_row, chat_rows, write_rows
from tests.trainer.webserver import web_server
from tunesmith.api.conditions import FailureReason
from tunesmith.api.dataset import DatasetSource
from tunesmith.storage.folder import Retry
from tunesmith_trainer.data.sources import fetch
from tunesmith_trainer.store import Stores

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.trainer.s3server import S3Server
    from tests.trainer.trainer_rig import Ran
    from tunesmith.api.finetunejob_status import Preflight

PARTS = {
    "part-0.jsonl": chat_rows(8),
    "part-1.jsonl": chat_rows(12)[8:],
    "more/part-2.jsonl": chat_rows(20)[12:],
    "_temporary/part-3.jsonl": chat_rows(40)[20:],
    ".part-4.jsonl": chat_rows(60)[40:],
}


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    folder = tmp_path / "rows"
    for name, rows in PARTS.items():
        write_rows(folder / name, rows)
    (folder / "README.md").write_text("about the rows")
    (folder / "_SUCCESS").touch()
    return folder


def validated(bench: Workbench, dataset: dict[str, Any], **spec: Any) -> Ran:
    return bench.run("validate", bench.job(dataset=dataset, **spec))


def counted(ran: Ran) -> Preflight:
    assert ran.code == 0, ran.result.message
    assert ran.result.preflight is not None
    return ran.result.preflight


ROWS = {"": 20, "/": 20, "/*.jsonl": 12, "/**/*.jsonl": 20, "/part-[0-1].jsonl": 12, "/part-?.jsonl": 12, "/m*/*": 8}


@pytest.mark.parametrize("ending", ROWS)
def test_folders_and_globs(bench: Workbench, parts: Path, ending: str) -> None:
    preflight = counted(validated(bench, {"train": [{"uri": f"file://{parts}{ending}"}]}))
    assert (preflight.rows or 0) + (preflight.validation_rows or 0) == ROWS[ending]


@pytest.mark.parametrize("ending", ROWS)
def test_folders_and_globs_of_a_bucket(bench: Workbench, s3_environment: S3Server, parts: Path, ending: str) -> None:
    filesystem = s3_environment.filesystem()
    for file in parts.rglob("*"):
        if file.is_file():
            filesystem.put_file(str(file), f"tunesmith/globs/{file.relative_to(parts)}")
    preflight = counted(validated(bench, {"train": [{"uri": f"s3://tunesmith/globs{ending}"}]}))
    assert (preflight.rows or 0) + (preflight.validation_rows or 0) == ROWS[ending]


MISSING = {
    "/none": "rows/none does not exist: check the uri",
    "/*.parquet": "has no data files, whose names end with .jsonl, .json, .csv, .tsv, .parquet, .arrow",
    "/empty": "has no data files",
    "/README*": "has no data files, whose names end with .jsonl, .json, .csv, .tsv, .parquet, .arrow",
}


@pytest.mark.parametrize("ending", MISSING)
def test_sources_without_data_files_are_named(bench: Workbench, parts: Path, ending: str) -> None:
    (parts / "empty").mkdir()
    ran = validated(bench, {"train": [{"uri": f"file://{parts}{ending}"}]})
    assert (ran.code, ran.result.reason) == (2, FailureReason.DATASET_NOT_FOUND)
    assert MISSING[ending] in ran.result.message


def test_a_folder_with_the_rows_in_two_formats_is_refused(bench: Workbench, parts: Path) -> None:
    pq.write_table(pa.Table.from_pylist(chat_rows(3)), parts / "part-0.parquet")
    ran = validated(bench, {"train": [{"uri": f"file://{parts}"}]})
    assert (ran.code, ran.result.reason) == (2, FailureReason.DATASET_INVALID)
    assert "has files of several formats (jsonl, parquet)" in ran.result.message
    assert f"choose one format with a glob, such as file://{parts}/**/*.jsonl" in ran.result.message
    assert counted(validated(bench, {"train": [{"uri": f"file://{parts}/**/*.jsonl"}]})).rows == 18


def test_rows_of_a_web_server_are_counted(bench: Workbench, tmp_path: Path) -> None:
    rows = write_rows(bench.folder / "chats.jsonl", chat_rows(20)).read_bytes()
    with web_server(tmp_path, rows) as server:
        uri = f"https://127.0.0.1:{server.server_port}"
        assert counted(validated(bench, {"train": [{"uri": f"{uri}/rows.jsonl"}]})).rows == 18
        ran = validated(bench, {"train": [{"uri": f"{uri}/none.jsonl"}]})
        assert (ran.code, ran.result.reason) == (2, FailureReason.DATASET_NOT_FOUND)
        assert f"the data set {uri}/none.jsonl does not exist: check the uri" in ran.result.message


def test_several_sources_with_weights(bench: Workbench) -> None:
    chats = write_rows(bench.folder / "chats.jsonl", chat_rows(20))
    pairs = write_rows(
        bench.folder / "pairs.jsonl", [{"prompt": f"{number:02}? ", "completion": "yes"} for number in range(40)]
    )
    texts = write_rows(bench.folder / "held.jsonl", [{"text": "A lighthouse."}, {"text": "A door."}])
    dataset = {
        "train": [{"uri": f"file://{chats}", "weight": 2}, {"uri": f"file://{pairs}", "weight": 0.25}],
        "validation": [{"uri": f"file://{texts}"}],
    }
    preflight = counted(validated(bench, dataset))
    assert (preflight.rows, preflight.validation_rows) == (50, 2)
    once = counted(validated(bench, dataset | {"train": [{"uri": f"file://{chats}"}]}))
    quarter = counted(validated(bench, dataset | {"train": [{"uri": f"file://{pairs}", "weight": 0.25}]}))
    assert preflight.tokens == 2 * (once.tokens or 0) + (quarter.tokens or 0)


def test_packed_rows_are_trained(bench: Workbench) -> None:
    rows = [chat_row(f"What is door {number}?", "It is blue. " * (number % 7 + 1)) for number in range(40)]
    hyper = {"epochs": 1, "batchSize": 2, "microBatchSize": 1, "learningRate": 0.01}
    job = bench.job(rows, hyperparameters=hyper)
    job["spec"]["dataset"] |= {"maxLength": 256, "packing": True}
    ran = bench.run("train", job)
    assert ran.code == 0, ran.result.message
    preflight, resolved = ran.result.preflight, ran.result.resolved
    assert preflight is not None
    assert resolved is not None
    assert preflight.rows == 36
    sequences = preflight.packed_sequences or 0
    assert -(-(preflight.tokens or 0) // 256) <= sequences < 16
    assert resolved.total_steps == -(-sequences // 2)
    assert ran.result.evaluation is not None
    assert (ran.result.evaluation.loss or 9) < (ran.result.evaluation.base_loss or 0)


def test_another_attempt_finds_the_tokens(bench: Workbench) -> None:
    work = bench.folder / "work"
    first = bench.run("validate", bench.job(), "--work", str(work))
    (tokens,) = (work / "tokens").iterdir()
    written = (tokens / "train.arrow").stat()
    again = bench.run("validate", bench.job(), "--work", str(work))
    assert (tokens / "train.arrow").stat().st_mtime_ns == written.st_mtime_ns
    assert again.result.preflight == first.result.preflight
    # what has been damaged is created again
    content = bytearray((tokens / "train.arrow").read_bytes())
    content[-200] ^= 1
    (tokens / "train.arrow").write_bytes(content)
    assert bench.run("validate", bench.job(), "--work", str(work)).result.preflight == first.result.preflight
    assert (tokens / "train.arrow").read_bytes() != bytes(content)
    # other rows, and rows read with other settings, have separate tokens
    bench.run("validate", bench.job(chat_rows(25)), "--work", str(work))
    other = bench.job(chat_rows(25))
    other["spec"]["dataset"]["maxLength"] = 64
    bench.run("validate", other, "--work", str(work))
    assert len(list((work / "tokens").iterdir())) == 3


class Hub(BaseHTTPRequestHandler):
    """The Hub's routes for reading a data set repository."""

    files: ClassVar[dict[str, bytes]] = {}

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if path.startswith("/api/datasets/org/doors/tree/main"):
            under = path.removeprefix("/api/datasets/org/doors/tree/main").strip("/")
            self._json(self._tree(f"{under}/" if under else "", whole="recursive=true" in query.lower()))
        elif path in {"/api/datasets/org/doors", "/api/datasets/org/doors/revision/main"}:
            self._json({"id": "org/doors", "sha": "1" * 40, "siblings": [{"rfilename": name} for name in self.files]})
        elif path.startswith("/datasets/org/doors/resolve/"):
            self._content(self.files[path.split("/", 6)[6]])
        else:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def do_POST(self) -> None:
        names = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
        found = [self._entry(name) for name in names if name in self.files]
        folders = [name for name in names if any(file.startswith(f"{name}/") for file in self.files)]
        self._json([*found, *({"type": "directory", "path": name, "oid": "0", "size": 0} for name in folders)])

    def _tree(self, under: str, *, whole: bool) -> list[dict[str, Any]]:
        names = [name.removeprefix(under) for name in self.files if name.startswith(under)]
        folders = sorted({name.split("/")[0] for name in names if "/" in name})
        return [
            *({"type": "directory", "path": under + name, "oid": "0", "size": 0} for name in folders),
            *(self._entry(under + name) for name in names if whole or "/" not in name),
        ]

    def _entry(self, name: str) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(self.files[name]), "oid": "0" * 40}

    def _json(self, document: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._answer(json.dumps(document).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    def _content(self, content: bytes) -> None:
        given = self.headers.get("Range")
        if given is None:
            self._answer(content, 200, {})
            return
        begin, _, end = given.removeprefix("bytes=").partition("-")
        self._answer(content[int(begin) : int(end) + 1 if end else None], 206, {})

    def _answer(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body)), "ETag": '"1"'}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        """Do not log requests: pytest shows what matters."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    pq.write_table(pa.Table.from_pylist(chat_rows(24)), tmp_path / "rows.parquet")
    files = {"data/train-0.parquet": (tmp_path / "rows.parquet").read_bytes(), "README.md": b"about"}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Hub,), {"files": files}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


FETCH = """
import sys
from pathlib import Path
from tunesmith.api.dataset import DatasetSource
from tunesmith_trainer.data.sources import fetch
from tunesmith_trainer.errors import TrainerError
from tunesmith.storage.folder import Retry
from tunesmith_trainer.store import Stores

stores = Stores(secrets=Path("/none"), allow_file=False, retry=Retry(attempts=1))
for number, uri in enumerate(sys.argv[2:]):
    try:
        (source,) = fetch([DatasetSource(uri=uri)], stores, Path(sys.argv[1]) / str(number))
        print([(file.name, file.path.stat().st_size) for file in source.files])
    except TrainerError as error:
        print(error)
"""


def test_data_sets_of_the_hub(hub: str, tmp_path: Path) -> None:
    """Run in a separate process: the Hub's library reads its endpoint when it is imported."""
    size = (tmp_path / "rows.parquet").stat().st_size
    uris = [f"hf://datasets/org/{ending}" for ending in ("doors", "doors/data/train-*.parquet", "none")]
    done = subprocess.run(
        [sys.executable, "-c", FETCH, str(tmp_path / "fetched"), *uris],
        env=os.environ | {"HF_ENDPOINT": hub, "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stdout.splitlines() == [
        f"[('data/train-0.parquet', {size})]",
        f"[('train-0.parquet', {size})]",
        "the data set hf://datasets/org/none does not exist: check the uri",
    ], done.stderr


def test_a_data_set_of_the_hub_that_a_secret_names(hub: str, tmp_path: Path) -> None:
    (tmp_path / "secrets/mine").mkdir(parents=True)
    for name, value in (("HF_TOKEN", "hf_mine"), ("HF_ENDPOINT", hub)):
        (tmp_path / "secrets/mine" / name).write_text(value)
    stores = Stores(secrets=tmp_path / "secrets", allow_file=False, retry=Retry(attempts=1))
    source = DatasetSource.model_validate({"uri": "hf://datasets/org/doors", "secretRef": {"name": "mine"}})
    ((file,),) = [found.files for found in fetch([source], stores, tmp_path / "fetched")]
    assert file.path.read_bytes() == (tmp_path / "rows.parquet").read_bytes()


def test_another_pod_finds_the_tokens_in_the_store(bench: Workbench, s3_environment: S3Server) -> None:
    """As left by validation for the attempts; removed once the artifact is published."""
    filesystem = s3_environment.filesystem()
    uri = "s3://tunesmith/store/doors-1/tmp/tokens"
    first = bench.run("validate", bench.job(), "--tokens", uri)
    (key,) = filesystem.ls("tunesmith/store/doors-1/tmp/tokens")
    assert {entry.rsplit("/", 1)[-1] for entry in filesystem.ls(key)} == {"train.arrow", "rows.json"}
    # Existing content is used: a report that exists only in the store is returned.
    manifest = json.loads(filesystem.cat_file(f"{key}/rows.json"))
    manifest["counted"]["train"]["report"]["counts"] = {"Duplicate": 7}
    filesystem.pipe_file(f"{key}/rows.json", json.dumps(manifest).encode())
    again = counted(bench.run("validate", bench.job(), "--tokens", uri))
    assert (again.dropped_rows, again.tokens) == (7, counted(first).tokens)
    filesystem.pipe_file(f"{key}/train.arrow", b"damaged")
    assert counted(bench.run("validate", bench.job(), "--tokens", uri)).dropped_rows == 0
    ran = bench.run("train", bench.job(), "--tokens", uri, output="s3://tunesmith/store/doors-1/artifact")
    assert ran.code == 0, ran.result.message
    assert not filesystem.exists("tunesmith/store/doors-1/tmp/tokens")


@pytest.mark.usefixtures("s3_environment")
def test_a_store_that_cannot_keep_tokens_does_not_stop_the_job(bench: Workbench) -> None:
    assert counted(bench.run("validate", bench.job(), "--tokens", "s3://no-such-bucket/tokens")).rows == 22
