"""gs:// with a service account's key, against a server that requires it."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from tests.trainer.gcsserver import GcsServer
from tests.trainer.trainer_rig import Workbench, chat_rows, job_manifest, write_rows
from tunesmith.api.conditions import FailureReason
from tunesmith.contracts.artifact import ArtifactManifest
from tunesmith.contracts.environment import ALLOWED_ADDRESSES
from tunesmith.storage.folder import Folder, Retry
from tunesmith.storage.schemes import GOOGLE_KEY
from tunesmith_trainer.connections import guarded
from tunesmith_trainer.errors import AccessDeniedError, SecretNotFoundError, StorageUnavailableError
from tunesmith_trainer.store import Stores

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ARTIFACT = "gs://tunesmith/store/default/doors-1/artifact"


@pytest.fixture(scope="module")
def gcs() -> Iterator[GcsServer]:
    with GcsServer() as server:
        yield server


@pytest.fixture
def endpoint(gcs: GcsServer, monkeypatch: pytest.MonkeyPatch) -> GcsServer:
    """Replace Google's server by this one; the environment contains no credentials."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs.endpoint)
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv(ALLOWED_ADDRESSES, "127.0.0.0/8")
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    return gcs


def with_secret(folder: Path, **keys: str) -> Path:
    """Return the folder of mounted Secrets, with `mine` in it."""
    mine = folder / "secrets/mine"
    mine.mkdir(parents=True, exist_ok=True)
    for name, value in keys.items():
        (mine / name).write_text(value + "\n", encoding="utf-8")
    return mine.parent


def opened(uri: str, account: dict[str, Any], folder: Path) -> Folder:
    stores = Stores(
        secrets=with_secret(folder, **{GOOGLE_KEY: json.dumps(account)}),
        allow_file=False,
        environ={},
        retry=Retry(attempts=2, first=0.01),
    )
    return stores.folder(uri, what="the folder", missing=StorageUnavailableError, secret="mine")


def test_files_and_folders(endpoint: GcsServer, tmp_path: Path) -> None:
    folder = opened("gs://tunesmith/files", endpoint.service_account(), tmp_path)
    content = os.urandom(20_000_000)
    (tmp_path / "big.bin").write_bytes(content)
    folder.child("inner").upload("big.bin", tmp_path / "big.bin")
    assert folder.create("first", b"1")
    assert not folder.create("first", b"2")
    assert (folder.names(), folder.folders()) == (["first"], ["inner"])
    assert folder.below() == ["first", "inner/big.bin"]
    assert folder.below("**/*.bin") == ["inner/big.bin"]
    assert folder.is_folder("inner")
    assert folder.child("inner").read("big.bin", 10_000_000, 5) == content[10_000_000:10_000_005]
    folder.child("inner").download("big.bin", tmp_path / "copy.bin")
    assert (tmp_path / "copy.bin").read_bytes() == content
    folder.check_writable()
    folder.child("inner").remove()
    assert folder.below() == ["first"]
    assert not folder.exists("second")


