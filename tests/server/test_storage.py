"""Folders of stores, on real servers: S3 for what all stores share, a web server for https://."""

from __future__ import annotations

import datetime as dt
import os
from typing import TYPE_CHECKING

import pytest

from tests.trainer.s3server import S3Server, free_port
from tests.trainer.webserver import ROWS, Server, web_server
from tunesmith.contracts.connections import guarded, refused_connection
from tunesmith.contracts.environment import ALLOWED_ADDRESSES
from tunesmith.storage.credentials import Credentials, Origin, environment_credentials
from tunesmith.storage.errors import (
    AccessDeniedError,
    CredentialsMissingError,
    InvalidUriError,
    NotFoundError,
    StorageError,
    UnavailableError,
)
from tunesmith.storage.folder import ONE_TRY, Access, Folder, Retry, open_folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

QUICK = Access(ONE_TRY)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


def of_secret(**values: str) -> Credentials:
    return Credentials(values, "the Secret mine", Origin.SECRET)


def opened(s3: S3Server, path: str, access: Access = QUICK, **changes: str) -> Folder:
    return open_folder(f"s3://tunesmith/{path}", of_secret(**{**s3.environment(), **changes}), access, what="the data")


def test_files_are_written_listed_read_and_removed(s3: S3Server, tmp_path: Path) -> None:
    folder = opened(s3, "files")
    content = os.urandom(9_000_000)
    (tmp_path / "big.bin").write_bytes(content)
    folder.child("inner").upload("big.bin", tmp_path / "big.bin")
    assert folder.create("first", b"1")
    assert not folder.create("first", b"2")
    assert (folder.names(), folder.folders()) == (["first"], ["inner"])
    assert folder.below("**/*.bin") == ["inner/big.bin"]
    [first, big] = folder.tree()
    assert ((first.name, first.size), (big.name, big.size)) == (("first", 1), ("inner/big.bin", 9_000_000))
    assert big.modified is not None
    assert abs(big.modified - dt.datetime.now(dt.UTC)) < dt.timedelta(hours=1)
    folder.child("inner").download("big.bin", tmp_path / "copy.bin")
    assert (tmp_path / "copy.bin").read_bytes() == content
    folder.remove_file("inner/big.bin")
    folder.remove_file("inner/big.bin")
    assert folder.below() == ["first"]
    folder.remove()
    with pytest.raises(NotFoundError, match=r"the data s3://tunesmith/files does not exist: check the uri"):
        folder.names()


def test_a_secret_with_half_of_its_keys_does_not_take_the_other_half_from_the_environment(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    values = {"AWS_ACCESS_KEY_ID": s3.access_key}
    for origin, kind in ((Origin.SECRET, CredentialsMissingError), (Origin.STORE_SECRET, AccessDeniedError)):
        with pytest.raises(kind, match="has AWS_ACCESS_KEY_ID and no AWS_SECRET_ACCESS_KEY: add the key"):
            open_folder("s3://tunesmith/x", Credentials(values, "the Secret mine", origin), QUICK)


@pytest.mark.parametrize(
    ("changes", "kind", "sentence"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, AccessDeniedError, "was denied with the credentials of the Secret mine"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, AccessDeniedError, "was denied with the credentials of the Secret mine"),
        ({"AWS_SECRET_ACCESS_KEY": "a b"}, AccessDeniedError, "AWS_SECRET_ACCESS_KEY of the Secret mine has spaces"),
    ],
)
def test_refused_keys_are_reported_without_them(
    s3: S3Server, changes: dict[str, str], kind: type[StorageError], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence) as failure:
        opened(s3, "files", **changes).names()
    assert not any(value in str(failure.value) for value in changes.values())


