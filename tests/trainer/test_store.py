from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from pathlib import Path

import pytest
import yaml

from tests.trainer.s3server import S3Server, free_port
from tests.trainer.trainer_rig import Workbench, chat_rows, s3_job, write_rows
from tunesmith.api.conditions import FailureReason
from tunesmith.contracts.artifact import ArtifactManifest, digest_of
from tunesmith.contracts.environment import ALLOWED_ADDRESSES
from tunesmith.contracts.fingerprint import LocalModelFolder, base_fingerprint
from tunesmith.contracts.owner import Owner
from tunesmith.contracts.progress import parse_progress
from tunesmith.storage.folder import Folder, Retry
from tunesmith_trainer.errors import (
    AccessDeniedError,
    BaseModelNotFoundError,
    DatasetNotFoundError,
    InvalidSpecError,
    SecretNotFoundError,
    StorageUnavailableError,
)
from tunesmith_trainer.store import Stores

SECRET_VALUE = "a-wrong-secret-value"


def target(folder: str, *, retry: Retry | None = None, environ: dict[str, str] | None = None) -> Folder:
    stores = Stores(
        secrets=Path("/nonexistent"), allow_file=False, retry=retry or Retry(attempts=2, first=0.01), environ=environ
    )
    return stores.folder(folder, what="the artifact's folder", missing=StorageUnavailableError)


@pytest.mark.usefixtures("uploaded")
def test_a_job_is_validated_without_fetching_weights(bench: Workbench, base_model: Path) -> None:
    ran = bench.run("validate", s3_job(), "--work", str(bench.folder / "work"), allow_file=False)
    assert ran.code == 0, ran.result.message
    assert ran.result.resolved is not None
    assert ran.result.resolved.base_model_fingerprint == base_fingerprint(LocalModelFolder(base_model))
    assert not list((bench.folder / "work").rglob("*.safetensors"))


def test_train_publishes_and_a_second_attempt_finds_it(bench: Workbench, uploaded: S3Server, tmp_path: Path) -> None:
    uri = "s3://tunesmith/store/default/doors-1/artifact"
    ran = bench.run("train", s3_job(), allow_file=False, output=uri)
    assert ran.code == 0, ran.result.message
    artifact = ran.result.artifact
    assert artifact is not None
    filesystem = uploaded.filesystem()
    data = filesystem.cat_file("tunesmith/store/default/doors-1/artifact/tunesmith.json")
    assert digest_of(data) == artifact.digest
    manifest = ArtifactManifest.model_validate_json(data)
    assert manifest.base.uri == "s3://tunesmith/models/tiny"
    names = {entry.rsplit("/", 1)[-1] for entry in filesystem.ls("tunesmith/store/default/doors-1/artifact")}
    assert names == {*manifest.files, "tunesmith.json"}
    # no credentials and no local paths in what is published
    for name in names:
        content = filesystem.cat_file(f"tunesmith/store/default/doors-1/artifact/{name}")
        assert b"writer-secret" not in content
        assert str(tmp_path).encode() not in content

    filesystem.rm_file("tunesmith/data/train.jsonl")
    again = bench.run("train", s3_job(), allow_file=False, output=uri)
    assert (again.code, again.result.artifact) == (0, artifact)
    assert again.result.evaluation == ran.result.evaluation


def test_a_manifest_is_written_once(uploaded: S3Server) -> None:
    folder = target("s3://tunesmith/once")
    assert folder.create("tunesmith.json", b"first")
    assert not folder.create("tunesmith.json", b"second")
    assert uploaded.filesystem().cat_file("tunesmith/once/tunesmith.json") == b"first"