def test_a_job_runs_on_google_cloud_storage(
    bench: Workbench, endpoint: GcsServer, base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base, rows and export have a Secret each; store, checkpoints and tokens use the environment's key."""
    account = json.dumps(endpoint.service_account())
    place = opened("gs://tunesmith", endpoint.service_account(), tmp_path)
    for file in base_model.iterdir():
        place.child("models").child("tiny").upload(file.name, file)
    place.child("data").upload("train.jsonl", write_rows(tmp_path / "rows.jsonl", chat_rows(24)))
    monkeypatch.setenv(GOOGLE_KEY, account)
    before = endpoint.tokens
    mine = {"secretRef": {"name": "mine"}}
    job = job_manifest(
        "gs://tunesmith/models/tiny",
        "gs://tunesmith/data/train.jsonl",
        checkpoint={"everySteps": 1},
        output={"exports": [{"uri": "gs://tunesmith/copies/doors", **mine}]},
    )
    job["spec"]["baseModel"] |= mine
    job["spec"]["dataset"]["train"][0] |= mine
    ran = bench.run(
        "train",
        job,
        "--secrets",
        str(tmp_path / "secrets"),
        "--tokens",
        ARTIFACT.replace("artifact", "tmp/tokens"),
        "--work",
        str(tmp_path / "work"),
        allow_file=False,
        output=ARTIFACT,
    )
    assert ran.code == 0, ran.result.message
    assert ran.result.exports is not None
    assert [copy.reason for copy in ran.result.exports] == [None]
    artifact = place.child("store").child("default").child("doors-1").child("artifact")
    manifest = ArtifactManifest.model_validate_json(artifact.read("tunesmith.json"))
    assert set(artifact.names()) == {*manifest.files, "tunesmith.json"}
    assert place.child("copies").child("doors").read("tunesmith.json") == artifact.read("tunesmith.json")
    assert endpoint.tokens > before, "the key was used"
    assert endpoint.scope == "read_write"
    written = [file for file in (tmp_path / "work").rglob("*") if file.is_file()]
    assert written
    for data in [file.read_bytes() for file in written] + [artifact.read(name) for name in artifact.names()]:
        assert b"PRIVATE KEY" not in data


BAD_KEYS = {
    "no JSON": ("-----BEGIN PRIVATE KEY-----", "it is not JSON"),
    "a list": ("[]", "its type is not service_account"),
    "another type": ({"type": "external_account"}, "its type is not service_account"),
    "without its parts": ({"private_key": None, "client_email": None}, "it has no client_email and no private_key"),
    "a cut key": ({"private_key": "-----BEGIN PRIVATE KEY-----\nMIIEv"}, "its private_key cannot be read"),
}


@pytest.mark.parametrize("case", BAD_KEYS)
def test_an_invalid_key_is_reported_with_its_secret(
    case: str, bench: Workbench, endpoint: GcsServer, tmp_path: Path
) -> None:
    given, why = BAD_KEYS[case]
    text = given if isinstance(given, str) else json.dumps(endpoint.service_account(**given))
    job = bench.job()
    job["spec"]["dataset"]["train"] = [{"uri": "gs://tunesmith/data/none.jsonl", "secretRef": {"name": "mine"}}]
    ran = bench.run("validate", job, "--secrets", str(with_secret(tmp_path, **{GOOGLE_KEY: text})))
    assert (ran.code, ran.result.reason) == (2, FailureReason.ACCESS_DENIED)
    assert f"{GOOGLE_KEY} of the Secret mine cannot be used for gs://: {why}" in ran.result.message
    assert "PRIVATE" not in ran.result.message


@pytest.mark.parametrize(
    ("uri", "keys"),
    [
        ("gs://tunesmith/rows.jsonl", GOOGLE_KEY),
        ("s3://tunesmith/rows.jsonl", "AWS_ACCESS_KEY_ID"),
        ("az://tunesmith/rows.jsonl", "AZURE_STORAGE_CONNECTION_STRING and no AZURE_STORAGE_ACCOUNT_NAME"),
        ("hf://datasets/org/rows", "HF_TOKEN"),
    ],
)
def test_a_secret_without_the_key_of_its_store_is_refused(uri: str, keys: str, tmp_path: Path) -> None:
    stores = Stores(secrets=with_secret(tmp_path, password="x"), allow_file=False)
    with pytest.raises(
        SecretNotFoundError, match=f"the Secret mine has no {keys}, which {uri.split(':', maxsplit=1)[0]}:// requires"
    ):
        stores.folder(uri, what="the data set", missing=StorageUnavailableError, secret="mine")


def test_a_denied_operation_is_not_retried(endpoint: GcsServer, tmp_path: Path) -> None:
    opened("gs://tunesmith/shared", endpoint.service_account(), tmp_path).create("here", b"1")
    folder = opened("gs://tunesmith/shared", endpoint.service_account("reader"), tmp_path)
    assert folder.read("here") == b"1"
    with pytest.raises(AccessDeniedError, match=r"gs://tunesmith/shared was denied with the credentials of the Secret"):
        folder.check_writable()


@pytest.mark.usefixtures("endpoint")
def test_access_without_a_key_is_denied(tmp_path: Path) -> None:
    stores = Stores(secrets=tmp_path, allow_file=False, environ={}, retry=Retry(attempts=1))
    folder = stores.folder("gs://tunesmith/shared", what="the folder", missing=StorageUnavailableError)
    with pytest.raises(AccessDeniedError, match="the Secret tunesmith-store"):
        folder.read("here")


def test_a_key_with_a_refused_address_is_refused(endpoint: GcsServer, tmp_path: Path) -> None:
    """The key's file names the token endpoint."""
    account = endpoint.service_account(token_uri="http://169.254.169.254/token")
    folder = opened("gs://tunesmith/shared", account, tmp_path)
    with guarded(), pytest.raises(AccessDeniedError, match=r"169\.254\.169\.254.*which jobs and pools may not reach"):
        folder.names()


def test_missing_files_are_reported(endpoint: GcsServer, tmp_path: Path) -> None:
    folder = opened("gs://tunesmith/none", endpoint.service_account(), tmp_path)
    with pytest.raises(StorageUnavailableError, match="gs://tunesmith/none does not exist"):
        folder.names()
    elsewhere = opened("gs://no-such-bucket/none", endpoint.service_account(), tmp_path)
    with pytest.raises(StorageUnavailableError, match="gs://no-such-bucket/none/a does not exist"):
        elsewhere.read("a")
