"""`tunesmith data upload` and `tunesmith artifact download`: files that are never uploaded, or never taken as whole."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.cli.artifact_folder import publish
from tunesmith.cli.artifact import fetch_artifact
from tunesmith.cli.data import _files, _targets
from tunesmith.cli.errors import CliError
from tunesmith.cli.location import open_at
from tunesmith.cli.main import app
from tunesmith.storage.credentials import Credentials, Origin
from tunesmith.storage.folder import ONE_TRY, Access, Folder, Retry, open_folder

if TYPE_CHECKING:
    from pathlib import Path

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}


def opened(folder: Path) -> Folder:
    access = Access(ONE_TRY, failure=lambda error: CliError(str(error)))
    return open_folder(f"file://{folder}", Credentials({}, "none", Origin.ENVIRONMENT), access, allow_file=True)


def test_an_interrupted_download_leaves_no_file_of_the_adapter_and_can_be_repeated(tmp_path: Path) -> None:
    digest = publish(tmp_path / "artifact", FILES)
    output = tmp_path / "output"
    output.mkdir()

    class Interrupted(Folder):
        def download(self, name: str, target: Path) -> None:
            if name == "adapter_model.safetensors":
                raise KeyboardInterrupt
            super().download(name, target)

    folder = opened(tmp_path / "artifact")
    folder.__class__ = Interrupted
    with pytest.raises(KeyboardInterrupt):
        fetch_artifact(folder, digest, output)
    assert not any((output / name).exists() for name in FILES)

    (output / ".partial").mkdir(exist_ok=True)  # as after SIGKILL
    (output / ".partial" / "old.bin").write_bytes(b"old")
    fetch_artifact(opened(tmp_path / "artifact"), digest, output)
    assert {path.name for path in output.iterdir()} == {*FILES, "tunesmith.json"}


@pytest.mark.parametrize("name", ["../escaped", "tunesmith.json", ".partial", ".."])
def test_a_manifest_with_an_impossible_name_is_refused_before_anything_is_downloaded(tmp_path: Path, name: str) -> None:
    digest = publish(tmp_path / "artifact", FILES | {name: b"x"})
    with pytest.raises(CliError, match=f"lists {re.escape(repr(name))}, which is not a file of an adapter"):
        fetch_artifact(opened(tmp_path / "artifact"), digest, tmp_path / "output")
    assert not (tmp_path / "output").exists()
    assert not (tmp_path / "escaped").exists()


@pytest.mark.parametrize("target", ["outside.txt", "folder", "missing"])
def test_a_link_out_of_the_folder_is_not_uploaded(tmp_path: Path, target: str) -> None:
    (tmp_path / "outside.txt").write_text("secret")
    (tmp_path / "folder").mkdir()
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.txt").symlink_to(tmp_path / target)
    with pytest.raises(CliError, match=r"a\.txt is a link that does not point to a file in"):
        _files(tmp_path / "rows")


def test_a_link_inside_the_folder_is_uploaded(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.txt").write_text("a")
    (tmp_path / "rows" / "b.txt").symlink_to("a.txt")
    assert [path.name for path in _files(tmp_path / "rows")] == ["a.txt", "b.txt"]


def test_hidden_files_of_a_folder_are_not_uploaded_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows"
    for name in (".git/config", ".DS_Store", "part/.a.jsonl.swp", "part/a.jsonl"):
        (rows / name).parent.mkdir(parents=True, exist_ok=True)
        (rows / name).write_text("{}\n")
    (rows / ".git/link").symlink_to(tmp_path / "missing")
    (rows / ".git/head").write_text("x")
    assert list(_targets(rows, "s3://bucket/rows/")[1]) == ["part/a.jsonl"]
    reported = capsys.readouterr().err
    names = ".DS_Store, .git/config, .git/head and 1 more"
    assert reported == f"Hidden files, which no job reads, are not uploaded: {names}.\n"
    (rows / "part/a.jsonl").unlink()
    with pytest.raises(CliError, match="has no files except hidden ones"):
        _targets(rows, "s3://bucket/rows/")
    assert list(_targets(rows / ".DS_Store", "s3://bucket/rows/")[1]) == [".DS_Store"]


@pytest.mark.parametrize(
    ("destination", "expected"),
    [
        ("s3://bucket//a//rows.jsonl", "s3://bucket/a/rows.jsonl"),
        ("s3://bucket//", "s3://bucket/rows.jsonl"),
        ("s3://bucket/a/", "s3://bucket/a/rows.jsonl"),
    ],
)
def test_a_destination_with_empty_names_is_the_uri_that_a_job_reads(
    tmp_path: Path, destination: str, expected: str
) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    folder, files = _targets(tmp_path / "rows.jsonl", destination)
    assert [f"{folder}/{name}" for name in files] == [expected]


@pytest.mark.parametrize("destination", ["s3://bucket/../rows.jsonl", "s3://bucket/new\nline", "S3://bucket/a.jsonl"])
def test_a_uri_that_no_job_could_read_is_refused_before_the_upload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, destination: str
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    with pytest.raises(CliError, match="a FineTuneJob does not accept the uri"):
        app(["data", "upload", str(tmp_path / "rows.jsonl"), destination], standalone_mode=False)


def test_an_outage_of_the_store_is_reported_before_each_retry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "ENDPOINT_URL": "http://127.0.0.1:1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr("tunesmith.cli.location._RETRY", Retry(attempts=2, first=0))
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(CliError, match="tried 2 times"):
        app(["data", "upload", str(tmp_path / "rows.jsonl"), "s3://bucket/rows.jsonl"], standalone_mode=False)
    assert "retrying in 0 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overridden", "hint"),
    [
        ([], "set AWS_ENDPOINT_URL if the address in the Secret mine is reachable only inside the cluster"),
        (["AWS_ENDPOINT_URL"], "check AWS_ENDPOINT_URL of the environment"),
    ],
)
def test_an_unreachable_store_has_a_hint_about_the_source_of_its_address(
    monkeypatch: pytest.MonkeyPatch, overridden: list[str], hint: str
) -> None:
    monkeypatch.setattr("tunesmith.cli.location._RETRY", ONE_TRY)
    address = "http://127.0.0.1:1"
    values = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_ENDPOINT_URL": address}
    credentials = Credentials(values, "the Secret mine", Origin.STORE_SECRET, frozenset(overridden))
    with pytest.raises(CliError) as failure:
        open_at("s3://bucket/rows", credentials, what="the artifact").read("a")
    assert str(failure.value) == (
        "the artifact s3://bucket/rows/a could not be reached: "
        f"cannot connect to {address} (Connection refused); {hint}"
    )