def test_of_two_writers_one_wins(uploaded: S3Server) -> None:
    """Both have observed that nothing is there: the store decides."""
    folders = [target("s3://tunesmith/race") for _ in range(4)]
    barrier = threading.Barrier(len(folders))
    won: list[int] = []

    def write(number: int) -> None:
        barrier.wait(timeout=120)
        if folders[number].create("tunesmith.json", f"{number}".encode()):
            won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(len(folders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    content = int(uploaded.filesystem().cat_file("tunesmith/race/tunesmith.json"))
    assert won == [content]


@pytest.mark.usefixtures("uploaded")
@pytest.mark.parametrize(
    ("variable", "value"),
    [("AWS_SECRET_ACCESS_KEY", SECRET_VALUE), ("AWS_ACCESS_KEY_ID", "nobody")],
    ids=["wrong secret", "unknown key"],
)
@pytest.mark.parametrize("command", ["validate", "train"])
def test_wrong_credentials_name_the_secret_and_never_its_value(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, command: str, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    ran = bench.run(command, s3_job(), allow_file=False, output="s3://tunesmith/store/x/artifact")
    assert (ran.code, ran.result.reason, ran.result.retryable) == (2, FailureReason.ACCESS_DENIED, False)
    assert "tunesmith-store" in ran.result.message
    assert value not in ran.result.message


def test_credentials_of_a_secret_ref_are_used_for_that_uri_only(
    bench: Workbench, uploaded: S3Server, tmp_path: Path
) -> None:
    job = s3_job()
    job["spec"]["dataset"]["train"][0]["secretRef"] = {"name": "mine"}
    secret = tmp_path / "secrets/mine"
    secret.mkdir(parents=True)
    for name, value in uploaded.environment().items():
        (secret / name).write_text(value + "\n")
    arguments = ("--secrets", str(tmp_path / "secrets"))
    assert bench.run("validate", job, *arguments, allow_file=False).code == 0
    (secret / "AWS_SECRET_ACCESS_KEY").write_text(SECRET_VALUE)
    ran = bench.run("validate", job, *arguments, allow_file=False)
    assert (ran.code, ran.result.reason) == (2, FailureReason.ACCESS_DENIED)
    assert "the Secret mine" in ran.result.message
    assert "s3://tunesmith/data/train.jsonl" in ran.result.message
    assert SECRET_VALUE not in ran.result.message


MISSING = {
    "data set": (
        {"dataset": {"train": [{"uri": "s3://tunesmith/data/none.jsonl"}]}},
        FailureReason.DATASET_NOT_FOUND,
        "s3://tunesmith/data/none.jsonl does not exist",
    ),
    "bucket of the data set": (
        {"dataset": {"train": [{"uri": "s3://no-such-bucket/a.jsonl"}]}},
        FailureReason.DATASET_NOT_FOUND,
        "s3://no-such-bucket/a.jsonl does not exist",
    ),
    "base model": (
        {"baseModel": {"uri": "s3://tunesmith/models/none"}},
        FailureReason.BASE_MODEL_NOT_FOUND,
        "s3://tunesmith/models/none",
    ),
    "bucket of the base": (
        {"baseModel": {"uri": "s3://no-such-bucket/m"}},
        FailureReason.BASE_MODEL_NOT_FOUND,
        "s3://no-such-bucket/m",
    ),
}


@pytest.mark.usefixtures("uploaded")
@pytest.mark.parametrize("name", MISSING)
def test_a_missing_input_is_named(bench: Workbench, name: str) -> None:
    spec, reason, expected = MISSING[name]
    ran = bench.run("validate", s3_job(**spec), allow_file=False)
    assert expected in ran.result.message
    assert (ran.code, ran.result.reason) == (2, reason)


def test_a_short_outage_is_retried(tmp_path: Path) -> None:
    with S3Server(tmp_path / "s3") as server:
        server.filesystem().pipe_file("tunesmith/a.bin", os.urandom(100_000))
        retry = Retry(attempts=200, first=0.05, longest=0.2)
        folder = target("s3://tunesmith", retry=retry, environ=server.environment())
        assert folder.names() == ["a.bin"]
        server.stop()
        done: list[int] = []
        thread = threading.Thread(target=lambda: (folder.download("a.bin", tmp_path / "a.bin"), done.append(1)))
        thread.start()
        time.sleep(0)  # the reader has started; whether it has already failed does not matter
        server.start()
        thread.join(timeout=120)
        assert done == [1]
        assert (tmp_path / "a.bin").stat().st_size == 100_000


def test_an_outage_is_reported_until_the_store_answers(tmp_path: Path) -> None:
    with S3Server(tmp_path / "s3") as server:
        server.filesystem().pipe_file("tunesmith/a.bin", b"a")
        reported: list[str | None] = []

        def waiting(sentence: str | None) -> None:
            if not reported:
                server.start()
            reported.append(sentence)

        stores = Stores(
            secrets=tmp_path,
            allow_file=False,
            environ=server.environment(),
            retry=Retry(attempts=50, first=0.05, longest=0.2),
            waiting=waiting,
        )
        folder = stores.folder("s3://tunesmith", what="the data set", missing=DatasetNotFoundError)
        server.stop()
        assert folder.names() == ["a.bin"]
        *sentences, last = reported
        assert last is None
        assert all(
            text is not None and text.startswith("the data set s3://tunesmith could not be reached")
            for text in sentences
        )
        assert sentences


def test_a_missing_endpoint_is_in_the_progress_of_a_running_job(tmp_path: Path) -> None:
    """The keys are for another server, but are sent to Amazon's, which a pod without internet access cannot reach."""
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(s3_job()))
    port = free_port()
    command = [sys.executable, "-m", "tunesmith_trainer.main", "validate", "--job", str(tmp_path / "job.yaml")]
    command += ["--progress-port", str(port), "--termination-message", str(tmp_path / "message")]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environ |= {"AWS_ACCESS_KEY_ID": "writer", "AWS_SECRET_ACCESS_KEY": "writer-secret"}
    # Host names of the internet are unreachable: the proxy does not exist.
    environ |= {"HTTPS_PROXY": f"http://127.0.0.1:{free_port()}", ALLOWED_ADDRESSES: "127.0.0.0/8"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environ, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline, outage = time.monotonic() + 600, None
        while outage is None:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/progress", timeout=5) as answer:
                    outage = parse_progress(answer.read()).outage
            except OSError:
                time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    assert "could not be reached" in outage
    assert (
        "has no AWS_ENDPOINT_URL, so Amazon S3 was used: add it if the store is on another server; retrying" in outage
    )


def test_a_long_outage_is_retryable(s3: S3Server) -> None:
    environ = {**s3.environment(), "AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"}
    with pytest.raises(StorageUnavailableError, match=r"could not be reached, tried 2 times") as raised:
        target("s3://tunesmith", environ=environ).names()
    assert raised.value.retryable


def test_missing_credentials_are_reported(s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(AccessDeniedError, match="must have AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        target("s3://tunesmith", environ={"AWS_ENDPOINT_URL": s3.endpoint}).names()


def test_a_download_appears_only_when_it_is_complete(uploaded: S3Server, tmp_path: Path) -> None:
    content = os.urandom(20_000_000)  # three ranges
    uploaded.filesystem().pipe_file("tunesmith/big.bin", content)
    folder = target("s3://tunesmith")
    folder.download("big.bin", tmp_path / "big.bin")
    assert (tmp_path / "big.bin").read_bytes() == content
    assert [file.name for file in tmp_path.iterdir() if "big" in file.name] == ["big.bin"]
    uploaded.filesystem().pipe_file("tunesmith/empty.bin", b"")
    folder.download("empty.bin", tmp_path / "empty.bin")
    assert (tmp_path / "empty.bin").read_bytes() == b""


@pytest.mark.usefixtures("uploaded")
def test_names_cannot_leave_their_folder() -> None:
    with pytest.raises(ValueError, match="not the name of a file"):
        target("s3://tunesmith/store").read("../data/train.jsonl")


def test_claims_are_read_from_their_mounts(tmp_path: Path) -> None:
    write_rows(tmp_path / "claim/data/train.jsonl", chat_rows(2))
    stores = Stores(secrets=tmp_path, allow_file=False, claims=tmp_path)
    folder, name = stores.file("pvc://claim/data/train.jsonl", what="the data set", missing=DatasetNotFoundError)
    assert folder.exists(name)
    missing = stores.folder("pvc://claim/none", what="the base model", missing=BaseModelNotFoundError)
    with pytest.raises(BaseModelNotFoundError, match="pvc://claim/none does not exist"):
        missing.names()


# Names with characters that are special in URLs and patterns.

ODD = "run#1?x%20[1]"


def test_a_local_run_writes_into_the_output_folder(bench: Workbench, tmp_path: Path) -> None:
    """Not into the one beside it, which a URL parser or a pattern would make of its name."""
    for neighbour in ("run", "run#1", "run#1?x 1", "run#12x%201"):
        (tmp_path / "runs" / neighbour).mkdir(parents=True)
        (tmp_path / "runs" / neighbour / "results").write_text("of last week")
    rows = write_rows(tmp_path / "rows#1%20/train.jsonl", chat_rows(24))
    ran = bench.run(
        "train", bench.job(dataset={"train": [{"uri": f"file://{rows}"}]}), output=str(tmp_path / "runs" / ODD)
    )
    assert ran.code == 0, ran.result.message
    assert (tmp_path / "runs" / ODD / "artifact/tunesmith.json").is_file()
    assert not (tmp_path / "runs" / ODD / "tokens").exists()
    neighbours = [path for path in (tmp_path / "runs").iterdir() if path.name != ODD]
    assert len(neighbours) == 4
    for neighbour in neighbours:
        assert [file.name for file in neighbour.iterdir()] == ["results"], neighbour


def test_only_the_named_folder_is_removed(uploaded: S3Server) -> None:
    filesystem = uploaded.filesystem()
    names = ["odd", "odd#1", ODD, "run#1?x%201", "run#12x%201", "run"]
    for name in names:
        target(f"s3://tunesmith/odd/{name}").create("a", name.encode())
    assert [target(f"s3://tunesmith/odd/{name}").read("a") for name in names] == [name.encode() for name in names]
    assert target("s3://tunesmith/odd").folders() == sorted(names)
    target(f"s3://tunesmith/odd/{ODD}").remove()
    target("s3://tunesmith/odd/odd#1").remove()
    left = {path.split("/")[2] for path in filesystem.find("tunesmith/odd")}
    assert left == {"odd", "run#1?x%201", "run#12x%201", "run"}


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://tunesmith/a.jsonl?versionId=3", r"only the newest can be read: remove \?versionId=… from it"),
        ("az://tunesmith/run#1", r"has a '\?' or '#', which Azure's library does not support"),
        ("file://run/artifact", "followed by a path"),
        ("s3:///tunesmith/run", "followed by a path"),
        ("S3://tunesmith/run", "must begin with hf://, s3://"),
    ],
)
def test_an_impossible_location_is_refused(uri: str, message: str) -> None:
    stores = Stores(secrets=Path("/nonexistent"), allow_file=True)
    with pytest.raises(InvalidSpecError, match=message):
        stores.folder(uri, what="the base model", missing=StorageUnavailableError)


# Credentials that cannot be used.


def mounted_secret(folder: Path, **values: str) -> Stores:
    (folder / "secrets/mine").mkdir(parents=True)
    for name, value in values.items():
        (folder / "secrets/mine" / name).write_text(value)
    return Stores(secrets=folder / "secrets", allow_file=False, retry=Retry(attempts=1))


@pytest.fixture
def azure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "AccountName=the-stores;AccountKey=a2V5")


@pytest.mark.usefixtures("azure")
def test_malformed_credentials_are_reported_with_their_secret_without_values(tmp_path: Path) -> None:
    stores = mounted_secret(tmp_path, AZURE_STORAGE_CONNECTION_STRING=SECRET_VALUE)
    with pytest.raises(AccessDeniedError) as raised:
        stores.folder("az://data/rows", what="the data set", missing=DatasetNotFoundError, secret="mine")
    assert str(raised.value) == (
        "AZURE_STORAGE_CONNECTION_STRING or AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY of the Secret mine"
        " cannot be used for az://: the library does not accept its format; use the whole value as the store issued it"
    )
    assert SECRET_VALUE not in "".join(traceback.format_exception(raised.value))


@pytest.mark.usefixtures("azure")
def test_a_secrets_account_is_not_replaced_by_the_stores(tmp_path: Path) -> None:
    stores = mounted_secret(tmp_path, AZURE_STORAGE_ACCOUNT_NAME="mine", AZURE_STORAGE_ACCOUNT_KEY="a2V5")
    folder = stores.folder("az://data/rows", what="the data set", missing=DatasetNotFoundError, secret="mine")
    assert folder._filesystem.service_client.account_name == "mine"
    (tmp_path / "secrets/mine/AZURE_STORAGE_ACCOUNT_KEY").unlink()
    stores = Stores(secrets=tmp_path / "secrets", allow_file=False, retry=Retry(attempts=1))
    with pytest.raises(SecretNotFoundError, match="and no AZURE_STORAGE_ACCOUNT_KEY: add the key"):
        stores.folder("az://data/rows", what="the data set", missing=DatasetNotFoundError, secret="mine")


@pytest.mark.usefixtures("uploaded")
def test_the_owner_file_of_a_jobs_folder_is_written_once(bench: Workbench, uploaded: S3Server) -> None:
    job = s3_job()
    job["metadata"] |= {"namespace": "team", "uid": "uid-1"}
    folder = ("--job-folder", "s3://tunesmith/store/team/doors-uid-1", "--cluster")
    assert bench.run("validate", job, *folder, "here", allow_file=False).code == 0
    assert bench.run("validate", job, *folder, "elsewhere", allow_file=False).code == 0
    written = uploaded.filesystem().cat_file("tunesmith/store/team/doors-uid-1/owner.json")
    assert Owner.model_validate_json(written) == Owner(cluster="here", namespace="team", name="doors", uid="uid-1")