def test_a_missing_endpoint_is_part_of_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request then goes to Amazon, which does not have the keys and bucket of another server, or is unreachable."""
    proxy = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    waits: list[str] = []
    access = Access(Retry(attempts=2, first=0.01), waiting=waits.append)
    folder = open_folder("s3://b/x", of_secret(AWS_ACCESS_KEY_ID="id", AWS_SECRET_ACCESS_KEY="secret"), access)
    with pytest.raises(UnavailableError) as failure:
        folder.names()
    hint = "the Secret mine has no AWS_ENDPOINT_URL, so Amazon S3 was used: add it if the store is on another server"
    assert "s3://b/x could not be reached, tried 2 times" in str(failure.value)
    assert hint in str(failure.value)
    [wait] = waits
    assert hint in wait
    assert wait.endswith("; retrying in 0 s")


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        (
            "ftp://host/x",
            "the uri ftp://host/x must begin with hf://, s3://, gs://, az://, https://, followed by a path",
        ),
        ("S3://b/x", "must begin with hf://"),
        ("s3:///b/x", "must begin with hf://"),
        ("pvc://claim/x", "must begin with hf://"),
        ("file:///x", "file:// is allowed only in runs without a cluster"),
        ("s3://b/a.jsonl?versionId=3", "names a version, and only the newest can be read"),
        ("az://c/run#1", "has a '?' or '#', which Azure's library does not support"),
    ],
)
def test_an_invalid_uri_is_refused(uri: str, sentence: str) -> None:
    with pytest.raises(InvalidUriError) as refused:
        open_folder(uri, environment_credentials({}), QUICK)
    assert sentence in str(refused.value)


def test_the_caller_chooses_the_exception(s3: S3Server) -> None:
    access = Access(ONE_TRY, failure=lambda error: LookupError(f"translated: {error}"))
    with pytest.raises(LookupError, match="translated: the data s3://tunesmith/none does not exist"):
        opened(s3, "none", access).names()
    with pytest.raises(LookupError, match="translated: AWS_REGION of the Secret mine has spaces"):
        opened(s3, "none", access, AWS_REGION="a b")


# https://


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with web_server(tmp_path_factory.mktemp("web")) as server:
        yield server


def at(web: Server) -> Folder:
    access = Access(ONE_TRY, refusal=refused_connection)
    return open_folder(f"https://127.0.0.1:{web.server_port}", environment_credentials({}), access, what="the data")


def test_a_file_of_a_web_server_is_read_and_downloaded(web: Server, tmp_path: Path) -> None:
    folder = at(web)
    assert not folder.is_folder("rows.jsonl")
    assert folder.exists("rows.jsonl")
    assert not folder.exists("none.jsonl")
    assert folder.size("rows.jsonl") == len(ROWS)
    assert folder.read("rows.jsonl", 5, 20) == ROWS[5:25]
    assert folder.read("here") == ROWS
    folder.download("here", tmp_path / "rows.jsonl")
    assert (tmp_path / "rows.jsonl").read_bytes() == ROWS


@pytest.mark.parametrize(
    ("name", "kind", "sentence"),
    [
        ("none.jsonl", NotFoundError, "/none.jsonl does not exist: check the uri"),
        ("private.jsonl", AccessDeniedError, "/private.jsonl was denied"),
        ("broken.jsonl", UnavailableError, "/broken.jsonl could not be reached: 503"),
        ("whole.jsonl", InvalidUriError, "the server does not support range requests: copy the file to another store"),
        ("longer.jsonl", InvalidUriError, "the server sent more bytes than announced"),
        ("plain", InvalidUriError, "it redirects to 127.0.0.1 over plain HTTP"),
        ("round", InvalidUriError, "it redirects 10 times"),
    ],
)
def test_errors_of_a_web_server_are_reported(web: Server, name: str, kind: type[StorageError], sentence: str) -> None:
    with pytest.raises(kind) as failure:
        at(web).read(name, 0, 1)
    assert sentence in str(failure.value)


@pytest.mark.parametrize(
    ("allowed", "name", "refused"), [("", "rows.jsonl", "127.0.0.1"), ("127.0.0.1/32", "elsewhere", "127.0.0.2")]
)
def test_uris_and_redirects_to_unlisted_addresses_are_refused(
    web: Server, allowed: str, name: str, refused: str
) -> None:
    with (
        guarded({ALLOWED_ADDRESSES: allowed}),
        pytest.raises(AccessDeniedError, match=rf"resolves to {refused}, an address of the pod itself"),
    ):
        at(web).read(name, 0, 1)


def test_a_web_server_is_neither_listed_nor_written_to(web: Server, tmp_path: Path) -> None:
    folder = at(web)
    for listing in (folder.names, folder.folders, folder.below, lambda: folder.below("*.jsonl")):
        with pytest.raises(InvalidUriError, match="https:// names one file, and its folders cannot be listed"):
            listing()
    (tmp_path / "a").write_bytes(b"x")
    for writing in (lambda: folder.upload("a", tmp_path / "a"), lambda: folder.create("a", b"x"), folder.remove):
        with pytest.raises(InvalidUriError, match="https:// cannot be written to"):
            writing()
