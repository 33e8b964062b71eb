"""No credential appears in the trainer's termination message, output or log."""

from __future__ import annotations

import json
import logging
import sys
from typing import TYPE_CHECKING

import pytest

from tunesmith.storage.credentials import Scrubber
from tunesmith_trainer.process.confidential import clean_output
from tunesmith_trainer.store import Stores

if TYPE_CHECKING:
    from pathlib import Path

    from tests.trainer.trainer_rig import Workbench

FIRST, SECOND = "hf_firstLineOfTheToken", "secondLineOfTheToken"
TOKEN = "hf_tokenThatNobodyMaySee"


def mounted(bench: Workbench, **values: str) -> Path:
    folder = bench.folder / "secrets/mine"
    folder.mkdir(parents=True)
    for name, value in values.items():
        (folder / name).write_bytes(value.encode("utf-8", "surrogateescape"))
    return folder.parent


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (f"{FIRST}\n{SECOND}\n", "has several lines"),
        (f"{FIRST} {SECOND}", "has spaces"),
        (f"{FIRST}é", "has characters that are not printable ASCII"),
        (f"{FIRST}\udcff", "has characters that are not printable ASCII"),
    ],
    ids=["two lines", "a space", "another language", "bytes"],
)
def test_a_malformed_token_is_reported_without_its_value(bench: Workbench, value: str, found: str) -> None:
    secrets = mounted(bench, HF_TOKEN=value)
    job = bench.job(baseModel={"uri": "hf://org/model", "secretRef": {"name": "mine"}})
    ran = bench.run("validate", job, "--secrets", str(secrets))
    assert (ran.code, ran.result.reason) == (2, "AccessDenied")
    assert f"HF_TOKEN of the Secret mine {found}" in ran.result.message
    written = "\n".join(ran.lines) + (bench.folder / "termination-message").read_text()
    assert not any(part in written for part in (FIRST, SECOND))


def test_messages_of_libraries_are_shown_without_credentials(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        print(f"curl: > Authorization: Bearer {TOKEN}")  # noqa: T201 - as libraries do
        raise RuntimeError(f"Illegal header value b'Bearer {TOKEN}'")

    secrets = mounted(bench, HF_TOKEN=TOKEN)
    monkeypatch.setattr(Stores, "folder", refused)
    ran = bench.run("validate", bench.job(), "--secrets", str(secrets))
    assert ran.result.reason == "InternalError"
    assert "Illegal header value b'Bearer ***'" in ran.result.message
    message = json.loads((bench.folder / "termination-message").read_text())["message"]
    assert not any(TOKEN in text for text in (*ran.lines, message))
    assert any("Bearer ***" in line for line in ran.lines)


def test_the_output_keeps_the_interface_of_a_stream(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout
    with clean_output(Scrubber({"HF_TOKEN": TOKEN})):
        sys.stdout.writelines([f"a {TOKEN}\n", "b\n"])
        assert sys.stdout.isatty() is before.isatty()
        logging.StreamHandler(sys.stderr).emit(logging.makeLogRecord({"msg": f"c {TOKEN}"}))
    assert sys.stdout is before
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("a ***\nb\n", "c ***\n")
